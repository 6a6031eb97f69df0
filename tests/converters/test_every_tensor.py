"""Every tensor of a folder of transformers' counts here as it does there, and comes back.

For each kind of folder: the same logits; each tensor, replaced by random values, changes ours if
and only if it changes theirs; after load and export nothing is missing, unexpected or different.
"""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

import converters
from converters.inspect import inspect
from tests.checkpoints import (
    CLIP,
    DINOV2,
    IMAGE_TOKEN,
    LLAMA,
    NEXT_PINPOINTS,
    SIGLIP,
    preprocessor,
    randomize,
    tokenizer_files,
    upstream_llava_folder,
    write_json,
)
from vfjax import InputError

SMALL = {**LLAMA, "num_hidden_layers": 1}
PHI = {k: v for k, v in SMALL.items() if k != "rms_norm_eps"}
BARE = {**DINOV2, "qkv_bias": False, "use_mask_token": False}
LLMS: dict[str, Callable[..., transformers.PretrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "tied": lambda: transformers.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "mistral": lambda: transformers.MistralConfig(**SMALL),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, head_dim=8),
    "gemma": lambda: transformers.GemmaConfig(**SMALL, head_dim=8),
    "phi": lambda: transformers.PhiConfig(**PHI),
    "phi-tied": lambda: transformers.PhiConfig(**PHI, tie_word_embeddings=True),
    "phi3": lambda: transformers.Phi3Config(**SMALL, pad_token_id=0),
    "mixtral": lambda: transformers.MixtralConfig(**SMALL, num_local_experts=3),
}
"""Name -> config of a causal LM."""

TOWERS: dict[str, Callable[..., transformers.PretrainedConfig]] = {
    "clip": lambda: transformers.CLIPVisionConfig(**CLIP),
    "siglip": lambda: transformers.SiglipVisionConfig(**SIGLIP),
    "dinov2": lambda: transformers.Dinov2Config(**DINOV2),
    "dinov2-bare": lambda: transformers.Dinov2Config(
        **DINOV2, qkv_bias=False, use_mask_token=False
    ),
    "dinov2-registers": lambda: transformers.Dinov2WithRegistersConfig(**DINOV2),
}

LLAVAS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "clip": ("clip", "llama", {}),
    "siglip": ("siglip", "mistral", {"vision_feature_select_strategy": "full"}),
    "dinov2, two layers": ("dinov2", "qwen2", {"vision_feature_layer": [-1, -3]}),
    "dinov2 without biases": ("dinov2-bare", "tied", {"multimodal_projector_bias": False}),
    "registers": ("dinov2-registers", "phi-tied", {}),
    "phi": ("clip", "phi", {}),
    "mixtral": ("clip", "mixtral", {}),
    "top tied": ("clip", "llama", {"tie_word_embeddings": True}),
    "next": ("clip", "llama", {"image_grid_pinpoints": NEXT_PINPOINTS}),
}
"""Name -> tower, LLM, keys of LlavaConfig, or of LlavaNextConfig for the last."""


def save(model: Any, path: Path, **options: Any) -> None:
    randomize(model, 3)
    model.save_pretrained(path, **options)
    tokenizer_files(path)


def llm_folder(path: Path, kind: str, **options: Any) -> None:
    save(AutoModelForCausalLM.from_config(LLMS[kind]()).float(), path, **options)


def llava_folder(path: Path, name: str, **options: Any) -> None:
    tower, llm, keys = LLAVAS[name]
    kind = "LlavaNext" if name == "next" else "Llava"
    config = getattr(transformers, f"{kind}Config")(
        vision_config=TOWERS[tower](),
        text_config=LLMS[llm](),
        image_token_index=IMAGE_TOKEN,
        **keys,
    )
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    save(model, path, **options)
    if name == "next":
        transformers.LlavaNextImageProcessorPil(
            size={"shortest_edge": 28},
            crop_size={"height": 28, "width": 28},
            image_grid_pinpoints=NEXT_PINPOINTS,
        ).save_pretrained(path)
    else:
        write_json(path / "preprocessor_config.json", preprocessor(model.config.vision_config))


PICTURE = np.random.default_rng(0).integers(0, 255, (28, 28, 3), np.uint8)


class Ours:
    """Logits by the parameters, compiled once, and the parameters by their values."""

    def __init__(self, folder: Path, picture: bool):
        self.model, processor = converters.load(folder)
        ids = [1, 5, *([-200] if picture else []), 9, 7]
        self.batch = processor([PICTURE] if picture else [], input_ids=[ids])
        graph, state = nnx.split(self.model)
        flat, self.tree = jax.tree.flatten(state)
        self.leaves = [np.asarray(x) for x in flat]
        self.logits = jax.jit(lambda state: nnx.merge(graph, state)(self.batch))

    def __call__(self, leaves: list[np.ndarray]) -> np.ndarray:
        return np.asarray(self.logits(jax.tree.unflatten(self.tree, leaves)))[0]


