"""Merges against what mergekit 0.1.5 made of the same checkpoints and the same YAML.

tests/peers/mergekit.py recorded its results. Equal where mergekit is right; where it is not, a test
says why and holds both results.
"""

import functools
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import yaml

from vfjax.merge.engine.merger import Merger
from vfjax.merge.mergekit import from_mergekit

BF16 = np.dtype(ml_dtypes.bfloat16)
LAYERS = 3
DOWN, NORM = "model.layers.1.mlp.down_proj.weight", "model.norm.weight"
pytestmark = pytest.mark.usefixtures("optimised")
RECORD = np.load(Path(__file__).resolve().parents[2] / "data" / "mergekit.npz")
CASES = json.loads(str(RECORD["cases"]))

RANDOM = {"dare_linear", "dare_ties", "della_linear", "della", "dare_linear_beside"}
WRONG = {"sce_small", "della_thin"}
HALF = sorted(case.removesuffix("_bf16") for case in CASES if case.endswith("_bf16"))
EQUAL = [case for case in CASES if CASES[case]["inputs"] == "float32" if case not in RANDOM | WRONG]

ROUNDINGS = 2.0**-21
"""Eight roundings to float32, of values up to the largest of the tensor."""


@functools.cache
def inputs(kind):
    """Model -> tensor -> array, as mergekit read them."""
    found = {}
    for key in RECORD.files:
        if key.startswith("in/"):
            _, model, name = key.split("/")
            array = RECORD[key]
            if kind == "bfloat16":
                array = array.astype(BF16)
            elif kind == "thin" and name == DOWN:
                array = array[:, :1].copy()
            found.setdefault(model, {})[name] = array
    return found | {"twin": found["a"]}


def recorded(case):
    """Tensor -> what mergekit made."""
    found = {}
    for key in RECORD.files:
        if key.startswith(f"{case}/"):
            array = RECORD[key]
            found[key.split("/")[1]] = array.view(BF16) if array.dtype == np.uint16 else array
    return found


def merged(case, names=None):
    """Tensor -> what we make of the case's YAML, of those that were recorded or of some."""
    config = yaml.safe_load(CASES[case]["yaml"])
    recipe, models = from_mergekit(config), inputs(CASES[case]["inputs"])
    all_names = {
        name.replace("layers.1", f"layers.{i}") for name in models["base"] for i in range(LAYERS)
    }
    plans = recipe.plan(
        {model: sorted(all_names) for model in recipe.models},
        dict.fromkeys(recipe.models, LAYERS),
    )
    dtype = {"float32": np.float32, "bfloat16": BF16}[recipe.dtype]
    merger = Merger(dtype, CASES[case]["seed"])
    names = recorded(case) if names is None else names
    tensors = {}
    for name in names:
        plan = plans[name]
        members = [(model, models[model][tensor]) for model, tensor in plan.members]
        base = plan.base and (plan.base[0], models[plan.base[0]][plan.base[1]])
        tensors[name] = merger.add(name, plan.method, plan.params, members, base)
    return {name: tensor[...] for name, tensor in tensors.items()}


def assert_equal(got, want):
    """Equal but for the rounding of float32."""
    assert got.shape == want.shape and got.dtype == want.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=0, atol=ROUNDINGS * np.abs(want).max())


def deltas(*models, name, kind="float32"):
    """The models less the base, float64."""
    start = inputs(kind)["base"][name].astype(np.float64)
    return np.stack([inputs(kind)[model][name] - start for model in models])


@pytest.mark.parametrize("case", EQUAL)
def test_float32(case):
    want = recorded(case)
    assert want
    for name, got in merged(case).items():
        assert_equal(got, want[name])


def test_slerp_took_both_paths():
    """Above a cosine of 0.9995 the result is linear, which the comparison can tell from an arc."""

    def cosine(model):
        first, second = (inputs("float32")[m][DOWN].astype(np.float64) for m in ("base", model))
        return (first * second).sum() / np.linalg.norm(first) / np.linalg.norm(second)

    assert cosine("b") < 0.9995 < cosine("a")
    angle = np.arccos(cosine("a"))
    shrunk = 1 - (np.sin(0.7 * angle) + np.sin(0.3 * angle)) / np.sin(angle)
    assert abs(shrunk) > 50 * ROUNDINGS


@pytest.mark.parametrize("case", HALF)
def test_bfloat16(case):
    """In bfloat16, mergekit rounds each step and we the result alone.

    So ours is the rounded result of its own float32 arithmetic, it is never farther from that than
    its bfloat16 result, and the two differ by few units of the largest values.
    """
    exact, theirs = recorded(f"{case}_exact"), recorded(f"{case}_bf16")
    for name, got in merged(f"{case}_bf16").items():
        assert got.dtype == theirs[name].dtype == BF16
        want = exact[name].astype(np.float64)
        ours, other = got.astype(np.float64), theirs[name].astype(np.float64)
        unit = 2.0 ** (np.floor(np.log2(np.abs(want))) - 7)
        slack = ROUNDINGS * np.abs(want).max()
        assert (np.abs(ours - want) <= unit / 2 + slack).all()
        assert rms(ours - want) <= rms(other - want) + slack
        assert (np.abs(ours - other) <= 2 * unit.max()).all()


def rms(x):
    return np.sqrt(np.mean(x**2))


