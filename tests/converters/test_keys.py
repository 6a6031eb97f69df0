"""Each key of each config class of transformers, mutated by itself, beside transformers.

A mutated config is refused by a line that names the key; or it is read as the same config here, and
then transformers computes the same as before; or it is read as another, and then what is computed
here is what transformers computes.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.initialization import no_init_weights

from converters import open_source
from converters.load import load_encoder, model_config, read_llm
from converters.registry import TABLES, find
from tests.checkpoints import (
    hf_llava_folder,
    llama_folder,
    randomize,
    upstream_llava_folder,
    write_json,
)
from tests.keys import UNTRIED, WIDEST, mutations, same, show
from vfjax import InputError
from vfjax.atomic import read_json

DECODER = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SCALED = {"head_dim": 8}
EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2}
VIT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 12,
    "patch_size": 4,
}
DINO = {**{k: v for k, v in VIT.items() if k != "intermediate_size"}, "mlp_ratio": 2}
TOKENS = {"bos_token_id", "eos_token_id", "pad_token_id", "original_max_position_embeddings"}
"""Keys of these that change nothing by themselves; all others must be used."""

FORMATS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, DECODER),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM, DECODER),
    "mixtral": (
        transformers.MixtralConfig,
        transformers.MixtralForCausalLM,
        {**DECODER, **EXPERTS},
    ),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, DECODER),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {**DECODER, **SCALED}),
    "gemma": (transformers.GemmaConfig, transformers.GemmaForCausalLM, {**DECODER, **SCALED}),
    "phi": (transformers.PhiConfig, transformers.PhiForCausalLM, DECODER),
    "phi3": (
        transformers.Phi3Config,
        transformers.Phi3ForCausalLM,
        {**DECODER, "original_max_position_embeddings": 16},
    ),
    "clip_vision_model": (transformers.CLIPVisionConfig, transformers.CLIPVisionModel, VIT),
    "siglip_vision_model": (transformers.SiglipVisionConfig, transformers.SiglipVisionModel, VIT),
    "vit": (transformers.ViTConfig, transformers.ViTModel, VIT),
    "dinov2": (transformers.Dinov2Config, transformers.Dinov2Model, DINO),
    "dinov2_with_registers": (
        transformers.Dinov2WithRegistersConfig,
        transformers.Dinov2WithRegistersModel,
        DINO,
    ),
    "dinov3_vit": (transformers.DINOv3ViTConfig, transformers.DINOv3ViTModel, VIT),
}
"""`model_type` -> transformers' classes, a tiny config."""

OTHERS = {
    *("clip", "siglip", "open_clip_convnext", "open_clip_siglip"),
    *("mlp", "mining", "slime", "comm", "onevision", "sva"),
}
"""Tables whose configs are halves of these, not of transformers, or ours."""

IN_FAMILIES = {
    *("idefics3", "idefics3_vision", "smolvlm_vision"),
    *("intern_vit_6b", "internlm2", "internvl", "internvl_vision"),
    *("ovis2", "ovis2_vision"),
    *("qwen2_vl_text", "qwen2_vl_vision", "qwen2_5_vl_text", "qwen2_5_vl_vision", "qwen_merger"),
    *("qwen3_vl_text", "qwen3_vl_vision", "qwen3_mergers"),
    *("LLaVAOneVision1_5_text", "rice_vit", "rice_merger"),
}
"""Tables of parts that transformers has in whole models alone: the tests of their formats compare
those."""


