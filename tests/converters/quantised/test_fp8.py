from typing import Any

import ml_dtypes
import numpy as np
import pytest

from converters.quantised.fp8 import fp8
from converters.values import Values
from tests.quantised import CASES, assert_as_the_library, dequantised, fp8_module, record
from vfjax import InputError


@pytest.mark.parametrize("case", [x for x in CASES if x.startswith("fp8")])
def test_as_the_library(case: str):
    assert_as_the_library(case)


def test_blocks_that_are_cut_off():
    """Of sizes that are no multiple of a block's: DeepSeek's kernel cuts the last one.

    (transformers takes blocks of an equal size then, so it is no peer for this.)
    """
    weight = np.random.default_rng(0).normal(size=(40, 56)).astype(np.float32)
    leaves, expected = fp8_module(weight)
    values = Values({"weight_block_size": [16, 16]}, "config.json")
    tensors = {f"x.{leaf}": value for leaf, value in leaves.items()}
    found = fp8(values, tensors, None)["x.weight"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[...], expected)
    for rows in (slice(0, 7), slice(15, 33), slice(39, 40)):
        np.testing.assert_array_equal(found[rows], expected[rows])


def test_exponents_as_bytes():
    config, tensors, plain = record("fp8-ue8m0")
    own = tensors | {"x.weight_scale_inv": tensors["x.weight_scale_inv"].view(np.uint8)}
    assert dequantised("fp8-ue8m0", config, own)[...].tobytes() == plain.tobytes()


def test_one_scale_by_its_other_name():
    """AutoFP8's folders, whose caches have scales too."""
    config, tensors, plain = record("fp8-tensor")
    scale = tensors["x.weight_scale_inv"]
    own = {"x.weight": tensors["x.weight"], "x.weight_scale": scale, "x.input_scale": scale}
    own["y.k_scale"] = scale
    assert dequantised("fp8-tensor", config, own)[...].tobytes() == plain.tobytes()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"weight_block_size": [16, 16]}, r"found shape \(2, 3\), expected \(4, 6\)"),
        ({"weight_block_size": [16]}, "weight_block_size: found"),
        ({"expert_dtype": "fp4"}, "expert_dtype: found 'fp4'"),
        ({"modules_to_not_convert": ["x"]}, "modules_to_not_convert has 'x'"),
        ({"ignored_layers": ["x"]}, "ignored_layers has 'x'"),
        ({"unheard": 1}, "unheard: found 1"),
    ],
)
def test_keys_that_are_refused(changes: dict[str, Any], line: str):
    config, tensors, _ = record("fp8-block")
    with pytest.raises(InputError, match=line):
        dequantised("fp8-block", config | changes, tensors)


def test_tensors_that_are_missing_or_wrong():
    config, tensors, _ = record("fp8-block")
    weight = tensors["x.weight"]
    for own, line in (
        ({"x.weight": weight}, "x.weight_scale_inv: found no tensor, expected it"),
        (tensors | {"x.weight": weight.astype(np.int8)}, "x.weight: found dtype int8"),
        (tensors | {"x.more": weight}, None),
        ({"x.weight_scale_inv": tensors["x.weight_scale_inv"]}, "x.weight: found no tensor"),
    ):
        if line is None:  # a tensor that has nothing to do with it stays
            values = Values(config, "config.json")
            assert fp8(values, own, np.dtype(ml_dtypes.bfloat16))["x.more"] is weight
            continue
        with pytest.raises(InputError, match=line):
            dequantised("fp8-block", config, own)