def prints(array: np.ndarray) -> bytes:
    """The same for the same values in another order; a transposed kernel is its tensor."""
    return np.sort(np.asarray(array, np.float32), axis=None).tobytes()


def views(array: np.ndarray) -> Iterator[np.ndarray]:
    """A parameter, and what files hold apart of those that hold several experts."""
    yield array
    if array.ndim == 3 and len(array) == 3:
        for one in array:
            yield from (one, one[: len(one) // 2], one[len(one) // 2 :])


def find(arrays: list[np.ndarray]) -> dict[bytes, tuple[int, np.ndarray]]:
    """Values -> number of the parameter, and the part of it."""
    return {prints(part): (i, part) for i, x in enumerate(arrays) for part in views(x)}


def inputs_of(folder: Path, theirs: Any, picture: bool) -> dict[str, torch.Tensor]:
    """What their processor makes of the same picture and text."""
    if not picture:
        return {"input_ids": torch.tensor([[1, 5, 9, 7]])}
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    pixels = dict(processor(PICTURE, return_tensors="pt"))
    with torch.no_grad():
        (features,) = theirs.get_image_features(**pixels).pooler_output
    ids = [1, 5, *[IMAGE_TOKEN] * len(features), 9, 7]
    return {"input_ids": torch.tensor([ids]), **pixels}


def loaded(kind: Any, folder: Path) -> Any:
    """Their model, with no fault found."""
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def assert_every_tensor(folder: Path, kind: Any, picture: bool) -> None:
    theirs, ours = loaded(kind, folder), Ours(folder, picture)
    inputs = inputs_of(folder, theirs, picture)
    params = list(theirs.parameters())

    def reference() -> np.ndarray:
        with torch.no_grad():
            return theirs(**inputs).logits[0].numpy()

    expected, found = reference(), ours(ours.leaves)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found[: len(expected)], expected, rtol=0, atol=3e-5 * scale)
    places, named = find(ours.leaves), inspect(folder)
    known = find([p.detach().numpy() for p in params])
    rng = np.random.default_rng(1)
    changed = 0
    for name, tensor in load_file(folder / "model.safetensors").items():
        own = prints(tensor.numpy())
        other = rng.standard_normal(tensor.shape, np.float32)
        _, part = known[own]  # a view of the parameter
        before = part.copy()
        part[...] = other.reshape(part.shape)
        theirs_moves = bool((reference() != expected).any())
        part[...] = before
        if own not in places:
            assert name in named, name
            assert not theirs_moves, name
            continue
        number, part = places[own]
        leaves = list(ours.leaves)
        leaves[number] = leaves[number].copy()
        index = part.__array_interface__["data"][0]
        whole = ours.leaves[number]
        view = np.ndarray(part.shape, part.dtype, leaves[number], index - whole.ctypes.data)
        view[...] = rng.standard_normal(part.shape, np.float32)
        assert bool((ours(leaves) != found).any()) == theirs_moves, name
        changed += theirs_moves
    assert changed > 8


def assert_round_trip(folder: Path, kind: Any, out: Path) -> None:
    converters.export(converters.load(folder)[0], out)
    loaded(kind, out)
    before, after = (load_file(x / "model.safetensors") for x in (folder, out))
    assert before.keys() == after.keys()
    assert all(torch.equal(x, before[name]) for name, x in after.items())


@pytest.mark.parametrize("kind", LLMS)
def test_llms(tmp_path: Path, kind: str):
    llm_folder(tmp_path / "llm", kind)
    assert_every_tensor(tmp_path / "llm", AutoModelForCausalLM, picture=False)
    assert_round_trip(tmp_path / "llm", AutoModelForCausalLM, tmp_path / "out")


@pytest.mark.parametrize("name", LLAVAS)
def test_llavas(tmp_path: Path, name: str):
    llava_folder(tmp_path / "mllm", name)
    assert_every_tensor(tmp_path / "mllm", AutoModelForImageTextToText, picture=True)
    assert_round_trip(tmp_path / "mllm", AutoModelForImageTextToText, tmp_path / "out")


def test_experts_as_in_memory(tmp_path: Path):
    """Several in one tensor; written as the class writes them by default, with the same values."""
    llm_folder(tmp_path / "apart", "mixtral")
    llm_folder(tmp_path / "fused", "mixtral", save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(
        tmp_path / "fused" / "model.safetensors"
    )
    converters.export(converters.load(tmp_path / "fused")[0], tmp_path / "out")
    loaded(AutoModelForCausalLM, tmp_path / "out")
    before, after = (load_file(tmp_path / x / "model.safetensors") for x in ("apart", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(x, before[name]) for name, x in after.items())
    members = {"a": tmp_path / "apart", "b": tmp_path / "fused"}
    converters.fuse(members, tmp_path / "mean", method="linear", export="llm")
    found = load_file(tmp_path / "mean" / "model.safetensors")
    assert all(torch.equal(x, before[name]) for name, x in found.items())


HEADLESS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaModel(LLMS["llama"]()),
    "phi": lambda: transformers.PhiModel(LLMS["phi"]()),
    "llava": lambda: transformers.LlavaModel(
        transformers.LlavaConfig(
            vision_config=TOWERS["clip"](),
            text_config=LLMS["llama"](),
            image_token_index=IMAGE_TOKEN,
        )
    ),
}


@pytest.mark.parametrize("kind", HEADLESS)
def test_a_model_without_its_head(tmp_path: Path, kind: str):
    """Its hidden states are there, to read and to merge; logits are refused, not made up."""
    model = HEADLESS[kind]()
    save(model, tmp_path / "bare")
    if kind == "llava":
        write_json(
            tmp_path / "bare" / "preprocessor_config.json", preprocessor(model.config.vision_config)
        )
    ours, processor = converters.load(tmp_path / "bare")
    batch = processor([], input_ids=[[1, 5, 9, 7]])
    hidden, _ = ours.llm(*ours.embed(batch)[:2])
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[1, 5, 9, 7]])).last_hidden_state[0].numpy()
    np.testing.assert_allclose(hidden[0, :4], expected, rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="lm_head: found a language model without a head"):
        ours(batch)
    assert ", no head" in inspect(tmp_path / "bare")
    assert_round_trip(tmp_path / "bare", AutoModel, tmp_path / "out")
    if kind == "llama":
        members = dict.fromkeys("ab", tmp_path / "bare")
        converters.fuse(members, tmp_path / "mean", method="linear", export="llm")
        assert ", no head" in inspect(tmp_path / "mean")
        llm_folder(tmp_path / "whole", "llama")
        with pytest.raises(InputError, match="member 'a': lm_head.weight: found none"):
            converters.fuse(members, tmp_path / "no", base=tmp_path / "whole", export="llm")


