import jax
import ml_dtypes
import numpy as np
import pytest

from vfjax.merge import merge
from vfjax.merge.methods.matrix import iso, iso_cts, optmerge, tsv, wudi

METHODS = [wudi, optmerge, tsv, iso, iso_cts]
# Compiling is what takes the time here.
FAST = {"xla_backend_optimization_level": 0}
COMPILED = {fn: jax.jit(fn, compiler_options=FAST) for fn in METHODS}
CASES = [((24, 16), 2), ((16, 24), 3), ((14, 14), 2)]
every = pytest.mark.parametrize("fn", METHODS, ids=lambda fn: fn.__name__)
cases = pytest.mark.parametrize(("shape", "k"), CASES, ids=str)


def merged(fn, base, members, **params):
    """The formula with traced numbers, as the engine runs it; compiled once a shape."""
    defaults = {"scale": 1.0}
    if fn in (wudi, optmerge):
        defaults |= {"steps": 300.0, "learning_rate": 1e-5}
    params = {key: float(value) for key, value in (defaults | params).items()}
    return np.asarray(COMPILED[fn](base, members, **params), np.float64)


def sources(shape=(24, 16), k=2, spread=0.02, shared=0.3, seed=0):
    """A base and k members, float32; their deltas have a part in common."""
    rng = np.random.default_rng(seed)
    base = (0.02 * rng.standard_normal(shape)).astype(np.float32)
    common = rng.standard_normal(shape)
    deltas = [spread * (rng.standard_normal(shape) + shared * common) for _ in range(k)]
    return base, [(base + delta).astype(np.float32) for delta in deltas]


def deltas(base, members):
    return [x.astype(np.float64) - base for x in members]


def lowrank(x, k):
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    return u[:, :k] @ np.diag(s[:k]) @ vt[:k]


def adam(taus, targets, features, steps, rate):
    """Adam as torch has it, on the loss as the papers write it: no Gram matrices."""
    tau = sum(taus)
    first, second = np.zeros_like(tau), np.zeros_like(tau)
    for t in range(1, steps + 1):
        grad = sum(
            2 * ((tau - target) @ feature.T) @ feature / np.sum(delta**2)
            for delta, target, feature in zip(taus, targets, features, strict=True)
        )
        first = 0.9 * first + 0.1 * grad
        second = 0.999 * second + 0.001 * grad**2
        step = first / (1 - 0.9**t) / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)
        tau = tau - rate * step
    return tau


def wudi64(taus, steps=300, rate=1e-5):
    return adam(taus, taus, taus, steps, rate)


def optmerge64(taus, steps=300, rate=1e-5):
    k = min(taus[0].shape) // len(taus)
    mean = sum(taus) / len(taus)
    targets = [lowrank(tau - mean, k) + mean for tau in taus]
    # U S V^T in place of S V^T: U's columns are orthonormal, so the norm is the same.
    return adam(taus, targets, [lowrank(tau, k) for tau in taus], steps, rate)


def procrustes(x):
    """X (X^T X)^-1/2, the other form of P Q^T."""
    values, vectors = np.linalg.eigh(x.T @ x)
    return x @ (vectors * values**-0.5) @ vectors.T


def tsv64(taus):
    k = min(taus[0].shape) // len(taus)
    parts = [np.linalg.svd(tau, full_matrices=False) for tau in taus]
    u = procrustes(np.hstack([u[:, :k] for u, _, _ in parts]))
    v = procrustes(np.hstack([vt[:k].T for _, _, vt in parts]))
    return u @ np.diag(np.hstack([s[:k] for _, s, _ in parts])) @ v.T


def iso64(taus):
    u, s, vt = np.linalg.svd(sum(taus), full_matrices=False)
    return s.mean() * u @ vt


def iso_cts64(taus, each):
    """`each`: directions a task, written out by the caller."""
    common = min(taus[0].shape) - each * len(taus)
    u, s, vt = np.linalg.svd(sum(taus), full_matrices=False)
    us, ss, vs = [u[:, :common]], [s[:common]], [vt[:common].T]
    for tau in taus:
        u, s, vt = np.linalg.svd(tau - us[0] @ us[0].T @ tau, full_matrices=False)
        us, ss, vs = [*us, u[:, :each]], [*ss, s[:each]], [*vs, vt[:each].T]
    return np.hstack(ss).mean() * procrustes(np.hstack(us)) @ procrustes(np.hstack(vs)).T


