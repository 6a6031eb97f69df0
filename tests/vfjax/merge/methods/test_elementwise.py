import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.vfjax.merge.families import BF16, EPS32, F16, F32, family, run
from vfjax import InputError
from vfjax.merge import linear, task_arithmetic


def closed_form(method, base, members, weights):
    """The float64 result, and the size of the terms it is made of."""
    x = [m.astype(np.float64) for m in members]
    if method == "linear":
        terms = [w * m / sum(weights) for w, m in zip(weights, x, strict=True)]
        return sum(w * m for w, m in zip(weights, x, strict=True)) / sum(weights), terms
    b = base.astype(np.float64)
    terms = [w * (m - b) for w, m in zip(weights, x, strict=True)]
    return b + sum(terms), [b, *terms]


def rounded(x, dtype):
    """float64 to dtype in one rounding, half to even (ml_dtypes goes through float32)."""
    if dtype != BF16:
        return x.astype(dtype)
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.rint(mantissa * 256) / 256, exponent).astype(np.float32).astype(BF16)


def ulp(x, dtype):
    info = ml_dtypes.finfo(dtype)
    exponent = np.frexp(np.maximum(np.abs(x), float(info.smallest_normal)))[1] - 1
    return np.ldexp(float(info.eps), exponent)


GENERIC = [(0.3711, 0.6132), (0.21873, 0.31337, 0.10101, 0.36841)]

DECIMAL = [(0.5, 0.5), (0.3, 0.7), (1 / 3, 1 / 3, 1 / 3), (1.5, -0.5)]


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
@pytest.mark.parametrize("weights", [*GENERIC, *DECIMAL])
@pytest.mark.parametrize("source,target", [(BF16, BF16), (F16, F16), (F32, BF16), (F32, F32)])
def test_float32_sums_rounded_once(method, weights, source, target):
    base, members = family(len(weights), dtype=source)
    exact, terms = closed_form(method, base, members, weights)
    result = run(method, base, members, dtype=target, weights=weights)
    assert result.dtype == target
    error = np.abs(result.astype(np.float64) - exact)
    assert np.all(error <= 0.5 * ulp(exact, target) + 8 * EPS32 * np.sum(np.abs(terms), axis=0))
    # Decimal weights of 16-bit floats often hit a midpoint exactly, where float64 rounds its own
    # error, so bits are compared with weights that do not.
    if weights in GENERIC and target == BF16:
        assert np.mean(result != rounded(exact, target)) <= 1e-4


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.3, 0.3), (1.0, 1.0, 1.0)])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_mean_is_exact_to_the_bit(weights, dtype):
    base, members = family(len(weights), dtype=dtype)
    exact = sum(m.astype(np.float64) for m in members) / len(members)
    result = run("linear", None, members, weights=weights)
    np.testing.assert_array_equal(result, rounded(exact, dtype))


def test_mutant_bf16_sums_would_be_noticed():
    base, members = family(4)
    weights = GENERIC[1]
    exact, _ = closed_form("linear", base, members, weights)
    total = sum(np.asarray(w, BF16) * m for w, m in zip(weights, members, strict=True))
    naive = total / np.asarray(sum(weights), BF16)
    assert np.mean(naive != rounded(exact, BF16)) > 0.1


def test_subnormals_become_zero_and_nothing_else():
    tiny = np.array([1e-39, -1e-40, 9.2e-41, 0.0, 1.0], BF16)
    result = run("task_arithmetic", tiny, [tiny], weights=[1.0]).astype(np.float64)
    np.testing.assert_allclose(result, tiny.astype(np.float64), rtol=0, atol=1.2e-38)
    small = np.array([6e-8, 5.96e-7, -3e-5], F16)  # subnormal in float16, normal in float32
    np.testing.assert_array_equal(run("linear", None, [small], weights=[1.0]), small)


finite = st.floats(-4, 4, width=16)

