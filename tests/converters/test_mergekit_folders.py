"""YAMLs of whole folders through `fuse`, beside what mergekit 0.1.5 made of them.

tests/peers/mergekit_folders.py recorded its results, and makes the folders.
"""

import json
import os
import runpy
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

import converters
from converters.files.reader import read_weights
from tests.checkpoints import hf_llava_folder, published
from vfjax import InputError
from vfjax.atomic import read_json

TESTS = Path(__file__).resolve().parents[1]
RECORD = np.load(TESTS / "data" / "mergekit_folders.npz")
CASES = json.loads(str(RECORD["cases"]))
PEER = runpy.run_path(str(TESTS / "peers" / "mergekit_folders.py"))
KINDS = {"F32": np.float32, "BF16": ml_dtypes.bfloat16}
HEAD = PEER["HEAD"]
RANDOM = {"dare_ties", "dare_linear", "della", "della_linear"}
"""Compared by what each weight can be, and by how many are kept."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")

    def save(found: dict[str, np.ndarray], kind: str, file: str) -> None:
        save_file({k: x.astype(KINDS[kind]) for k, x in found.items()}, file, {"format": "pt"})

    PEER["write"](root, save)
    return root


def fused(models: Path, out: Path, text: str, **options: Any) -> dict[str, np.ndarray]:
    """Tensors of the folder that a YAML makes."""
    file = out.parent / f"{out.name}.yml"
    file.write_text(text)
    here = Path.cwd()
    os.chdir(models)
    try:
        options = {"export": "llm", "account": False, **options}
        converters.fuse({}, out, recipe=file, **options)
    finally:
        os.chdir(here)
    return {name: tensor[...] for name, tensor in read_weights(out).items()}


def recorded(case: str) -> dict[str, np.ndarray]:
    """Tensor -> what mergekit made."""
    found = {}
    for key in RECORD.files:
        if key.startswith(f"{case}/"):
            x = RECORD[key]
            found[key.split("/")[1]] = x.view(ml_dtypes.bfloat16) if x.dtype == np.uint16 else x
    return found


def near(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Equal but for the rounding of float32."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    ours, theirs = ours.astype(np.float32), theirs.astype(np.float32)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6)


EQUAL = [x for x in CASES if x not in RANDOM | {"bf16"} and "error" not in CASES[x]]


@pytest.mark.filterwarnings("ignore:.*the method does not read")
@pytest.mark.parametrize("case", EQUAL)
def test_tensors(models: Path, tmp_path: Path, case: str):
    """The same names, and the same values."""
    known = CASES[case]
    found, theirs = fused(models, tmp_path / "out", known["yaml"]), recorded(case)
    assert sorted(found) == known["names"] and theirs
    for name, value in theirs.items():
        near(found[name], value)
    config = read_json(tmp_path / "out" / "config.json")
    for key in ("num_hidden_layers", "vocab_size"):
        assert config[key] == known["config"][key]
    # mergekit leaves a base's `true` beside a head of its own, which transformers reads as ours.
    assert config.get("tie_word_embeddings", False) == (HEAD not in found)


def test_bfloat16(models: Path, tmp_path: Path):
    """Mergekit rounds each step to bfloat16, and we the result alone."""
    found = fused(models, tmp_path / "out", CASES["bf16"]["yaml"])
    for name, theirs in recorded("bf16").items():
        exact = sum(PEER["tensors"](x)[name].astype(np.float64) for x in "ab") / 2
        np.testing.assert_array_equal(found[name], exact.astype(ml_dtypes.bfloat16))
        assert np.abs(theirs - exact).max() >= np.abs(found[name] - exact).max()


WEIGHTS = {"a": 0.6, "b": 0.4}
UNITS = {"della": (0.5, 0.5)}
"""What a lone delta is multiplied by, before its sum is restored: its weight; in `della`, which
divides by the weights of those that agree, its `lambda`."""


@pytest.mark.parametrize("case", sorted(RANDOM))
def test_random_masks(models: Path, tmp_path: Path, case: str):
    """Each weight of a matrix, ours and mergekit's, is what a random mask can give.

    That is the base plus the weighted deltas of none, one or both members, of both only if they
    agree where signs are elected, and each times one number, which restores the sum of the delta's
    absolute values (`dare_linear` was told not to). As many are kept as there.
    """
    elects, units = case in ("dare_ties", "della"), UNITS.get(case, tuple(WEIGHTS.values()))
    found = fused(models, tmp_path / "out", CASES[case]["yaml"])
    base, *members = (PEER["tensors"](x) for x in ("base", *WEIGHTS))
    shares: dict[str, list[float]] = {"ours": [], "theirs": []}
    for name, theirs in recorded(case).items():
        if theirs.ndim == 1:  # too few elements to tell the number from
            continue
        deltas = [x[name] - base[name] for x in members]
        for who, made in (("ours", found[name]), ("theirs", theirs)):
            moved = made - base[name]
            factors = units if case == "dare_linear" else [factor(moved, d) for d in deltas]
            one, other = (x * d for x, d in zip(factors, deltas, strict=True))
            both = WEIGHTS["a"] * one + WEIGHTS["b"] * other if case == "della" else one + other
            agree = (one * other > 0) | (not elects)
            kept = [np.abs(moved - x) < 1e-6 for x in (0 * moved, one, other, both)]
            kept[3] &= agree
            assert np.logical_or.reduce(kept).all()
            shares[who].append(1 - np.mean(kept[0]))
            for i in range(2) if case != "dare_linear" else ():
                size, surely = np.abs(deltas[i]), kept[1 + i] | kept[3]
                maybe = surely | (kept[2 - i] & ~agree)  # or it lost the vote
                restored = [size.sum() / size[mask].sum() for mask in (maybe, surely)]
                assert restored[0] - 1e-3 <= factors[i] / units[i] <= restored[1] + 1e-3
    assert abs(np.mean(shares["ours"]) - np.mean(shares["theirs"])) < 0.12


def factor(moved: np.ndarray, delta: np.ndarray) -> float:
    """The number that most elements of a delta are multiplied by."""
    ratios = (moved / delta)[(np.abs(delta) > 0.005) & (np.abs(moved) > 1e-7)]
    return float(max(ratios, key=lambda x: np.sum(np.abs(moved - x * delta) < 1e-7)))


@pytest.fixture(scope="module")
def vlms(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaVAs of transformers of the same LLMs, under the same names."""
    root = tmp_path_factory.mktemp("vlms")
    for seed, label in enumerate(("base", "a", "b", "c")):
        text = {key: PEER["config"](label)[key] for key in SIZES}
        vlm = hf_llava_folder(root / label, seed, text=text, image_token_index=19)
        tensors = published(vlm) | {
            f"language_model.{name}": torch.from_numpy(x)
            for name, x in PEER["tensors"](label).items()
        }
        save_torch(tensors, root / label / "model.safetensors", {"format": "pt"})
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(models / label / name, root / label / name)
    return root


SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES += ("num_key_value_heads", "vocab_size")
VLMS = ("linear", "slerp", "nuslerp_base_rows", "task_arithmetic", "breadcrumbs", "ties")
VLMS += ("model_stock", "model_stock_rows", "stack", "modules")


@pytest.mark.filterwarnings("ignore:.*the method does not read")
@pytest.mark.parametrize("case", VLMS)
def test_llms_of_mllms(vlms: Path, tmp_path: Path, case: str):
    """A YAML of MLLMs gives what mergekit makes of their LLMs alone; of MLLMs it merges no LLM."""
    found = fused(vlms, tmp_path / "out", CASES[case]["yaml"])
    assert sorted(found) == CASES[case]["names"]
    for name, value in recorded(case).items():
        near(found[name], value)


@pytest.mark.parametrize(
    ("source", "base", "owner"),
    [
        ("a", None, "a"),
        ("union", None, "a"),
        ("other", None, "other"),
        ("union", "other", "other"),
        ("base", "other", "other"),
        ("a", "other", "a"),
    ],
)
def test_class_of_a_made_tokenizer(
    vlms: Path, tmp_path: Path, source: str, base: str | None, owner: str
):
    """A made tokenizer is read as the folder's that it was made of, the first member's or not."""
    for name in ("a", "other"):
        shutil.copytree(vlms / ("a" if name == "a" else "b"), tmp_path / name)
    config = read_json(tmp_path / "other" / "config.json")
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    models = [{"model": name, "parameters": {"weight": 1}} for name in ("a", "other")]
    recipe = {"merge_method": "linear", "tokenizer_source": source, "models": models}
    recipe |= {"base_model": base} if base else {}
    fused(tmp_path, tmp_path / "out", json.dumps(recipe), export="model", template="vicuna_v1")
    classes = {name: converters.open_source(tmp_path / name).tokenizer for name in ("a", "other")}
    assert classes["a"] != classes["other"]
    assert read_json(tmp_path / "out" / "config.json")["tokenizer"] == classes[owner]


def test_what_both_refuse(models: Path, tmp_path: Path):
    (case,) = (x for x in CASES if "error" in CASES[x])
    assert "density +/- epsilon" in CASES[case]["error"]
    with pytest.raises(InputError, match="found 1.35 with density 0.66, expected density - eps"):
        fused(models, tmp_path / "out", CASES[case]["yaml"])


@pytest.mark.parametrize("kind", ["gpt2", "granite"])
def test_llms_that_are_not_read(models: Path, tmp_path: Path, kind: str):
    shutil.copytree(models / "a", tmp_path / "x")
    (tmp_path / "x" / "config.json").write_text(json.dumps({"model_type": kind}))
    text = "{merge_method: passthrough, models: [{model: x}]}"
    with pytest.raises(InputError, match=f"config.json: found model_type '{kind}', expected one"):
        fused(tmp_path, tmp_path / "out", text)
