"""Modules as the libraries that quantise wrote them, and what they dequantise them to."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from converters.files.reader import DTYPES
from converters.quantised.folder import METHODS
from converters.values import Values
from tests.checkpoints import write_json
from vfjax.atomic import read_json
from vfjax.merge import LazyTensor

FILE = np.load(Path(__file__).resolve().parent / "data" / "quantised.npz")
"""See tests/peers/quantised.py."""

CASES = sorted({name.split("/")[0] for name in FILE if "/" in name})
NAMES = {dtype.name: dtype for dtype in DTYPES.values()}


def record(case: str) -> tuple[dict[str, Any], dict[str, np.ndarray], np.ndarray]:
    """quantization_config; the tensors of a module "x"; its weight, which a test compares."""
    dtypes = json.loads(str(FILE[f"{case}/dtypes"]))
    del dtypes["plain"]
    arrays = {}
    for leaf, name in dtypes.items():
        found, dtype = FILE[f"{case}/{leaf}"], NAMES[name]
        if found.dtype != dtype:
            found = found.view(dtype)
        arrays[f"x.{leaf}"] = found
    config = json.loads(str(FILE[f"{case}/config"]))
    return config, arrays, dequantised(case, config, arrays)[...]


def dequantised(case: str, config: dict, tensors: dict[str, np.ndarray]) -> LazyTensor:
    """The module's weight by vfjax."""
    values = Values(config, "config.json: quantization_config")
    dtype = NAMES[json.loads(str(FILE[f"{case}/dtype"]))]
    found = METHODS[config["quant_method"]](values, tensors, dtype)
    assert list(found) == ["x.weight"]
    return found["x.weight"]


def assert_as_the_library(case: str) -> None:
    """Bit for bit, in its dtype; rows alone too."""
    config, tensors, plain = record(case)
    found = dequantised(case, config, tensors)
    assert found.shape == (64, 96)
    assert found.dtype.name == json.loads(str(FILE[f"{case}/dtypes"]))["plain"]
    assert hashlib.sha256(plain.tobytes()).hexdigest() == str(FILE[f"{case}/plain"])
    for rows in (slice(0, 1), slice(17, 41), slice(63, 64), slice(5, 5)):
        assert found[rows].tobytes() == plain[rows].tobytes()


def pack(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Numbers of some bits, uint8[r, n], one behind the other in words: int32[r, n * bits / 32]."""
    each = np.unpackbits(numbers[..., None], axis=-1, count=bits, bitorder="little")
    return np.packbits(each.reshape(len(numbers), -1), axis=-1, bitorder="little").view(np.int32)


def pick(name: str) -> bool:
    """Whether a folder's tensor is quantised here: the matrices of an LLM's layers."""
    return name.endswith("_proj.weight") and ".layers." in name and "vision" not in name


def fp8_module(weight: np.ndarray, block: int = 16) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Leaves of a module in blocks, the last cut off; and its weight dequantised, float32."""
    rows, columns = (-(-size // block) for size in weight.shape)
    scales = np.random.default_rng(0).uniform(0.01, 0.02, (rows, columns)).astype(np.float32)
    wide = scales.repeat(block, 0).repeat(block, 1)[: weight.shape[0], : weight.shape[1]]
    stored = (weight / wide).astype(ml_dtypes.float8_e4m3fn)
    return {"weight": stored, "weight_scale_inv": scales}, stored.astype(np.float32) * wide


def gptq_module(weight: np.ndarray, group: int = 16) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The same of GPTQ's 4 bits, float16; zero points of 0 to 15."""
    out, count = weight.shape[0], weight.shape[1] // group
    rng = np.random.default_rng(1)
    scales = rng.uniform(0.05, 0.1, (count, out)).astype(np.float16)
    zeros = rng.integers(0, 16, (count, out), np.uint8)
    wide, points = scales.T.repeat(group, 1), zeros.T.repeat(group, 1)
    numbers = (np.round(weight / wide) + points).clip(0, 15).astype(np.uint8)
    leaves = {
        "qweight": pack(numbers, 4).T,
        "qzeros": pack((zeros - 1) & 15, 4),
        "scales": scales,
        "g_idx": np.arange(weight.shape[1], dtype=np.int32) // group,
    }
    values = (numbers.astype(np.float32) - points) * wide.astype(np.float32)
    return leaves, values.astype(np.float16)


KINDS_OF_FOLDERS = {
    "fp8": (fp8_module, {"quant_method": "fp8", "weight_block_size": [16, 16]}),
    "gptq": (gptq_module, {"quant_method": "gptq", "bits": 4, "group_size": 16}),
}


def quantise(like: Path, path: Path, kind: str) -> Path:
    """A copy of a folder whose LLM is quantised; beside it, `PATH-plain`, that with its values."""
    plain = path.with_name(f"{path.name}-plain")
    for place in (path, plain):
        shutil.copytree(like, place)
    make, settings = KINDS_OF_FOLDERS[kind]
    packed, values = load_file(like / "model.safetensors"), load_file(like / "model.safetensors")
    for name in filter(pick, list(values)):
        leaves, values[name] = make(packed.pop(name).astype(np.float32))
        packed |= {
            name.replace("weight", leaf): np.ascontiguousarray(x) for leaf, x in leaves.items()
        }
    save_file(packed, path / "model.safetensors")
    save_file(values, plain / "model.safetensors")
    config = read_json(path / "config.json") | {"dtype": "float32"}
    write_json(plain / "config.json", config)
    write_json(path / "config.json", config | {"quantization_config": settings})
    return path
