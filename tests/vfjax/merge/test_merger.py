import json
import re

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfjax import InputError
from vfjax.merge import METHODS, Merger, check_family, linear, merge, task_arithmetic
from vfjax.merge import tensors as lazy

BF16 = np.dtype(ml_dtypes.bfloat16)
F16 = np.dtype(np.float16)
F32 = np.dtype(np.float32)
EPS32 = 2.0**-24


class Spy:
    """A lazy tensor that notes which rows were read."""

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.reads = array, array.shape, array.dtype, []

    def __getitem__(self, rows):
        self.reads.append(rows)
        return self.array[rows]


def family(k=2, n=1 << 17, dtype=BF16, spread=1e-3, seed=0):
    """A base of 0.02 deviation and k fine-tunes of it, as flat arrays."""
    rng = np.random.default_rng(seed)
    base = (0.02 * rng.standard_normal(n)).astype(dtype)
    deltas = spread * rng.standard_normal((k, n))
    return base, [(base.astype(np.float64) + delta).astype(dtype) for delta in deltas]


def run(method, base, members, dtype=None, **params):
    """One tensor through the engine."""
    named = {f"m{i}": {"w": x} for i, x in enumerate(members)}
    named_base = None if base is None else {"w": base}
    return merge(named_base, named, method, params, dtype=dtype)["w"][...]


def arguments(method):
    """Number of members and parameters for any method."""
    found = METHODS[method]
    count = found.takes[1] or 2
    known = {"weights": (0.4, 0.7)[:count], "density": 0.5, "select_topk": 0.5, "t": 0.3}
    return count, {key: value for key, value in known.items() if key in found.params}


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


