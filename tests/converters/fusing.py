"""What tests of fusions share."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import transformers
from safetensors.torch import load_file, save_file

import converters
from converters.files.reader import read_weights
from tests.checkpoints import (
    hf_llava_folder,
)
from vfjax import InputError

BF16 = np.dtype(ml_dtypes.bfloat16)


WEIGHTS = {"task_arithmetic": [0.5, 0.5], "linear": [1.0, 1.0]}


HF = ("language_model.model.", "model."), ("language_model.lm_head.", "lm_head.")
"""Prefixes of transformers' LLaVA, and of its LLM alone."""


def hf_member(path: Path, llm: transformers.LlamaForCausalLM, seed: int, **config: Any) -> None:
    """Transformers' LLaVA, in bfloat16, with a given LLM."""
    hf_llava_folder(path, seed, **config)
    tensors = load_file(path / "model.safetensors")
    for name, tensor in llm.state_dict().items():
        old, new = HF["lm_head" in name]
        tensors[name.replace(new, old, 1)] = tensor
    save_file({n: x.bfloat16().clone() for n, x in tensors.items()}, path / "model.safetensors")


def named(family: Path, names: str) -> dict[str, Path]:
    return {name: family / name for name in names.split()}


def llm_of(folder: Path) -> dict[str, np.ndarray]:
    """The LLM's tensors of any of these folders, under its own names."""
    out = {}
    for name, tensor in read_weights(folder).items():
        for old, new in HF:
            name = name.replace(old, new)
        if not re.match(r"branches|multi_modal|vision|model\.mm", name):
            out[name] = tensor[...]
    return out


def exact(base: np.ndarray, members: Sequence[np.ndarray], method: str) -> np.ndarray:
    """The method's formula in float64."""
    weights = WEIGHTS[method]
    wide = [x.astype(np.float64) for x in members]
    if method == "linear":
        return sum(w * x for w, x in zip(weights, wide, strict=True)) / sum(weights)
    start = base.astype(np.float64)
    return start + sum(w * (x - start) for w, x in zip(weights, wide, strict=True))


def steps(array: np.ndarray) -> np.ndarray:
    """Bfloat16 values counted from zero."""
    bits = array.view(np.int16).astype(np.int32)
    return np.where(bits < 0, -32768 - bits, bits)


def assert_merged(folder: Path, family: Path, names: str, method: str = "task_arithmetic") -> None:
    """Every value is the formula's, rounded once: the same bits, or next to them in 1 of 10,000."""
    base, found = llm_of(family / "base"), llm_of(folder)
    members = [llm_of(path) for path in named(family, names).values()]
    assert found.keys() == base.keys()
    other = total = 0
    for name, value in found.items():
        expected = exact(base[name], [m[name] for m in members], method).astype(BF16)
        assert (value.dtype, value.shape) == (BF16, expected.shape), name
        ulps = steps(value) - steps(expected)
        assert np.abs(ulps).max() <= 1, name
        other, total = other + np.count_nonzero(ulps), total + ulps.size
        assert all((value != m[name]).any() for m in (base, *members)), name
    assert other <= total / 10_000


def fuse_two(family: Path, out: Path) -> None:
    converters.fuse(
        named(family, "hf2 up3"),
        out,
        base=family / "base",
        params={"weights": WEIGHTS["task_arithmetic"]},
        template="chatml_direct",
    )


def refused(tmp_path: Path, members: Mapping[str, Path], **more: Any) -> str:
    """The line with which a fusion is refused; nothing is left of it."""
    out = tmp_path / "refused" / "out"
    out.parent.mkdir(exist_ok=True)
    with pytest.raises(InputError) as error:
        converters.fuse(members, out, **{"params": {"weights": [0.5] * len(members)}, **more})
    assert list(out.parent.iterdir()) == []
    assert "\n" not in str(error.value)
    return str(error.value)


PLAIN = {"method": "task_arithmetic", "params": {"weights": (0.5, 0.5)}, "export": "llm"}
