"""PEFT's adapters on transformers' LLaVAs, whose tensors have several spellings."""

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import converters
from tests.adapters import lora_folder, peft_folder
from tests.checkpoints import (
    hf_llava_folder,
    llama_folder,
    llava_next_folder,
    published,
    write_json,
)
from vfjax.atomic import read_json

PICTURE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
IMAGE = 319

LLM = {"target_modules": ["q_proj", "k_proj", "down_proj"]}
EVERYWHERE = {
    "target_modules": ["v_proj", "up_proj", "fc1", "linear_1", "patch_embedding", "lm_head"],
    "modules_to_save": ["linear_2"],
}
PROJECTOR = {"modules_to_save": ["multi_modal_projector"]}

OLD = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)
"""Names of transformers 5 in memory -> of transformers before 4.52."""


def old(name: str) -> str:
    start, new = next(pair for pair in OLD if name.startswith(pair[0]))
    return new + name.removeprefix(start)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return hf_llava_folder(tmp_path_factory.mktemp("llava"), 1)


@pytest.fixture(scope="module")
def bases(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each spelling of the base."""
    folder = tmp_path_factory.mktemp("bases")
    for name in ("hub", "memory", "old"):
        hf_llava_folder(folder / name, 1)
    model.save_pretrained(folder / "memory", save_original_format=False)
    state = load_file(folder / "memory" / "model.safetensors")
    state = {old(name): x for name, x in state.items()}
    save_file(state, folder / "old" / "model.safetensors", {"format": "pt"})
    return folder


def assert_same(found: converters.source.Source, merged: Any, path: Path, base: Path) -> None:
    """The tensors of a folder are those of PEFT's merge, saved and read as a whole model."""
    shutil.copytree(base, path)
    merged.save_pretrained(path)
    expected = converters.open_source(path)
    assert found.parts.keys() == expected.parts.keys()
    for part, tensors in expected.parts.items():
        assert found.parts[part].keys() == tensors.keys()
        for name, x in tensors.items():
            np.testing.assert_allclose(found.parts[part][name][...], x[...], rtol=0, atol=2e-6)


@pytest.mark.parametrize("base", ["hub", "memory", "old"])
@pytest.mark.parametrize("keys", ["saved", "old"])
def test_spellings(model: Any, bases: Path, tmp_path: Path, base: str, keys: str):
    merged = lora_folder(tmp_path / "lora", model, 3, **EVERYWHERE)
    if keys == "old":
        file, start = tmp_path / "lora" / "adapter_model.safetensors", "base_model.model."
        state = {start + old(n.removeprefix(start)): x for n, x in load_file(file).items()}
        save_file(state, file)
    found = converters.open_source(tmp_path / "lora", base=bases / base)
    assert found.layout == "llava-hf"
    assert_same(found, merged, tmp_path / "merged", bases / "hub")


KINDS: dict[str, dict[str, Any]] = {
    "dora": {
        "use_dora": True,
        "target_modules": ["q_proj", "fc2", "linear_2", "patch_embedding", "embed_tokens"],
    },
    "biases": {"lora_bias": True, "bias": "all", "target_modules": ["fc1", "out_proj", "linear_1"]},
    "patterns": {
        "target_modules": r".*language_model.*(q|v)_proj",
        "rank_pattern": {"^model.language_model.layers.0.self_attn.q_proj": 2},
        "alpha_pattern": {"language_model.*v_proj": 1},
    },
    "tokens": {"trainable_token_indices": [IMAGE, 3]},
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds(model: Any, bases: Path, tmp_path: Path, name: str):
    merged = lora_folder(tmp_path / "lora", model, 3, **KINDS[name])
    found = converters.open_source(tmp_path / "lora", base=bases / "hub")
    assert_same(found, merged, tmp_path / "merged", bases / "hub")


def test_a_larger_vocabulary(model: Any, bases: Path, tmp_path: Path):
    """Written as a whole model, which transformers opens."""
    larger = copy.deepcopy(model)
    larger.resize_token_embeddings(330)
    merged = lora_folder(tmp_path / "lora", larger, 3, modules_to_save=["embed_tokens", "lm_head"])
    loaded, _ = converters.load(tmp_path / "lora", base=bases / "memory")
    converters.export(loaded, tmp_path / "out")
    opened, report = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    expected = merged.state_dict()
    assert opened.state_dict().keys() == expected.keys()
    for key, x in opened.state_dict().items():
        torch.testing.assert_close(x, expected[key], rtol=0, atol=2e-6)


def test_fusing_adapters(model: Any, bases: Path, tmp_path: Path):
    """Members on the LLaVA that their settings name, merged from its LLM."""
    state = {
        n.replace("language_model.", ""): x for n, x in published(model).items() if "lang" in n
    }
    text = transformers.LlamaForCausalLM(model.config.text_config)
    assert not any(text.load_state_dict(state, strict=False))
    llama_folder(tmp_path / "llm", llm=text)
    base, both = str(bases / "hub"), {"target_modules": ["q_proj", "linear_1"]}
    merged = [
        published(lora_folder(tmp_path / name, model, seed, base=base, use_dora=True, **both))
        for name, seed in (("one", 3), ("two", 4))
    ]
    members = {name: tmp_path / name for name in ("one", "two")}
    source = converters.fuse(members, tmp_path / "out", base=tmp_path / "llm")
    for name in state:
        mean = sum(one[f"language_model.{name}"].numpy() for one in merged) / 2
        np.testing.assert_allclose(source.parts["llm"][name][...], mean, rtol=0, atol=2e-6)
    for name, one in zip(members, merged, strict=True):
        found = source.parts[f"branches.{name}.connector"]["0.weight"][...]
        expected = one["multi_modal_projector.linear_1.weight"].numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


@torch.no_grad()
def test_a_tied_llava(tmp_path: Path):
    """Its head is adapted, its embedding is not."""
    base = tmp_path / "base"
    tie = {"tie_word_embeddings": True}
    tied = hf_llava_folder(base, 1, text=tie, **tie)
    assert not any("lm_head" in name for name in load_file(base / "model.safetensors"))
    adapted = peft_folder(tmp_path / "lora", tied, 3, target_modules=["lm_head", "q_proj"])
    found = converters.open_source(tmp_path / "lora", base=base).parts["llm"]
    head = adapted.base_model.model.lm_head(torch.eye(32)).T.numpy()
    np.testing.assert_allclose(found["lm_head.weight"][...], head, rtol=0, atol=2e-6)
    embedding = tied.get_input_embeddings().weight.numpy()
    np.testing.assert_array_equal(found["model.embed_tokens.weight"][...], embedding)


@torch.no_grad()
def reference(model: Any, pixels: np.ndarray, ids: list[int]) -> np.ndarray:
    x = torch.from_numpy(np.moveaxis(pixels, -1, 1).copy())
    tokens = model.get_image_features(x).pooler_output[0].shape[0]
    row = [one for i in ids for one in ([IMAGE] * tokens if i == -200 else [i])]
    return model(input_ids=torch.tensor([row]), pixel_values=x).logits[0].numpy()


@pytest.mark.parametrize("settings", [LLM, PROJECTOR], ids=["llm", "projector"])
def test_logits(model: Any, bases: Path, tmp_path: Path, settings: dict[str, Any]):
    merged = lora_folder(tmp_path / "lora", model, 3, **settings)
    ours_model, processor = converters.load(tmp_path / "lora", base=bases / "memory")
    ids = [1, 7, -200, 31]
    batch = processor([PICTURE], input_ids=[ids])
    ours = np.asarray(ours_model(batch))[0, : int(batch.mask[0].sum())]
    theirs = reference(merged, np.asarray(batch.images["clip"].given.pixels)[:1], ids)
    before = reference(model, np.asarray(batch.images["clip"].given.pixels)[:1], ids)
    assert np.abs(ours - theirs).max() <= 2e-5 * np.abs(theirs).max()
    assert np.abs(ours - before).max() >= 1e-2 * np.abs(theirs).max()


def test_llava_next(tmp_path: Path):
    model: transformers.LlavaNextForConditionalGeneration
    model = llava_next_folder(tmp_path / "base", 2)
    merged = lora_folder(tmp_path / "lora", model, 3, **EVERYWHERE)
    found = converters.open_source(tmp_path / "lora", base=tmp_path / "base")
    assert found.layout == "llava-next-hf"
    assert_same(found, merged, tmp_path / "merged", tmp_path / "base")


def test_a_folder_with_the_config_of_its_base(model: Any, bases: Path, tmp_path: Path):
    """Trainers write config.json beside the adapter, and no preprocessor; PEFT does not read it."""
    merged = lora_folder(tmp_path / "lora", model, 3)
    config = read_json(bases / "hub" / "config.json")
    write_json(tmp_path / "lora" / "config.json", config | {"quantization_config": {"bits": 4}})
    found = converters.open_source(tmp_path / "lora", base=bases / "hub")
    assert_same(found, merged, tmp_path / "merged", bases / "hub")