@settings(max_examples=8)
@given(st.data())
@pytest.mark.parametrize("method", METHODS)
def test_how_it_is_cut_does_not_change_a_byte(method, data):
    count, params = arguments(method)
    shape = data.draw(st.sampled_from([(37,), (13, 37)]))
    dtype = BF16 if len(shape) == 1 else F32
    base, members = family(count, n=int(np.prod(shape)), dtype=dtype)
    named = {f"m{i}": {"w": x.reshape(shape)} for i, x in enumerate(members)}
    tensor = merge({"w": base.reshape(shape)}, named, method, params)["w"]
    whole = tensor[...]
    assert whole.shape == shape
    cuts = sorted(data.draw(st.lists(st.integers(0, shape[0]), max_size=4)))
    block = data.draw(st.sampled_from([1, 16, 100, 1 << 20]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lazy, "BLOCK", block)
        parts = [tensor[a:b] for a, b in zip([0, *cuts], [*cuts, shape[0]], strict=True)]
    assert np.concatenate(parts).tobytes() == whole.tobytes()


def test_scalars_and_empty_tensors():
    one = {"scalar": np.asarray(1.0, BF16), "none": np.zeros((0, 3), BF16)}
    three = {"scalar": np.asarray(3.0, BF16), "none": np.zeros((0, 3), BF16)}
    merged = merge(None, {"a": one, "b": three}, "linear", {"weights": (1, 1)})
    assert merged["scalar"][...].shape == () and merged["scalar"][...] == 2
    assert merged["none"][...].shape == merged["none"][0:0].shape == (0, 3)


def test_nothing_is_read_before_it_is_asked_for_and_no_more_than_that(monkeypatch):
    monkeypatch.setattr(lazy, "BLOCK", 64)
    base, members = family(2, n=100 * 8)
    spies = [Spy(x.reshape(100, 8)) for x in (base, *members)]
    merged = merge(
        {"w": spies[0]},
        {"a": {"w": spies[1]}, "b": {"w": spies[2]}},
        "task_arithmetic",
        {"weights": (0.5, 0.5)},
    )
    assert not any(spy.reads for spy in spies)
    merged["w"][10:30]
    for spy in spies:
        assert [(r.start, r.stop) for r in spy.reads] == [(10, 18), (18, 26), (26, 30)]


def test_formulas_take_plain_arrays():
    x, y = np.array([1.0, 2.0], BF16), np.array([3.0, 6.0], BF16)
    np.testing.assert_allclose(linear([x, y], weights=[1, 3]), [2.5, 5.0])
    np.testing.assert_allclose(task_arithmetic(x, [y], weights=[0.5], scale=2), [3.0, 6.0])
    assert linear([x, y], weights=[1, 3]).dtype == F32


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


def test_integers_must_be_equal():
    merged = soup(tensors(), a=tensors(), b=tensors(steps=np.array([0, 1, 5])))
    with pytest.raises(InputError, match="member 'b': steps: found int64 values that differ"):
        merged["steps"][...]
    same = soup(tensors(), a=tensors(), b=tensors())["steps"][1:]
    np.testing.assert_array_equal(same, [1, 2])


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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad,dtype", [(np.nan, BF16), (np.inf, F16), (-np.inf, F32)])
def test_nonfinite_sources_are_named_and_counted(method, bad, dtype):
    count, params = arguments(method)
    labels = ["base", *(f"member 'm{i}'" for i in range(count))]
    for i in range(1 if METHODS[method].base == "unread" else 0, len(labels)):
        sources = [np.full((50, 3), 1 + j / 8, dtype) for j, _ in enumerate(labels)]
        sources[i][7, 1] = sources[i][49, 2] = bad
        with pytest.raises(InputError, match=f"^{labels[i]}: w: found 2 NaN or infinite of 150"):
            run(method, sources[0], sources[1:], **params)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_a_weight_of_zero_hides_no_nan(method):
    sources = [np.full(4, x, F32) for x in (1.0, 2.0, np.nan)]
    with pytest.raises(InputError, match="^member 'm1': w: found 4 NaN"):
        run(method, sources[0], sources[1:], weights=(1.0, 0.0))


def test_a_model_is_trimmed_as_one_whatever_its_weights():
    """By a gradient of weights the same elements are kept; one of densities is refused."""
    rng = np.random.default_rng(0)
    spread = {"first": 10.0, "second": 1.0}
    member = {n: (s * rng.normal(size=(4, 8))).astype(np.float32) for n, s in spread.items()}

    def kept(weights, densities=(0.5, 0.5)):
        merger, out = Merger(), []
        for name, w, density in zip(member, weights, densities, strict=True):
            params = {"weights": (w,), "density": density, "trim": "model", "normalize": False}
            base = "base", np.zeros((4, 8), np.float32)
            out.append(merger.add(name, "ties", params, [("m", member[name])], base))
        return [tensor[...] != 0 for tensor in out]

    expected = kept((1.0, 1.0))
    assert sum(mask.sum() for mask in expected) == 32 and expected[0].sum() > expected[1].sum()
    np.testing.assert_array_equal(kept((1.0, 0.9)), expected)
    with pytest.raises(InputError, match="^second: trim: found 'model', and density varies"):
        kept((1.0, 1.0), (0.5, 0.4))


def test_a_share_is_of_the_decimal_number():
    """0.7 of 10 are 7, though float32's 0.7 is less."""
    base, up = np.zeros(10, np.float32), np.arange(1, 11, dtype=np.float32)
    assert np.count_nonzero(run("sce", base, [up, -up / 2], select_topk=0.7)) == 7


def test_results_out_of_range_are_errors():
    big = np.full(4, 6e4, F16)
    with pytest.raises(InputError, match="^w: found finite sources, but .* not finite in float16"):
        run("linear", None, [big, big], weights=(1, 1), normalize=False)
    assert run("linear", None, [big, big], dtype=BF16, weights=(1, 1), normalize=False)[0] > 1e5
    with pytest.raises(InputError, match="not summing to 0"):
        run("linear", None, [big, big], weights=(1, -1))


@pytest.mark.parametrize(
    "method,params,message",
    [
        ("slurp", {}, "method: found 'slurp', expected "),
        ("slerp", {"t": "x"}, "slerp.t: found 'x', expected a finite number"),
        ("ties", {"weights": (1, 1), "density": (1, 2, 3)}, "expected a finite number, or 2 of"),
        ("ties", {"weights": (1, 1), "trim": "row"}, "expected 'tensor' or 'model'"),
        ("ties", {"weights": (1, 1), "density": 50}, "ties.density: found 50, expected a share"),
        (
            "breadcrumbs",
            {"weights": (1, 1), "gamma": (0.1, -1)},
            "gamma: found [0.1, -1.0], expected a share",
        ),
        ("sce", {"select_topk": 1.5}, "sce.select_topk: found 1.5, expected a share, 0 to 1"),
        ("passthrough", {}, "method passthrough: found 2 members, expected 1"),
        ("linear", {}, "method linear: found no 'weights', expected 2 finite numbers"),
        ("linear", {"weights": (1, 2, 3)}, "linear.weights: found (1, 2, 3), expected 2 finite"),
        ("linear", {"weights": 0.5}, "linear.weights: found 0.5, expected 2 finite"),
        ("linear", {"weights": "ab"}, "linear.weights: found 'ab', expected 2 finite"),
        ("linear", {"weights": (1, np.nan)}, "linear.weights: found (1, nan)"),
        ("linear", {"weights": (1, np.inf)}, "linear.weights: found (1, inf)"),
        ("linear", {"weights": (1, 1e39)}, "linear.weights: found (1, 1e+39)"),
        ("linear", {"weights": (1, True)}, "linear.weights: found (1, True)"),
        ("linear", {"weights": (1, 1), "normalize": 1}, "found 1, expected True or False"),
        ("linear", {"weights": (1, 1), "scale": 1.0}, "method linear: found parameter 'scale'"),
        ("task_arithmetic", {"weights": (1, 1), "scale": (1, 2)}, "expected a finite number"),
        ("task_arithmetic", {"weights": (1, 1)}, "method task_arithmetic: found no base"),
    ],
)
def test_wrong_parameters(method, params, message):
    with pytest.raises(InputError, match=re.escape(message)):
        merge(None, {"a": tensors(), "b": tensors()}, method, params)


def test_no_members():
    with pytest.raises(InputError, match="members: found none"):
        merge(tensors(), {}, "linear", {"weights": []})


VICUNA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_scaling": None,
}
LLAVA = {
    **VICUNA,
    "model_type": "llava_llama",
    "rope_theta": 10000.0,
    "mm_hidden_size": 1024,
    "head_dim": 128,
}
LINEAR = {"rope_type": "linear", "factor": 2.0}


