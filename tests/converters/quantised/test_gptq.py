from typing import Any

import numpy as np
import pytest

from converters.quantised.gptq import beside
from tests.quantised import CASES, assert_as_the_library, dequantised, pack, record
from vfjax import InputError


@pytest.mark.parametrize("case", [x for x in CASES if x.startswith(("gptq", "awq"))])
def test_as_the_library(case: str):
    assert_as_the_library(case)


def test_zero_points_of_the_second_format():
    """They are stored as they are, not less 1."""
    config, tensors, plain = record("gptq-4-asym")
    less = tensors["x.qzeros"].view(np.uint8)
    numbers = np.stack([less & 15, less >> 4], -1).reshape(len(less), -1)
    own = tensors | {"x.qzeros": pack(numbers + 1 & 15, 4)}
    for changes in ({"checkpoint_format": "gptq_v2"}, {"format": "gptq_v2"}):
        kept = {key: x for key, x in config.items() if key != "checkpoint_format"} | changes
        assert dequantised("gptq-4-asym", kept, own)[...].tobytes() == plain.tobytes()


def test_a_zero_point_of_none_is_stored_as_the_largest():
    config, tensors, _ = record("gptq-4")
    own = tensors | {"x.qzeros": np.full_like(tensors["x.qzeros"], -1)}
    words = tensors["x.qweight"].view(np.uint32)
    numbers = (words[:, None] >> (4 * np.arange(8, dtype=np.uint32))[:, None] & 15).reshape(96, 64)
    expected = (numbers * tensors["x.scales"].repeat(32, 0)).T.astype(np.float16)
    np.testing.assert_array_equal(dequantised("gptq-4", config, own)[...], expected)


def test_rules_by_name():
    """GPTQModel's `dynamic`: the first pattern that fits."""
    config, tensors, plain = record("gptq-8")
    rules = {r"+:y": {"bits": 2}, r"+:x": {"bits": 8, "group_size": -1}, "x": {"bits": 3}}
    changes = {"bits": 4, "group_size": 32, "dynamic": rules}
    assert dequantised("gptq-8", config | changes, tensors)[...].tobytes() == plain.tobytes()


@pytest.mark.parametrize(
    ("case", "changes", "line"),
    [
        ("gptq-4", {"bits": 1}, "bits: found 1"),
        ("gptq-4", {"bits": 5}, "x.qweight: found 12 rows, expected numbers of 5 bits"),
        ("gptq-4", {"bits": 8}, r"x.scales: found shape \(3, 64\), expected \(2, 64\)"),
        ("gptq-4", {"group_size": 0}, "x.qweight: found groups of 0"),
        ("gptq-4", {"checkpoint_format": "marlin"}, "checkpoint_format: found 'marlin'"),
        ("gptq-4", {"format": "gptq_v2"}, "format: found 'gptq_v2', expected 'gptq'"),
        ("gptq-4", {"is_marlin_format": True}, "is_marlin_format: found True"),
        ("gptq-4", {"adapter": {"rank": 4}}, "adapter: found"),
        ("gptq-4", {"dynamic": {"-:x": {}}}, r"x.qweight: found a tensor, expected none: dynamic"),
        ("gptq-4", {"dynamic": {"+:(": {}}}, "dynamic: found"),
        ("gptq-4", {"modules_in_block_to_quantize": [3]}, "modules_in_block_to_quantize: found"),
        ("awq", {"version": "gemv"}, "version: found 'gemv', expected 'gemm'"),
        ("awq", {"bits": 8}, "bits: found 8, expected 4"),
        ("awq", {"group_size": 36}, "x.qweight: found 96 inputs, expected a multiple"),
        ("awq", {"zero_point": False}, "zero_point: found False"),
        ("awq", {"modules_to_not_convert": ["x"]}, "modules_to_not_convert has 'x'"),
        ("awq", {"modules_to_not_convert": ["("]}, "expected regular expressions"),
    ],
)
def test_keys_that_are_refused(case: str, changes: dict[str, Any], line: str):
    config, tensors, _ = record(case)
    with pytest.raises(InputError, match=line) as error:
        dequantised(case, config | changes, tensors)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("leaf", ["qweight", "scales", "qzeros"])
@pytest.mark.parametrize("case", ["gptq-4", "awq"])
def test_tensors_that_are_missing_or_wrong(case: str, leaf: str):
    config, tensors, _ = record(case)
    for changed in (None, tensors[f"x.{leaf}"][:, :-1], tensors[f"x.{leaf}"].astype(np.int16)):
        own = {k: x for k, x in tensors.items() if k != f"x.{leaf}"}
        own |= {} if changed is None else {f"x.{leaf}": changed}
        with pytest.raises(InputError, match=r"x\.\w+: found (no tensor|shape|dtype)"):
            dequantised(case, config, own)[...]


def test_groups_of_inputs():
    """g_idx counts; where the config denies an order, so do the libraries' kernels ignore it."""
    config, tensors, _ = record("gptq-4-order")
    with pytest.raises(InputError, match="x.g_idx: found groups in another order"):
        dequantised("gptq-4-order", config | {"desc_act": False}, tensors)[0:1]
    for odd in (3, -1):
        own = tensors | {"x.g_idx": np.where(np.arange(96) == 7, odd, tensors["x.g_idx"])}
        with pytest.raises(InputError, match=f"x.g_idx: found group {odd}, expected 0 to 2"):
            dequantised("gptq-4-order", config, own)[...]
    assert beside(tensors) and not beside({"x.weight": tensors["x.scales"]})
