import json
from typing import Any

import numpy as np
import pytest

from tests.quantised import CASES, assert_as_the_library, dequantised, record
from vfjax import InputError

STATE = "x.weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize("case", [x for x in CASES if x.startswith("bnb")])
def test_as_the_library(case: str):
    assert_as_the_library(case)


def with_state(tensors: dict[str, np.ndarray], **changes: Any) -> dict[str, np.ndarray]:
    state = json.loads(bytes(tensors[STATE])) | changes
    return tensors | {STATE: np.frombuffer(json.dumps(state).encode(), np.uint8)}


def test_rows_of_an_odd_length():
    """A row may begin within a byte, and within a block; the last byte may be half used."""
    config, tensors, _ = record("bnb-nf4")
    own = with_state(tensors, shape=[67, 91])
    own["x.weight"] = tensors["x.weight"][: -(-67 * 91 // 2)]
    own["x.weight.absmax"] = tensors["x.weight.absmax"][: -(-67 * 91 // 64)]
    found = dequantised("bnb-nf4", config, own)
    raw = own["x.weight"].reshape(-1)
    numbers = np.stack([raw >> 4, raw & 15], -1).reshape(-1)[: 67 * 91]
    scale = own["x.weight.absmax"].repeat(64)[: 67 * 91]
    values = own["x.weight.quant_map"][numbers] * scale
    expected = values.astype(found.dtype).reshape(67, 91)
    assert found[...].tobytes() == expected.tobytes()
    for start in range(5):
        assert found[start : start + 1].tobytes() == expected[start : start + 1].tobytes()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"llm_int8_has_fp16_weight": True}, "llm_int8_has_fp16_weight: found True"),
        ({"llm_int8_skip_modules": ["x"]}, "llm_int8_skip_modules has 'x'"),
        ({"unheard": 1}, "unheard: found 1"),
    ],
)
def test_keys_that_are_refused(changes: dict[str, Any], line: str):
    config, tensors, _ = record("bnb-nf4")
    with pytest.raises(InputError, match=line):
        dequantised("bnb-nf4", config | changes, tensors)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"quant_type": "int3"}, "quant_type: found 'int3'"),
        ({"shape": [64]}, "shape: found"),
        ({"shape": [64, 97]}, "x.weight: found 3072 bytes, expected 3104"),
        ({"blocksize": 32}, r"absmax: found shape \(96,\), expected \(192,\)"),
        ({"blocksize": "x"}, "blocksize: found 'x'"),
        ({"dtype": "int8"}, "dtype: found 'int8'"),
        ({"more": 1}, "more: found 1"),
    ],
)
def test_states_that_are_refused(changes: dict[str, Any], line: str):
    config, tensors, _ = record("bnb-nf4")
    with pytest.raises(InputError, match=line):
        dequantised("bnb-nf4", config, with_state(tensors, **changes))
    for text in (b"[]", b"{", b"\xff"):
        with pytest.raises(InputError, match="nf4: found"):
            own = tensors | {STATE: np.frombuffer(text, np.uint8)}
            dequantised("bnb-nf4", config, own)


@pytest.mark.parametrize("case", ["bnb-nf4-double", "bnb-int8"])
def test_tensors_that_are_missing_or_wrong(case: str):
    config, tensors, _ = record(case)
    for name, tensor in tensors.items():
        if name == "x.weight_format":
            with pytest.raises(InputError, match="x.weight_format: found 2, expected 0"):
                dequantised(case, config, tensors | {name: np.array(2, np.uint8)})
            continue
        for odd in (None, tensor.reshape(-1)[:1].reshape(1, 1, 1), tensor.astype(np.int16)):
            own = {k: x for k, x in tensors.items() if k != name}
            own |= {} if odd is None else {name: odd}
            with pytest.raises(InputError, match=r"x\.[\w.]+: found (no tensor|shape|dtype|\d+ b)"):
                dequantised(case, config, own)