class Reference:
    """Transformers' model of a config, or none if it refuses that."""

    def __init__(self, kind: str):
        self.kind = kind
        self.config_class, self.model_class, sizes = FORMATS[kind]
        config = self.config_class(**sizes)
        self.base = json.loads(config.to_json_string(use_diff=False)) | {"model_type": kind}
        if kind in ("dinov3_vit", "dinov2_with_registers"):
            self.base |= {"num_register_tokens": 2}
        self.base.pop("layer_types", None)  # as long as the layers, which then could not change
        self.state = self.model(self.base).state_dict()

    def model(self, config: Mapping[str, Any]) -> torch.nn.Module:
        keys = {k: v for k, v in config.items() if k not in ("model_type", "transformers_version")}
        made = self.config_class(**json.loads(json.dumps(keys)), attn_implementation="eager")
        with no_init_weights():
            model = self.model_class(made)
        model.tie_weights()
        return randomize(model, 0)

    @torch.no_grad()
    def outputs(self, model: torch.nn.Module, count: int) -> list[np.ndarray]:
        """Logits of `count` tokens, or hidden states."""
        model.eval()
        if TABLES[self.kind].architecture:
            ids = torch.from_numpy(tokens(count))
            return [model(input_ids=ids, return_dict=True, use_cache=False).logits.numpy()]
        size = side(model.config.image_size)
        pixels = torch.from_numpy(np.moveaxis(picture(size), -1, 1).copy())
        more = {"interpolate_pos_encoding": True} if self.kind == "vit" else {}
        out = model(pixels, output_hidden_states=True, return_dict=True, **more)
        return [x.numpy() for x in out.hidden_states]


def side(size: int | list[int]) -> int:
    return size if isinstance(size, int) else size[0]


def tokens(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, 20, (1, count))


