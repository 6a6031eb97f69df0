"""Fusing folders: values, names, order, and what transformers makes of the result."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import converters
from tests import checkpoints
from vfjax import forward

WEIGHTS = (0.5, 0.5)


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> dict[str, Path]:
    """A base in bfloat16 and members of it: two upstream LLaVAs, two of transformers."""
    root = tmp_path_factory.mktemp("family")
    paths = {name: root / name for name in ("base", "up1", "up2", "hf1", "hf2")}
    base = checkpoints.llama_folder(paths["base"], llm=checkpoints.make_llama(1).bfloat16())
    for seed, name in enumerate(("up1", "up2"), 2):
        llm = checkpoints.tuned(base, seed)
        checkpoints.upstream_llava_folder(paths[name], seed, llm=llm, weights="safetensors")
    for seed, name in enumerate(("hf1", "hf2"), 4):
        llava = checkpoints.hf_llava_folder(paths[name], seed).bfloat16()
        llm = checkpoints.tuned(base, seed)
        llava.model.language_model.load_state_dict(llm.model.state_dict())
        llava.lm_head.load_state_dict(llm.lm_head.state_dict())
        llava.save_pretrained(paths[name])
    return paths


def llm_of(folder: Path) -> dict[str, np.ndarray]:
    tensors = converters.open_source(folder).parts["llm"]
    return {name: tensor[...] for name, tensor in tensors.items()}


def ulps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Steps between bfloat16 values, counted through zero."""

    def order(x: np.ndarray) -> np.ndarray:
        bits = x.view(np.int16).astype(np.int32)
        return np.where(bits < 0, -32768 - bits, bits)

    return np.abs(order(a) - order(b))


def assert_closed_form(out: Path, base: Path | None, members: list[Path]) -> None:
    """Float64, rounded once to bfloat16: equal for 99.99 %, one unit in the last place else."""
    found, sources = llm_of(out), [llm_of(path) for path in members]
    start = llm_of(base) if base else None
    different = total = 0
    for name, value in found.items():
        terms = [w * s[name].astype(np.float64) for w, s in zip(WEIGHTS, sources, strict=True)]
        exact = sum(terms) / sum(WEIGHTS)
        if start is not None:
            origin = start[name].astype(np.float64)
            exact = origin + sum(t - w * origin for t, w in zip(terms, WEIGHTS, strict=True))
        apart = ulps(exact.astype(value.dtype), value)
        assert apart.max() <= 1, name
        different += int((apart > 0).sum())
        total += value.size
    assert different <= 1e-4 * total
    assert set(found) == set(sources[0])


PAIRS = {"upstream": ("up1", "up2"), "transformers": ("hf1", "hf2"), "mixed": ("up1", "hf2")}


@pytest.mark.parametrize("method", ["task_arithmetic", "linear"])
@pytest.mark.parametrize("pair", PAIRS)
def test_the_llm_opens_in_transformers(family, tmp_path: Path, pair: str, method: str):
    """Two transformers LLaVAs, alone and with a plain base, are where mergekit fails.

    It drops the whole LLM of the first kind and returns the base unchanged for the second, both
    with exit code 0.
    """
    members = {name: family[name] for name in PAIRS[pair]}
    base = family["base"] if method == "task_arithmetic" else None
    out = tmp_path / "llm"
    params = {"weights": list(WEIGHTS)}
    converters.fuse(members, out, base=base, method=method, params=params, export="llm")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    assert_closed_form(out, base, list(members.values()))
    origin = llm_of(family["base"])
    moved = [name for name, value in llm_of(out).items() if (value != origin[name]).any()]
    assert len(moved) == len(origin)
    assert transformers.AutoTokenizer.from_pretrained(out)("a").input_ids


def test_a_fused_folder_reads_all_branches(family, tmp_path: Path):
    out = tmp_path / "fused"
    members = {"b": family["up2"], "a": family["hf1"]}
    options = {"base": family["base"], "params": {"weights": list(WEIGHTS)}}
    source = converters.fuse(members, out, **options)
    assert [b["name"] for b in source.branches] == ["b", "a"]
    model, processor = converters.load(out, dtype="float32")
    picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    batch = processor([picture], input_ids=[[1, -200, 7]])
    tokens, _ = model.visual_tokens(batch.images)
    start = 0
    for name, path in members.items():
        alone, own = converters.load(path, dtype="float32")
        expected, _ = alone.visual_tokens(own([picture], input_ids=[[1, -200, 7]]).images)
        np.testing.assert_array_equal(tokens[start : start + len(expected)], expected, name)
        start += len(expected)
    assert start == len(tokens) == batch.mask.sum() - 2
    assert np.isfinite(forward(model, batch)[batch.mask]).all()

    recipe = json.loads((out / "config.json").read_text())["recipe"]
    assert recipe["method"] == "task_arithmetic" and list(recipe["sources"]) == ["base", "b", "a"]
    for name, path in {"base": family["base"], **members}.items():
        file = path / "model.safetensors"
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        assert recipe["sources"][name]["model.safetensors"] == digest


def test_the_same_bytes_twice(family, tmp_path: Path):
    options = {"base": family["base"], "params": {"weights": list(WEIGHTS)}}
    members = {name: family[name] for name in PAIRS["mixed"]}
    for name in ("first", "second"):
        converters.fuse(members, tmp_path / name, **options)
    first, second = (
        {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()}
        for name in ("first", "second")
    )
    assert first == second


def test_a_fused_member_keeps_its_branches(family, tmp_path: Path):
    options = {"base": family["base"], "params": {"weights": [0.5, 0.5]}}
    converters.fuse({n: family[n] for n in PAIRS["upstream"]}, tmp_path / "two", **options)
    members = {"pair": tmp_path / "two", "third": family["hf1"]}
    source = converters.fuse(members, tmp_path / "three", **options)
    assert [b["name"] for b in source.branches] == ["pair-up1", "pair-up2", "third"]
    model, processor = converters.load(tmp_path / "three")
    batch = processor([np.zeros((9, 9, 3), np.uint8)], input_ids=[[1, -200]])
    assert batch.mask.sum() == 1 + 3 * 16


def test_branches_are_copied_to_the_bit(family, tmp_path: Path):
    options = {"base": family["base"], "params": {"weights": list(WEIGHTS)}}
    converters.fuse({n: family[n] for n in PAIRS["mixed"]}, tmp_path / "out", **options)
    fused = load_file(tmp_path / "out" / "model.safetensors")
    for name in PAIRS["mixed"]:
        source = converters.open_source(family[name])
        for part, tensors in source.parts.items():
            if part == "llm":
                continue
            kind = part.split(".")[-1]
            for key in tensors:
                if (stored := f"branches.{name}.{kind}.{key}") in fused:
                    theirs = np.asarray(tensors[key][...])
                    ours = fused[stored]
                    assert tuple(ours.shape) == theirs.shape
                    assert ours.view(torch.uint8).numpy().tobytes() == theirs.tobytes(), stored