def test_ties_keeps_the_first_of_equal_deltas():
    """Differences of bfloat16 weights repeat; mergekit's unstable sort keeps any of the equal."""
    name, models = DOWN, "abc"
    changes = np.abs(deltas(*models, name=name, kind="bfloat16"))
    cuts = [np.sort(x.reshape(-1))[-(x.size // 2)] for x in changes]
    at_cut = np.any([x == cut for x, cut in zip(changes, cuts, strict=True)], axis=0)
    got, want = merged("ties_exact", [name])[name], recorded("ties_exact")[name]
    differ = np.abs(got - want) > ROUNDINGS * np.abs(want).max()
    assert differ.any() and not differ[~at_cut].any()


def sce(name, weights):
    """SCE of "near" and "a", whose sums of squares are given as weights."""
    changes = deltas("near", "a", name=name)
    sign = np.where(changes.sum(0) >= 0, 1, -1)
    agree = np.sign(changes) == sign
    shares = agree * np.reshape(weights, (2,) + (1,) * (changes.ndim - 1))
    total = shares.sum(0)
    merged_delta = (changes * shares).sum(0) / np.where(total == 0, 1, total)
    return np.float32(inputs("float32")["base"][name] + merged_delta)


def test_sce_of_small_deltas():
    """SCE weighs by energy; mergekit takes a sum of mean squares below 1e-6 for zero.

    That is so for deltas of ordinary fine-tunes, which it then weighs equally.
    """
    ours, theirs = merged("sce_small"), recorded("sce_small")
    for name in (DOWN, NORM):
        energy = (deltas("near", "a", name=name) ** 2).reshape(2, -1).mean(1)
        assert energy.sum() < 1e-6
        assert_equal(theirs[name], sce(name, [0.5, 0.5]))
        assert_equal(ours[name], sce(name, energy / energy.sum()))
        assert np.abs(ours[name] - theirs[name]).max() > 5e-5


def test_della_on_rows_of_one():
    """A lone element mergekit ranks at 0/0; we keep it with the probability `density`."""
    assert CASES["della_thin"]["error"].startswith("RuntimeError: Expected p_in >= 0 && p_in <= 1")
    got = merged("della_thin", [DOWN])[DOWN]
    base = inputs("thin")["base"][DOWN]
    kept = got != base
    assert got.shape == (16, 1) and 0 < kept.sum() < 16
    delta = deltas("a", name=DOWN, kind="thin")[0]
    ratio = np.abs(delta).sum() / np.abs(delta[kept]).sum()
    assert_equal(got, np.float32(base + ratio * delta * kept))


@pytest.mark.parametrize("make", [recorded, merged])
@pytest.mark.parametrize("case", ["dare_linear", "dare_ties", "della_linear", "della"])
def test_random(case, make):
    """Masks differ, what they do does not: kept deltas are scaled to the L1 norm of all.

    The shares kept are within four standard deviations of density 0.5; of the larger half of each
    row, in DELLA, of 0.5 + epsilon / 2.
    """
    halves = []
    for name, result in make(case).items():
        base, delta = inputs("float32")["base"][name], deltas("a", name=name)[0]
        kept = result != base
        ratio = np.abs(delta).sum() / np.abs(delta[kept]).sum()
        assert_equal(result, np.float32(base + ratio * delta * kept))
        rows = np.abs(delta).reshape(-1, delta.shape[-1])
        large = rows.argsort(1).argsort(1) >= rows.shape[1] / 2
        halves.append([kept[large.reshape(kept.shape)], kept[~large.reshape(kept.shape)]])
    shift = 0.075 if "della" in case else 0.0
    for kept, share in zip(zip(*halves, strict=True), (0.5 + shift, 0.5 - shift), strict=True):
        draws = np.concatenate(kept)
        # Ranks within a half spread the probability, so this deviation is the largest possible.
        assert abs(draws.mean() - share) < 4 * 0.5 / np.sqrt(draws.size)


def test_seed_means_the_same_whatever_is_merged_beside():
    """There is one stream in mergekit: what is drawn for a model changes the others' masks.

    Here a model of weight 0 has density 1, for which nothing is drawn, then 0.5. Our masks
    depend on the seed, the tensor's name and the member's place alone.
    """
    base = inputs("float32")["base"]
    names = recorded("dare_linear_beside")
    alone, beside = (recorded(case) for case in ("dare_linear", "dare_linear_beside"))
    assert any(((alone[n] != base[n]) != (beside[n] != base[n])).mean() > 0.3 for n in names)
    alone, beside = (merged(case, names) for case in ("dare_linear", "dare_linear_beside"))
    for name in names:
        np.testing.assert_array_equal(alone[name], beside[name])


def arcee(base, member, kind):
    """Arcee fusion in a dtype, as mergekit writes it down."""
    x, b = member.astype(kind), base.astype(kind)
    p, q = (
        (np.exp(v) / np.exp(v).sum(-1, keepdims=True)).astype(kind) + kind(1e-8) for v in (x, b)
    )
    importance = np.abs(x - b) * (p * np.log(p / q)).sum(-1, keepdims=True)
    places = (np.array([0.25, 0.5, 0.75], np.float32) * np.float32(x.size - 1)).astype(int)
    low, median, high = np.sort(importance, axis=None)[places]
    return base + np.where(importance >= median + 1.5 * (high - low), member - base, 0)


@pytest.mark.parametrize("size", [1e-3, 1e-2, 5e-2])
def test_arcee_fusion_of_small_deltas(size):
    """The sum of p log(p / q) cancels: in float32 it is mostly rounding for ordinary fine-tunes.

    So mergekit takes other elements than its formula says; ours are those of float64.
    """
    rng = np.random.default_rng(3)
    base = (0.02 * rng.standard_normal((64, 96))).astype(np.float32)
    member = (base + size * rng.standard_normal(base.shape)).astype(np.float32)
    merger = Merger(np.float32, 0)
    got = merger.add("w", "arcee_fusion", {}, [("a", member)], ("base", base))[...]
    assert_equal(got, arcee(base, member, np.float64))
    if size == 1e-3:
        assert np.sum(got != arcee(base, member, np.float32)) > 50
