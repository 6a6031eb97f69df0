import re

import ml_dtypes
import numpy as np
import pytest

from tests.vfjax.merge.families import BF16, F16, F32, Spy, family, run
from vfjax import InputError
from vfjax.merge import merge


def test_a_merge_of_merges():
    base, members = family(3)
    a, b, c = ({"w": x} for x in members)
    inner = merge(None, {"a": a, "b": b}, "linear", {"weights": (1, 1)}, dtype="float32")
    params = {"weights": (0.5, 0.5)}
    outer = merge({"w": base}, {"ab": inner, "c": c}, "task_arithmetic", params)
    mean = (members[0].astype(F32) + members[1].astype(F32)) / 2
    expected = run("task_arithmetic", base, [mean, members[2]], weights=(0.5, 0.5))
    assert outer["w"][...].tobytes() == expected.tobytes()


def tensors(**changes):
    """A model of four tensors; a change of None removes one."""
    model = {
        "model.embed_tokens.weight": np.ones((10, 4), BF16),
        "model.norm.weight": np.ones(4, BF16),
        "lm_head.weight": np.ones((10, 4), BF16),
        "steps": np.arange(3),
    }
    model |= {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in model.items() if value is not None}


def soup(base, **members):
    return merge(base, members, "linear", {"weights": [1.0] * len(members)})


def test_names_and_order_are_those_of_the_base():
    base = tensors()
    shuffled = dict(reversed(tensors().items()))
    assert list(soup(base, a=shuffled, b=tensors())) == list(base)
    assert list(soup(None, a=shuffled, b=tensors())) == list(shuffled)


@pytest.mark.parametrize(
    "change,message",
    [
        (
            {"model__norm__weight": None},
            "member 'b': found 3 tensors: 1 missing, the first 'model.norm.weight', "
            "expected the 4 tensors of base",
        ),
        ({"extra": np.ones(2, BF16)}, "member 'b': found 5 tensors: 1 extra, the first 'extra'"),
        ({"lm_head__weight": None}, "lm_head is tied to the embedding in one of them"),
        (
            {"model__norm__weight": np.ones(5, BF16)},
            "member 'b': model.norm.weight: found shape (5,), expected (4,) as in base",
        ),
        (
            {"lm_head__weight": np.ones((12, 4), BF16)},
            "member 'b': lm_head.weight: found vocabulary of 12 rows, base has 10",
        ),
        (
            {"lm_head__weight": np.ones((10, 8), BF16)},
            "member 'b': lm_head.weight: found shape (10, 8), expected (10, 4)",
        ),
        ({"model__norm__weight": np.ones(4)}, "member 'b': model.norm.weight: found dtype float64"),
        (
            {"model__norm__weight": np.ones(4, ml_dtypes.float8_e4m3fn)},
            "member 'b': model.norm.weight: found dtype float8_e4m3fn",
        ),
        ({"steps": np.ones(3, BF16)}, "base: steps: found dtype int64"),
    ],
)
def test_other_families_are_refused_before_any_work(change, message):
    base, odd = ({k: Spy(v) for k, v in t.items()} for t in (tensors(), tensors(**change)))
    with pytest.raises(InputError, match=re.escape(message)):
        soup(base, a=tensors(), b=odd)
    assert not any(spy.reads for spy in [*base.values(), *odd.values()])


def test_without_a_base_the_first_member_is_the_reference():
    with pytest.raises(InputError, match=r"member 'b': .* the 4 tensors of member 'a'"):
        soup(None, a=tensors(), b=tensors(extra=np.ones(2, BF16)))


def test_dtype_of_the_result():
    other = {"w": np.array([1.0, 2.0], F16)}
    base = {"w": np.array([1.0, 2.0], BF16), "i": np.arange(2)}
    members = {"a": other | {"i": np.arange(2)}}
    params = {"weights": [1.0]}
    assert merge(base, members, "task_arithmetic", params)["w"].dtype == BF16
    assert merge(None, members, "linear", params)["w"].dtype == F16
    wide = merge(base, members, "task_arithmetic", params, dtype="float32")
    assert (wide["w"].dtype, wide["w"][...].dtype, wide["i"].dtype) == (F32, F32, np.int64)
    with pytest.raises(InputError, match="dtype: found dtype int8, expected bfloat16, float16"):
        merge(base, members, "linear", params, dtype="int8")
    with pytest.raises(InputError, match="dtype: found dtype bf16, expected bfloat16, float16"):
        merge(base, members, "linear", params, dtype="bf16")


def test_no_members():
    with pytest.raises(InputError, match="members: found none"):
        merge(tensors(), {}, "linear", {"weights": []})


def test_integers_must_be_equal():
    merged = soup(tensors(), a=tensors(), b=tensors(steps=np.array([0, 1, 5])))
    with pytest.raises(InputError, match="member 'b': steps: found int64 values that differ"):
        merged["steps"][...]
    same = soup(tensors(), a=tensors(), b=tensors())["steps"][1:]
    np.testing.assert_array_equal(same, [1, 2])