weight = st.floats(-2, 2, width=16)


@st.composite
def siblings(draw):
    """A base and two members of one length, values of about one size."""
    n = draw(st.integers(1, 20))
    one = st.lists(finite, min_size=n, max_size=n).map(lambda x: np.array(x, F32))
    return draw(one), [draw(one), draw(one)]


@given(siblings(), st.sampled_from([BF16, F16, F32]))
def test_zero_weights_give_the_base(arrays, dtype):
    base, members = arrays[0].astype(dtype), [m.astype(dtype) for m in arrays[1]]
    result = run("task_arithmetic", base, members, weights=[0.0, 0.0])
    np.testing.assert_array_equal(result, base)


@given(siblings())
def test_zero_scale_gives_the_base(arrays):
    base, members = arrays
    result = run("task_arithmetic", base, members, weights=[1.0, 1.0], scale=0.0)
    np.testing.assert_array_equal(result, base)


@given(siblings(), st.sampled_from([BF16, F16, F32]), st.floats(0.1, 3))
def test_a_single_member_gives_itself(arrays, dtype, any_weight):
    base, member = arrays[0].astype(dtype), arrays[1][0].astype(dtype)
    np.testing.assert_array_equal(run("linear", None, [member], weights=[any_weight]), member)
    result = run("task_arithmetic", base, [member], weights=[1.0]).astype(np.float64)
    exact = member.astype(np.float64)
    size = np.abs(base.astype(np.float64)) + np.abs(exact)
    assert np.all(np.abs(result - exact) <= 4 * EPS32 * size)


@given(siblings(), weight, weight)
def test_task_arithmetic_is_linear_in_weights_and_scale(arrays, a, b):
    base, (x, y) = arrays
    both = run("task_arithmetic", base, [x, y], weights=[a, b])
    apart = [run("task_arithmetic", base, [m], weights=[w]) - base for m, w in ((x, a), (y, b))]
    np.testing.assert_allclose(both, base + sum(apart), rtol=0, atol=1e-5)
    halved = run("task_arithmetic", base, [x, y], weights=[a / 2, b / 2], scale=2.0)
    np.testing.assert_allclose(both, halved, rtol=0, atol=1e-5)


@given(siblings(), weight, weight)
def test_methods_agree_where_they_must(arrays, a, b):
    base, members = arrays
    plain = run("linear", None, members, weights=[a, b], normalize=False)
    np.testing.assert_allclose(plain, a * members[0] + b * members[1], rtol=0, atol=1e-5)
    soup = run("linear", None, members, weights=[3.0, 1.0])
    np.testing.assert_allclose(soup, 0.75 * members[0] + 0.25 * members[1], rtol=0, atol=1e-5)
    arithmetic = run("task_arithmetic", base, members, weights=[0.75, 0.25])
    np.testing.assert_allclose(soup, arithmetic, rtol=0, atol=1e-5)


@given(siblings())
def test_members_may_change_places(arrays):
    base, members = arrays
    for method in ("linear", "task_arithmetic"):
        one = run(method, base, members, weights=[0.625, 0.25])
        other = run(method, base, members[::-1], weights=[0.25, 0.625])
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


def test_formulas_take_plain_arrays():
    x, y = np.array([1.0, 2.0], BF16), np.array([3.0, 6.0], BF16)
    np.testing.assert_allclose(linear([x, y], weights=[1, 3]), [2.5, 5.0])
    np.testing.assert_allclose(task_arithmetic(x, [y], weights=[0.5], scale=2), [3.0, 6.0])
    assert linear([x, y], weights=[1, 3]).dtype == F32


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_a_weight_of_zero_hides_no_nan(method):
    sources = [np.full(4, x, F32) for x in (1.0, 2.0, np.nan)]
    with pytest.raises(InputError, match="^member 'm1': w: found 4 NaN"):
        run(method, sources[0], sources[1:], weights=(1.0, 0.0))
