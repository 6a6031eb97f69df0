import copy
from typing import Any

import numpy as np
import pytest

from tests.quantised import CASES, assert_as_the_library, dequantised, record
from vfjax import InputError


@pytest.mark.parametrize("case", [x for x in CASES if x.startswith("ct")])
def test_as_the_library(case: str):
    assert_as_the_library(case)


def numbers_of(tensors: dict[str, np.ndarray], bits: int) -> np.ndarray:
    """The packed numbers of a module of 64 x 96."""
    raw = tensors["x.weight_packed"].view(np.uint8)
    each = np.unpackbits(raw, axis=-1, bitorder="little").reshape(64, 96, bits)
    return np.packbits(each, axis=-1, bitorder="little")[..., 0]


def test_words_of_whole_numbers():
    """Before 0.13 no number stood in two words, and files do not say which it is."""
    config, tensors, plain = record("ct-int3")
    numbers = np.pad(numbers_of(tensors, 3).astype(np.uint32), ((0, 0), (0, 4)))
    words = numbers.reshape(64, 10, 10) << (3 * np.arange(10, dtype=np.uint32))
    own = tensors | {"x.weight_packed": words.sum(-1, dtype=np.uint32).view(np.int32)}
    assert dequantised("ct-int3", config, own)[...].tobytes() == plain.tobytes()


def test_groups_in_another_order():
    """weight_g_idx, of versions that had it."""
    config, tensors, plain = record("ct-int4")
    order = np.random.default_rng(0).permutation(96)
    index = (np.arange(96) // 32)[order].astype(np.int32)
    packed = np.ascontiguousarray(numbers_of(tensors, 4)[:, order])
    own = tensors | {"x.weight_g_idx": index}
    own["x.weight_packed"] = (packed[:, ::2] | packed[:, 1::2] << 4).view(np.int32)
    np.testing.assert_array_equal(dequantised("ct-int4", config, own)[...], plain[:, order])


def test_zero_points_that_are_not_packed():
    config, tensors, plain = record("ct-int4-asym")
    words = np.ascontiguousarray(tensors["x.weight_zero_point"].T).view(np.uint8)
    points = np.stack([words & 15, words >> 4], -1).reshape(3, 64).T.astype(np.int8) - 8
    own = tensors | {"x.weight_zero_point": points}
    assert dequantised("ct-int4-asym", config, own)[...].tobytes() == plain.tobytes()


def test_activations_are_not_read():
    config, tensors, plain = record("ct-fp8-tensor")
    own = tensors | {"x.input_scale": tensors["x.weight_scale"]}
    assert dequantised("ct-fp8-tensor", config, own)[...].tobytes() == plain.tobytes()


def changed(config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with another value at a place ("a/b/c")."""
    out = copy.deepcopy(config)
    part, *keys = out, *path.split("/")
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    return out


GROUP = "config_groups/group_0"


@pytest.mark.parametrize(
    ("case", "path", "value", "line"),
    [
        ("ct-int4", f"{GROUP}/format", "marlin-24", "format: found 'marlin-24'"),
        ("ct-int4", f"{GROUP}/weights/num_bits", 9, "num_bits: found 9"),
        ("ct-int4", f"{GROUP}/weights/num_bits", 8, r"found shape \(64, 12\), expected \(64, 24\)"),
        ("ct-int4", f"{GROUP}/weights/group_size", 48, r"shape \(64, 3\), expected \(64, 2\)"),
        ("ct-int4", f"{GROUP}/weights/type", "float", "num_bits: found 4, expected what pack"),
        ("ct-int4", f"{GROUP}/weights/dynamic", True, "dynamic: found True"),
        ("ct-int4", f"{GROUP}/weights/unheard", 1, "unheard: found 1"),
        ("ct-int4", f"{GROUP}/weights/symmetric", False, "weight_zero_point: found no tensor"),
        ("ct-int4-asym", f"{GROUP}/weights/symmetric", True, "zero_point: found a tensor"),
        ("ct-int4", f"{GROUP}/targets", ["re:y.*"], "expected one that config_groups names"),
        ("ct-int4", "ignore", ["re:x"], "ignore has 're:x'"),
        ("ct-int4", "ignore", ["re:("], "expected regular expressions"),
        ("ct-int4", "transform_config", {"u": 1}, "transform_config: found"),
        ("ct-int4", "sparsity_config", {"format": "x"}, "sparsity_config: found"),
        ("ct-int4", "config_groups", {"W4A16": ["Linear"]}, "W4A16: found"),
        ("ct-fp8-block", f"{GROUP}/weights/block_structure", [64, 32], r"expected \(1, 3\)"),
        ("ct-fp8-block", f"{GROUP}/weights/block_structure", None, "block_structure: found None"),
        ("ct-int8", f"{GROUP}/weights/type", "float", "found dtype int8, expected float8_e4m3fn"),
        ("ct-nvfp4", f"{GROUP}/weights/group_size", 32, r"expected \(64, 3\)"),
    ],
)
def test_keys_that_are_refused(case: str, path: str, value: Any, line: str):
    config, tensors, _ = record(case)
    with pytest.raises(InputError, match=line) as error:
        dequantised(case, changed(config, path, value), tensors)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("case", ["ct-fp8-channel", "ct-int4-asym", "ct-nvfp4", "ct-mxfp4"])
def test_tensors_that_are_missing_or_wrong(case: str):
    config, tensors, _ = record(case)
    for name, tensor in tensors.items():
        for odd in (None, tensor.reshape(-1)[:1].reshape(1, 1, 1), tensor.astype(np.float64)):
            own = {k: x for k, x in tensors.items() if k != name}
            own |= {} if odd is None else {name: odd}
            with pytest.raises(InputError, match=r"x\.\w+: found (no tensor|shape|dtype)"):
                dequantised(case, config, own)