@pytest.mark.parametrize(
    ("fn", "reference"), [(wudi, wudi64), (optmerge, optmerge64)], ids=["wudi", "optmerge"]
)
@cases
def test_optimised_formula(fn, reference, shape, k):
    base, members = sources(shape, k)
    taus = deltas(base, members)
    for params in ({}, {"steps": 100, "learning_rate": 1e-3}):
        expected = reference(taus, params.get("steps", 300), params.get("learning_rate", 1e-5))
        moved = np.abs(expected - sum(taus)).max()
        result = merged(fn, base, members, **params) - base
        # Adam divides a gradient by its size, so that rounding counts against the way gone, not
        # against the weights; where a gradient passes zero it counts most.
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-3 * moved)


@pytest.mark.parametrize(
    ("fn", "reference"), [(wudi, wudi64), (optmerge, optmerge64)], ids=["wudi", "optmerge"]
)
def test_optimised_formula_where_gradients_near_adams_epsilon(fn, reference):
    """Here the gradient's factor counts: Adam does not divide it out."""
    _, members = sources(spread=3e-8)
    base = np.zeros((24, 16), np.float32)
    members = [np.float32(1e-6) * x for x in members]
    taus = deltas(base, members)
    expected = reference(taus, 50, 1e-9)
    moved = np.abs(expected - sum(taus)).max()
    result = merged(fn, base, members, steps=50, learning_rate=1e-9)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-3 * moved)


