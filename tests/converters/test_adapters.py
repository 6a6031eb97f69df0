"""LoRA adapters and bare projectors on a base, against PEFT's own merge."""

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import converters
from converters.files.reader import read_weights
from converters.fingerprint import fingerprint, sampled
from converters.inspect import inspect
from converters.lora import LoRATensor
from tests.adapters import llava_lora_folder, lora_folder, peft_folder, projector_folder
from tests.checkpoints import (
    llama_folder,
    make_llama,
    published,
    reference_logits,
    tokenizer_files,
    tuned,
    upstream_llava_folder,
    write_json,
)
from vfjax import InputError
from vfjax.atomic import read_json

BASE = "someone/base"
PICTURE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def llm() -> nn.Module:
    return make_llama(1)


@pytest.fixture(scope="module")
def base(llm: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base"
    llama_folder(path, llm=llm)
    return path


def assert_tensors(found: Mapping[str, Any], expected: nn.Module) -> None:
    state = published(expected)
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_allclose(found[name][...], tensor.numpy(), rtol=0, atol=1e-6)


def test_logits_of_an_adapter(llm: nn.Module, base: Path, tmp_path: Path):
    merged = lora_folder(tmp_path / "lora", llm, 3)
    model, processor = converters.load(tmp_path / "lora", base=base)
    ids = [1, 7, 200, 31]
    ours = np.asarray(model(processor(None, input_ids=[ids])))[0, : len(ids)]
    theirs = merged(torch.tensor([ids])).logits[0].detach().numpy()
    assert np.abs(ours - theirs).max() <= 2e-5 * np.abs(theirs).max()


def test_what_the_base_says_of_answers(llm: nn.Module, base: Path, tmp_path: Path):
    """Stops and penalties, with a tokenizer beside the adapter too, as transformers takes them."""
    below, lora = shutil.copytree(base, tmp_path / "base"), tmp_path / "lora"
    settings = {"eos_token_id": [2, 9], "repetition_penalty": 1.3}
    write_json(below / "generation_config.json", settings)
    lora_folder(lora, llm, 3, base=str(below))
    tokenizer_files(lora)
    write_json(lora / "generation_config.json", {"eos_token_id": 7})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(lora).generation_config
    facts = fingerprint(converters.open_source(lora))
    assert facts["generation_config.json"] == sampled(below / "generation_config.json")
    model, processor = converters.load(lora)
    assert list(processor.stop_ids) == theirs.eos_token_id == [2, 9]
    assert processor.settings.repetition_penalty == theirs.repetition_penalty == 1.3
    converters.export(model, tmp_path / "out")
    members = {"a": lora, "b": below}
    converters.fuse(members, tmp_path / "fused", method="linear", export="llm")
    for name in ("out", "fused"):
        assert read_json(tmp_path / name / "generation_config.json") == settings, name
    (below / "generation_config.json").unlink()
    write_json(below / "config.json", {**read_json(below / "config.json"), "eos_token_id": [2, 8]})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(lora).generation_config
    assert list(converters.load(lora)[1].stop_ids) == theirs.eos_token_id == [2, 8]


def test_one_rounding(tmp_path: Path):
    """bfloat16: the float64 formula, rounded; whole, and by rows."""
    rng = np.random.default_rng(5)
    weight, a, b = (
        rng.normal(size=shape).astype(ml_dtypes.bfloat16) for shape in ((64, 48), (8, 48), (64, 8))
    )
    tensor = LoRATensor(weight, a, b, 0.25)
    wide = [x.astype(np.float64) for x in (weight, a, b)]
    expected = (wide[0] + 0.25 * wide[2] @ wide[1]).astype(ml_dtypes.bfloat16)
    assert (tensor.shape, tensor.dtype) == (expected.shape, expected.dtype)
    whole = tensor[...]
    assert np.count_nonzero(whole != expected) <= 3
    assert np.count_nonzero(tensor[10:20] != expected[10:20]) <= 1
    assert np.count_nonzero(expected != weight) > 2000


def logits(folder: Path, **options: Any) -> tuple[np.ndarray, list[int], np.ndarray]:
    """Ours for a prompt with one picture, the prompt, and the picture's pixels."""
    ids = [1, 7, -200, 31]
    model, processor = converters.load(folder, **options)
    batch = processor([PICTURE], input_ids=[ids])
    ours = np.asarray(model(batch))[0, : int(batch.mask[0].sum())]
    return ours, ids, np.asarray(batch.images["clip"].given.pixels)


def assert_speaks(folder: Path, member: Any, **options: Any) -> None:
    ours, ids, pixels = logits(folder, **options)
    entry = {"taps": [-2], "drop": 1}
    branch = {"clip": (member.tower, member.connector, entry)}
    theirs = reference_logits(member.llm, branch, ids, {"clip": pixels[:1]})
    assert np.abs(ours - theirs).max() <= 2e-5 * np.abs(theirs).max()


@pytest.mark.parametrize("names", ["saved", "default"])
def test_an_adapter_of_llava(llm: nn.Module, base: Path, tmp_path: Path, names: str):
    """As PEFT saves them, and a state dict as it is in memory, in a .bin."""
    folder = tmp_path / "lora"
    member = llava_lora_folder(folder, llm, 3)
    if names == "default":
        state = load_file(folder / "adapter_model.safetensors")
        (folder / "adapter_model.safetensors").unlink()
        state = {n.replace(".weight", ".default.weight"): x for n, x in state.items()}
        torch.save(state, folder / "adapter_model.bin")
    assert_speaks(folder, member, base=base)
    source = converters.open_source(folder, base=base)
    assert (source.layout, source.base) == ("llava", base)
    assert_tensors(source.parts["llm"], member.llm)
    end = "bin" if names == "default" else "safetensors"
    assert set(source.weight_files()) == {
        "base/model.safetensors",
        f"adapter_model.{end}",
        "non_lora_trainables.bin",
        "branches.clip.encoder/model.safetensors",
    }


def test_an_adapter_of_a_llava(llm: nn.Module, tmp_path: Path):
    """finetune_task_lora: the base is a LLaVA, whose projector was trained on."""
    upstream_llava_folder(tmp_path / "base", 8, llm=llm)
    member = llava_lora_folder(tmp_path / "lora", llm, 3)
    assert_speaks(tmp_path / "lora", member, base=tmp_path / "base")


@pytest.mark.parametrize("weights", ["bin", "safetensors"])
def test_a_projector(llm: nn.Module, base: Path, tmp_path: Path, weights: str):
    folder = tmp_path / "projector"
    member = projector_folder(folder, llm, 4, image_aspect_ratio="square")
    if weights == "safetensors":
        state = torch.load(folder / "mm_projector.bin", weights_only=True)
        (folder / "mm_projector.bin").unlink()
        save_file(state, folder / "mm_projector.safetensors")
    assert_speaks(folder, member, base=base)
    _, processor = converters.load(folder, base=base)
    assert processor.tokenizer("ab")["input_ids"][0] == 1  # the base's


def test_a_projector_with_a_newline(llm: nn.Module, base: Path, tmp_path: Path):
    projector_folder(
        tmp_path,
        llm,
        image_aspect_ratio="anyres",
        mm_patch_merge_type="spatial_unpad",
        image_grid_pinpoints=[[28, 56]],
    )
    state = torch.load(tmp_path / "mm_projector.bin", weights_only=True)
    state["model.image_newline"] = torch.arange(32.0)
    torch.save(state, tmp_path / "mm_projector.bin")
    model, _ = converters.load(tmp_path, base=base)
    np.testing.assert_array_equal(model.branches["clip"].connector.newline, np.arange(32.0))


@pytest.mark.parametrize("place", ["mapped", "nested", "sibling", "cache"])
def test_where_a_base_is_found(
    llm: nn.Module, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
):
    """Where towers are, in that order; a base in each of the later places shows which is first."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    projector_folder(tmp_path / "projector", llm, _name_or_path=BASE)
    repository = tmp_path / "cache" / "models--someone--base"
    places = {
        "mapped": tmp_path / "elsewhere",
        "nested": tmp_path / "projector" / BASE,
        "sibling": tmp_path / "base",
        "cache": repository / "snapshots" / "0123abc",
    }
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abc")
    for key in list(places)[list(places).index(place) :]:
        shutil.copytree(base, places[key])
    towers = {BASE: places["mapped"]} if place == "mapped" else None
    source = converters.open_source(tmp_path / "projector", towers=towers)
    assert source.base.absolute() == places[place]


def test_an_adapter_exports_as_a_whole_model(llm: nn.Module, base: Path, tmp_path: Path):
    llava_lora_folder(tmp_path / "lora", llm, 3)
    model, _ = converters.load(tmp_path / "lora", base=base)
    converters.export(model, tmp_path / "out")
    assert "model.mm_projector.0.weight" in read_weights(tmp_path / "out")
    np.testing.assert_array_equal(
        logits(tmp_path / "out")[0], logits(tmp_path / "lora", base=base)[0]
    )


def test_fusing_adapters(llm: nn.Module, base: Path, tmp_path: Path):
    """The base of the fusion completes a member whose own is not found, but takes no other's place:
    `two` was trained on another LLM, which lies beside it.
    """
    other = tuned(llm, 6)
    llama_folder(tmp_path / "other", llm=other)
    merged = [
        llava_lora_folder(tmp_path / "one", llm, 3).llm,
        llava_lora_folder(tmp_path / "two", other, 4, base="someone/other").llm,
    ]
    members = {name: tmp_path / name for name in ("one", "two")}
    out = tmp_path / "out"
    source = converters.fuse(members, out, base=base, params={"weights": [0.5, 0.5]})
    state = copy.deepcopy(llm).state_dict()
    for name, tensor in state.items():
        deltas = [m.state_dict()[name] - tensor for m in merged]
        expected = tensor + 0.5 * deltas[0] + 0.5 * deltas[1]
        np.testing.assert_allclose(source.parts["llm"][name][...], expected, rtol=0, atol=1e-6)
    recipe = read_json(out / "config.json")["recipe"]["sources"]
    assert "base/model.safetensors" in recipe["one"]
    assert recipe["two"]["base/model.safetensors"] != recipe["one"]["base/model.safetensors"]
    model, processor = converters.load(out)
    assert model(processor([Image.fromarray(PICTURE)], input_ids=[[1, -200]])).shape[0] == 1


@torch.no_grad()
def test_a_head_beside_a_tied_embedding(tmp_path: Path):
    """Loaded, written as a whole model, which transformers opens untied, and fused."""
    llama_folder(tmp_path / "base", 1, tie_word_embeddings=True)
    tied = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    one = peft_folder(tmp_path / "one", tied, 3, modules_to_save=["lm_head"], use_dora=True)
    two = peft_folder(tmp_path / "two", tied, 4, target_modules=["q_proj", "embed_tokens"])
    model, processor = converters.load(tmp_path / "one", base=tmp_path / "base")
    ids = [1, 7, 200, 31]
    expected = one(torch.tensor([ids])).logits[0].numpy()
    ours = np.asarray(model(processor(None, input_ids=[ids])))[0, : len(ids)]
    assert np.abs(ours - expected).max() <= 2e-5 * np.abs(expected).max()
    converters.export(model, tmp_path / "out")
    whole, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert np.abs(whole(torch.tensor([ids])).logits[0].numpy() - expected).max() <= 1e-4
    recipe = {
        "merge_method": "linear",
        "models": [
            {"model": f"{tmp_path / 'base'}+{tmp_path / name}", "parameters": {"weight": 1.0}}
            for name in ("one", "two")
        ],
    }
    (tmp_path / "recipe.yml").write_text(json.dumps(recipe))
    options = {"recipe": tmp_path / "recipe.yml", "export": "llm"}
    found = converters.fuse({}, tmp_path / "fused", **options).parts["llm"]
    heads = [one.base_model.model.lm_head.weight, tied.lm_head.weight]
    inner = two.base_model.model.model.embed_tokens(torch.arange(320))
    for name, tensors in {
        "lm_head.weight": heads,
        "model.embed_tokens.weight": [tied.lm_head.weight, inner],
    }.items():
        mean = torch.stack(tensors).mean(dim=0).numpy()
        np.testing.assert_allclose(found[name][...], mean, rtol=0, atol=1e-6)


def test_inspect_of_an_adapter(llm: nn.Module, base: Path, tmp_path: Path):
    lora_folder(tmp_path / "lora", llm, use_dora=True)
    text = inspect(tmp_path / "lora", base)
    assert "adapter: DoRA of rank 4, 6 tensors of the base updated" in text
    assert f"base: {base}" in text


def line(path: Path, **options: Any) -> str:
    """The line with which a folder is refused."""
    with pytest.raises(InputError) as error:
        converters.open_source(path, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_adapters_of_another_base(llm: nn.Module, base: Path, tmp_path: Path):
    file = f"{tmp_path}/lora/adapter_model.safetensors: base_model.model."
    for config, name, found in (
        ({"intermediate_size": 64}, "layers.0.mlp.down_proj.", "found a product of (32, 4) and (4"),
        ({"num_hidden_layers": 3}, "layers.2.mlp.down_proj.", "found a module that the base lacks"),
    ):
        lora_folder(tmp_path / "lora", make_llama(0, **config))
        assert line(tmp_path / "lora", base=base).startswith(f"{file}model.{name}lora_A.weight: ")
        assert found in line(tmp_path / "lora", base=base)
    lora_folder(tmp_path / "lora", make_llama(0, vocab_size=330), modules_to_save=["lm_head"])
    assert line(tmp_path / "lora", base=base).startswith(
        f"{tmp_path}/lora: lm_head.weight: found 330 rows, and 320 of model.embed_tokens.weight, "
    )


@pytest.mark.parametrize("make", [llava_lora_folder, projector_folder])
def test_configs_of_another_base(base: Path, tmp_path: Path, make: Any):
    make(tmp_path, make_llama(0, vocab_size=330))
    assert line(tmp_path, base=base).startswith(
        f"{tmp_path}/config.json: vocab_size: found vocabulary of 330 rows, {base} has 320"
    )


def test_bases_that_are_not_there(llm: nn.Module, base: Path, tmp_path: Path):
    folder = tmp_path / "lora"
    llava_lora_folder(folder, llm)
    assert line(folder) == (
        f"{folder}: base model 'someone/base': found a LoRA adapter without it, "
        "expected a whole checkpoint in one of: "
        f"{folder}/base, someone/base, {folder}/someone/base, {tmp_path}/base, the hub "
        "(no folder, and nothing of it in the hub's cache, with HF_HUB_OFFLINE set); put it there, "
        "or pass base=FOLDER, or towers={'someone/base': FOLDER}"
    )
    assert "found no folder nowhere" in line(folder, base="nowhere")
    projector_folder(tmp_path / "projector", llm)
    assert line(tmp_path / "projector") == (
        f"{tmp_path}/projector: base model '': found a projector without it, expected its folder; "
        "pass base=FOLDER"
    )


def test_half_an_adapter(llm: nn.Module, base: Path, tmp_path: Path):
    lora_folder(tmp_path, llm)
    state = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"
    save_file({n: x for n, x in state.items() if n != name}, tmp_path / "adapter_model.safetensors")
    assert "k_proj.lora_A.weight: found one factor" in line(tmp_path, base=base)
    (tmp_path / "adapter_model.safetensors").unlink()
    assert "found no weights, expected adapter_model.safetensors or" in line(tmp_path, base=base)
    shutil.copy(base / "model.safetensors", tmp_path)
    assert "adapter_config.json and the weights of a whole model" in line(tmp_path, base=base)


def test_a_complete_folder_does_not_read_the_base(base: Path, tmp_path: Path):
    assert converters.open_source(base, base=tmp_path).path == base