def picture(size: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((1, size, size, 3), dtype=np.float32)


def ours(kind: str, folder: Path, config: Any, *, jit: bool) -> list[np.ndarray]:
    """What `Reference.outputs` gives, computed here, of a folder; in one program, or op by op."""
    with jax.default_matmul_precision("highest"):
        if not TABLES[kind].architecture:
            encoder = load_encoder(folder)
            taps = range(config.layers + 1)
            run = jax.jit(hidden_states, static_argnums=2) if jit else hidden_states
            return [np.asarray(x) for x in run(encoder, picture(config.image_size), taps)]
        llm = read_llm(open_source(folder), None, None)
        ids = tokens(min(LENGTH, config.context))
        return [np.asarray((jax.jit(logits) if jit else logits)(llm, ids))]


def hidden_states(encoder: Any, pixels: Any, taps: range) -> list[jax.Array]:
    return encoder(jnp.asarray(pixels), taps)


def logits(llm: Any, ids: Any) -> jax.Array:
    hidden, _ = llm(llm.embed(jnp.asarray(ids)), jnp.ones(ids.shape, bool))
    return llm.logits(hidden)


def resized(config: Any, base: Any) -> bool:
    """Whether so many arrays have other shapes that one program compiles faster than their ops."""
    few = ("context", "layers", "mlp", "vocab")
    mine, other = (
        {k: v for k, v in vars(x).items() if type(v) is int and k not in few}
        for x in (config, base)
    )
    return mine != other


LENGTH = 8
"""Tokens of a text."""


@pytest.mark.parametrize("kind", FORMATS)
def test_every_key_has_a_fate(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    reference, table = Reference(kind), TABLES[kind]
    base = table.config(reference.base)
    before = reference.outputs(reference.model(reference.base), LENGTH)
    fates: dict[str, str] = {}
    for number, (key, value) in enumerate(mutations(reference.config_class, reference.base)):
        if fates.get(key) == "used" and isinstance(value, int | float):
            continue  # one of many numbers tells
        mutated = {**reference.base, key: value}
        try:
            config, error = find(mutated, "x").config(mutated), None
        except InputError as refusal:
            config, error = None, refusal
        if error is not None:
            assert key in str(error), (value, str(error))
            fates.setdefault(key, "refused")
            continue
        try:
            model = reference.model(mutated)
            length = min(LENGTH, getattr(config, "context", LENGTH))
            expected = reference.outputs(model, length)
        except Exception:  # transformers takes no such value
            continue
        if config == base:
            assert same(expected, before, 1e-6), f"{key}: {value!r} is read past"
            if fates.get(key) != "used":
                fates[key] = "without effect"
            continue
        folder = tmp_path / str(number)
        model.save_pretrained(folder)
        write_json(folder / "config.json", mutated)
        found = ours(kind, folder, config, jit=resized(config, base))
        assert same(found, expected, WIDEST), f"{key}: {value!r}"
        fates[key] = "used"
    show(kind, fates, capsys)
    keys = {key for key, _ in mutations(reference.config_class, reference.base)}
    assert keys - fates.keys() <= UNTRIED.keys()
    sizes = FORMATS[kind][2].keys() - TOKENS
    assert {key for key in sizes if fates[key] != "used"} == set()


def test_every_table_is_compared():
    assert set(TABLES) == {*FORMATS, *OTHERS, *IN_FAMILIES}


@pytest.mark.parametrize("kind", FORMATS)
def test_defaults_are_those_of_the_class(kind: str):
    """A key that is absent means what the class would say."""
    whole = json.loads(FORMATS[kind][0]().to_json_string(use_diff=False))
    assert TABLES[kind].config({"model_type": kind}) == TABLES[kind].config(whole)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`up`, `hf` and `llm`; tests change their config.json."""
    root = tmp_path_factory.mktemp("folders")
    upstream_llava_folder(root / "up", weights="safetensors")
    hf_llava_folder(root / "hf")
    llama_folder(root / "llm")
    return root


@pytest.mark.parametrize(
    ("name", "changes", "line"),
    [
        ("llm", {"is_causal": False}, "config.json: is_causal: found False, expected True"),
        ("hf", {"is_causal": False}, "config.json: is_causal: found False, expected no such key"),
        ("up", {"is_causal": False}, "config.json: is_causal: found False, expected True"),
        ("up", {"s2": True, "s2_scales": "336,672"}, "config.json: s2: found True, expected False"),
        ("up", {"model_type": "llava", "architectures": ["LlavaMptForCausalLM"]}, "LlavaMpt is"),
        ("llm", {"architectures": ["LlamaBidirectionalModel"]}, "architectures: found ['LlamaBi"),
        ("llm", {"quantization_config": {"quant_method": "hqq"}}, "quantised by hqq, expected"),
        (
            "hf",
            {"quantization_config": {"quant_method": "awq"}},
            "weights quantised by awq, by the config, expected tensors that are",
        ),
        (
            "up",
            {"quantization_config": {"load_in_4bit": True}},
            "weights quantised by bitsandbytes, by the config, expected tensors",
        ),
        (
            "llm",
            {"quantization": {"bits": 4}},
            "config.json: quantization: found weights quantised",
        ),
        ("llm", {"unheard_of": "x" * 5000}, "config.json: unheard_of: found 'xxx"),
    ],
)
def test_keys_that_are_refused(
    folders: Path, tmp_path: Path, name: str, changes: dict[str, Any], line: str
):
    folder = shutil.copytree(folders / name, tmp_path / name)
    write_json(folder / "config.json", read_json(folder / "config.json") | changes)
    with pytest.raises(InputError) as error:
        open_source(folder)
    assert line in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


ODD = ("7", 2.5, True, [], {}, [3, "x"], {"a": 1}, -1, 10**9, float("inf"), None, [[]])
"""Values of other types, or beyond any bounds."""


@pytest.mark.parametrize("name", ["up", "hf", "llm"])
def test_values_of_other_types(folders: Path, tmp_path: Path, name: str):
    """Each key is refused by its name, or the value is as good as any."""
    folder = shutil.copytree(folders / name, tmp_path / name)
    config = read_json(folder / "config.json")
    sections = [key for key, value in config.items() if key.endswith("_config") and value]
    places = [(config, key) for key in config] + [
        (config[section], key) for section in sections for key in config[section]
    ]
    refused = 0
    for part, key in places:
        kept = part[key]
        for value in ODD:
            part[key] = value
            write_json(folder / "config.json", config)
            try:
                model_config(open_source(folder))
            except InputError as error:
                refused += 1
                assert "\n" not in str(error)
        part[key] = kept
    assert refused > 50


@pytest.mark.parametrize("text", ["[" * 100000, '{"a": ' * 100000])
def test_json_that_is_nested_too_deep(folders: Path, tmp_path: Path, text: str):
    folder = shutil.copytree(folders / "llm", tmp_path / "llm")
    (folder / "config.json").write_text(text)
    with pytest.raises(InputError, match="config.json: found no readable JSON"):
        open_source(folder)