def test_one_family_is_accepted():
    new = {**VICUNA, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}
    sparse = {"model_type": "llama", "vocab_size": 32000, "rms_norm_eps": 1e-5}
    check_family({"base": VICUNA, "llava": LLAVA, "new": new, "sparse": sparse})
    old = {**VICUNA, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    both = {**old, "rope_scaling": {**LINEAR, "type": "linear"}}
    new = {**VICUNA, "rope_parameters": {**LINEAR, "rope_theta": 500000.0, "beta": None}}
    check_family({"base": old, "both": both, "new": new})


@pytest.mark.parametrize(
    "change,message",
    [
        ({"hidden_size": 5120}, "llava: hidden_size: found 5120, expected 4096 as in base"),
        ({"intermediate_size": 1}, "llava: intermediate_size"),
        ({"num_hidden_layers": 40}, "llava: num_hidden_layers"),
        ({"num_attention_heads": 64, "head_dim": 64}, "llava: num_attention_heads"),
        ({"num_key_value_heads": 8}, "llava: num_key_value_heads"),
        ({"head_dim": 64}, "llava: head_dim: found 64, expected 128"),
        ({"vocab_size": 32064}, "vocab_size: found vocabulary of 32064 rows, base has 32000"),
        ({"rms_norm_eps": 1e-6}, "llava: rms_norm_eps: found 1e-06, expected 1e-05"),
        ({"rope_theta": 1e6}, "llava: rope_theta: found 1000000.0, expected 10000.0"),
        ({"rope_parameters": {"rope_theta": 5e5}}, "llava: rope_theta: found 500000.0"),
        ({"rope_scaling": LINEAR}, "llava: rope_scaling"),
        ({"rope_parameters": {**LINEAR, "rope_theta": 1e4}}, "llava: rope_scaling"),
    ],
)
def test_configs_of_other_families_are_refused(change, message):
    llava = json.loads(json.dumps({**LLAVA, **change}))
    with pytest.raises(InputError, match=re.escape(message)):
        check_family({"base": VICUNA, "llava": llava})