@pytest.mark.parametrize(("fn", "reference"), [(tsv, tsv64), (iso, iso64)], ids=["tsv", "iso"])
@cases
def test_spectral_formula(fn, reference, shape, k):
    base, members = sources(shape, k)
    expected = reference(deltas(base, members))
    result = merged(fn, base, members) - base
    # Rounding of 1e-7, over the smallest singular value of a stack of unit vectors.
    np.testing.assert_allclose(result, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@cases
def test_iso_cts_formula(shape, k):
    base, members = sources(shape, k)
    # Of rank 16, 12 are common and 4 are left: 2 for each of 2, and of 3 about 1 (rounded). Of
    # rank 14, 11 are common at first and 3 left: 3/2 is rounded to 2 for each of 2.
    expected = iso_cts64(deltas(base, members), {2: 2, 3: 1}[k])
    result = merged(iso_cts, base, members) - base
    np.testing.assert_allclose(result, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@every
@pytest.mark.parametrize("shape", [(24, 16), (7,)], ids=str)
def test_zero_deltas_give_the_base(fn, shape):
    base, _ = sources(shape)
    np.testing.assert_array_equal(merged(fn, base, [base, base]), base)


@every
@pytest.mark.parametrize("shape", [(), (7,), (3, 4, 5)], ids=str)
def test_not_a_matrix_is_averaged(fn, shape):
    base, members = sources(shape)
    expected = base + 0.5 * sum(deltas(base, members)) / 2
    np.testing.assert_allclose(merged(fn, base, members, scale=0.5), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("fn", [wudi, optmerge, tsv], ids=lambda fn: fn.__name__)
def test_one_member_is_itself(fn):
    base, members = sources(k=1)
    np.testing.assert_allclose(merged(fn, base, members), members[0], rtol=0, atol=2e-7)


def test_one_member_isotropic():
    """No interference: the common and specific directions are the member's own."""
    base, members = sources(k=1)
    expected = base + iso64(deltas(base, members))
    for fn in (iso, iso_cts):
        np.testing.assert_allclose(merged(fn, base, members), expected, rtol=0, atol=1e-6)


@every
def test_orders_of_members_agree(fn):
    base, members = sources()
    forth, back = merged(fn, base, members), merged(fn, base, members[::-1])
    np.testing.assert_allclose(forth, back, rtol=0, atol=2e-6)


@every
def test_scale_multiplies_the_delta(fn):
    base, members = sources()
    once, twice = merged(fn, base, members), merged(fn, base, members, scale=2.0)
    np.testing.assert_allclose(twice - base, 2 * (once - base), rtol=0, atol=1e-7)


@every
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", [(24, 16), (7,)], ids=str)
def test_bad_numbers_reach_the_result(fn, bad, shape):
    base, members = sources(shape)
    members[1].flat[5] = bad
    assert not np.isfinite(merged(fn, base, members).flat[5])


@pytest.mark.parametrize("fn", [tsv, iso], ids=lambda fn: fn.__name__)
def test_plain_call_on_bfloat16(fn):
    base, members = sources()
    narrow = [x.astype(ml_dtypes.bfloat16) for x in (base, *members)]
    result = fn(narrow[0], narrow[1:])
    assert result.dtype == np.float32
    base, *members = [x.astype(np.float32) for x in narrow]
    np.testing.assert_allclose(result, merged(fn, base, members), rtol=0, atol=2e-6)


def test_steps_are_counted():
    base, members = sources()
    total = base + sum(deltas(base, members))
    np.testing.assert_allclose(merged(wudi, base, members, steps=0), total, rtol=0, atol=1e-8)
    # Adam's first step is the learning rate in every entry.
    moved = np.abs(merged(wudi, base, members, steps=1, learning_rate=1e-2) - total)
    np.testing.assert_allclose(moved, 1e-2, rtol=1e-3)


@pytest.mark.parametrize("fn", [wudi, optmerge], ids=lambda fn: fn.__name__)
def test_tall_matrix_makes_no_square_of_its_height(fn):
    base, members = sources((400, 8))
    graph = str(jax.make_jaxpr(fn)(base, members))
    assert "400,8]" in graph
    assert "400,400]" not in graph


def test_member_equal_to_the_base_takes_no_part():
    base, (member, _) = sources()
    (tau,) = deltas(base, [member])
    whole = [member, base.copy()]
    np.testing.assert_allclose(merged(wudi, base, whole), member, rtol=0, atol=2e-8)
    np.testing.assert_allclose(merged(tsv, base, whole), base + lowrank(tau, 8), rtol=0, atol=1e-6)
    # 12 common directions and 2 of the member; the other member's 2 have strength 0.
    u, s, vt = np.linalg.svd(tau, full_matrices=False)
    expected = base + s[:14].sum() / 16 * u[:, :14] @ vt[:14]
    np.testing.assert_allclose(merged(iso_cts, base, whole), expected, rtol=0, atol=1e-6)


def test_tsv_of_equal_members_is_one_of_them():
    base, (member, _) = sources()
    (tau,) = deltas(base, [member])
    result = merged(tsv, base, [member, member])
    np.testing.assert_allclose(result, base + lowrank(tau, 8), rtol=0, atol=1e-6)


@pytest.mark.parametrize("fn", [optmerge, tsv, iso_cts], ids=lambda fn: fn.__name__)
def test_more_members_than_rank(fn):
    base, members = sources((2, 6), k=3)
    result = merged(fn, base, members)
    assert np.isfinite(result).all()
    assert np.abs(result - base).max() > 1e-3


def test_spectra_of_the_results():
    """Iso has one singular value, the mean of the sum's; TSV keeps the members' own."""
    base, members = sources()
    taus = deltas(base, members)
    s = np.linalg.svd(merged(iso, base, members) - base, compute_uv=False)
    np.testing.assert_allclose(s, np.linalg.svd(sum(taus), compute_uv=False).mean(), rtol=1e-5)
    s = np.linalg.svd(merged(iso_cts, base, members) - base, compute_uv=False)
    np.testing.assert_allclose(s, s[0], rtol=1e-5)
    s = np.linalg.svd(merged(tsv, base, members) - base, compute_uv=False)
    own = np.sort(np.hstack([np.linalg.svd(x, compute_uv=False)[:8] for x in taus]))[::-1]
    np.testing.assert_allclose(s, own, rtol=1e-4)


@pytest.mark.parametrize("method", ["wudi", "optmerge", "tsv"])
def test_the_head_is_averaged(method):
    """By its name, as `wudi_merging` and `wudi_merging2` of MLLMerging have it; not so TSV."""
    base, members = sources((14, 14), 2)
    names = ("lm_head.weight", "model.layers.0.mlp.up_proj.weight")
    given = {label: dict.fromkeys(names, x) for label, x in zip("ab", members, strict=True)}
    steps = {} if method == "tsv" else {"steps": 2}
    found = merge(dict.fromkeys(names, base), given, method, {"scale": 0.5, **steps})
    head, matrix = (found[name][...] for name in names)
    mean = base + 0.5 * (members[0] - base + members[1] - base) / 2
    assert np.allclose(head, mean, rtol=0, atol=1e-7) == (method != "tsv")
    assert not np.allclose(matrix, mean, rtol=0, atol=1e-3)