VISION = {key: value for key, value in CLIP.items() if key != "layer_norm_eps"}
TEXT = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
TEXT |= {"intermediate_size": 48, "max_position_embeddings": 16}
WHOLE: dict[str, Callable[[], Any]] = {
    "clip": lambda: transformers.CLIPVisionModel(TOWERS["clip"]()),
    "siglip": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION)),
    "dinov2": lambda: transformers.Dinov2Model(TOWERS["dinov2-bare"]()),
    "registers": lambda: transformers.Dinov2WithRegistersModel(TOWERS["dinov2-registers"]()),
    "clip, text too": lambda: transformers.CLIPModel(
        transformers.CLIPConfig(vision_config=CLIP, text_config=TEXT, projection_dim=16)
    ),
    "siglip, text too": lambda: transformers.SiglipModel(
        transformers.SiglipConfig(vision_config=VISION, text_config=TEXT)
    ),
    "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**VISION, qkv_bias=False)),
    "dinov3": lambda: transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**VISION)),
    "classifier": lambda: transformers.Dinov2ForImageClassification(TOWERS["dinov2"]()),
}
"""Name -> what a tower's own folder may hold."""


@pytest.mark.parametrize("name", WHOLE)
def test_towers(tmp_path: Path, name: str):
    """A tower's folder beside an authors' checkpoint; what hangs on it comes back too."""
    tower = randomize(WHOLE[name](), 5)
    upstream_llava_folder(tmp_path / "mllm")
    own, out = (tmp_path / name / "vision_tower" for name in ("mllm", "out"))
    shutil.rmtree(own)
    tower.save_pretrained(own)
    config = getattr(tower.config, "vision_config", tower.config)
    write_json(own / "preprocessor_config.json", preprocessor(config))
    converters.export(converters.load(tmp_path / "mllm")[0], tmp_path / "out")
    loaded(type(tower), out)
    before, after = (load_file(x / "model.safetensors") for x in (own, out))
    assert before.keys() == after.keys()
    assert all(torch.equal(x, before[name]) for name, x in after.items())
    left = before.keys() - {
        n for n in before if re.search(r"embeddings|encoder|layer\.|norm", n) and "text" not in n
    }
    said = inspect(tmp_path / "mllm")
    assert all(re.sub(r"\b\d+\b", "*", name) in said or name in said for name in left)


def test_a_fusion_that_was_not_written_can_be_exported(tmp_path: Path):
    """Tensors that only some models have are there once."""
    for i in range(2):
        llava_folder(tmp_path / f"m{i}", "next")
    members = {name: tmp_path / f"m{i}" for i, name in enumerate("ab")}
    converters.fuse(members, tmp_path / "fused", method="linear")
    model, _ = converters.load_fused(members, method="linear")
    converters.export(model, tmp_path / "out")
    before, after = (load_file(tmp_path / x / "model.safetensors") for x in ("fused", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(x, before[name]) for name, x in after.items())


def test_what_was_left_in_a_file_that_is_gone(tmp_path: Path):
    llava_folder(tmp_path / "mllm", "siglip")
    model, _ = converters.load(tmp_path / "mllm")
    (tmp_path / "mllm" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"vision_tower\.head\..*found no such tensor any more"):
        converters.export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
