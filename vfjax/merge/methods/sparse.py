"""Merge formulas that drop a part of each delta, and those that let members vote on signs.

Most are a `Sparsifier`, which drops a part of each delta, with a consensus, which makes one delta
of what is left: see `COMBINATIONS`. Such a method returns base + scale * consensus, float32 of the
sources' shape. What its parameters mean:

* weights: K numbers.
* density: share of each delta that is kept; where elements are drawn, the (mean) probability.
* gamma: share of the outliers that are dropped.
* epsilon: half of the range of the probabilities.
* scale: multiplies the merged delta.
* normalize: divide by the sum of the weights, of those that agree where members elect signs.
* rescale: see `Rescale`.
* trim: see `Trim`.
* vote: see `Vote`.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from vfjax.errors import InputError
from vfjax.merge.methods.elementwise import divisor, from_base, select, weighted_sum
from vfjax.merge.methods.registry import Array, Each, Params, Weights, register
from vfjax.merge.methods.requests import Answers, Block, Kept, Largest, Sorted, Steps, Sum, above

Rescale = Literal["none", "density", "norm"]
"""What the kept deltas are multiplied by: nothing; the inverse of their probability of being kept,
which leaves the expectation as it was; or what restores the tensor's sum of absolute values."""
Trim = Literal["tensor", "model"]
"""Whether a share of the largest deltas is of each tensor, or of the whole model. TIES' paper trims
the whole task vector, Breadcrumbs' and mergekit each tensor."""
Vote = Literal["weighted", "plain"]
"""Whether members vote with their deltas times their weights, or with their deltas alone. TIES'
paper has no weights."""

_DRAWS = 65536.0
"""Values that a random draw takes."""


@dataclasses.dataclass(frozen=True)
class Sparsifier:
    """A way to drop a part of each delta.

    Attributes:
        masks: (deltas, block, its parameters by keyword) -> which elements of each delta are kept,
            and with which probability each was; a generator of requests.
        rescale: what is usual with it.
        options: of `register`, for methods with it.
    """

    masks: Callable[..., Steps]
    rescale: Rescale = "none"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _largest(
    deltas: list[jax.Array], block: Block, *, density: Each = 1.0, trim: Trim = "tensor"
) -> Steps:
    """Of each delta the floor(density n) largest by magnitude are kept, of equal ones the first.

    At least one, unless density is 0. TIES-Merging, arXiv 2306.01708, algorithm 1.
    """

    def ranks(params: Params, n: int, answers: Answers) -> np.ndarray:
        return np.array([[max(share > 0, _floor(share, n))] for share in params["density"]])

    cuts = yield Largest([jnp.abs(d) for d in deltas], ranks, trim == "model")
    return [above(jnp.abs(d), block.index, _cut(cuts, i, 0)) for i, d in enumerate(deltas)], _each(
        density, deltas
    )


def _inner(
    deltas: list[jax.Array],
    block: Block,
    *,
    density: Each = 1.0,
    gamma: Each = 0.01,
    trim: Trim = "tensor",
) -> Steps:
    """Of each delta the largest and the smallest elements by magnitude are dropped.

    First floor(gamma n) outliers, then the smallest until floor(density n) are left; where density
    + gamma exceeds 1, fewer outliers. Model Breadcrumbs, arXiv 2312.06795, section 3.
    """

    def ranks(params: Params, n: int, answers: Answers) -> np.ndarray:
        out = []
        for share, outliers in zip(params["density"], params["gamma"], strict=True):
            keep = _floor(share, n)
            top = 0 if keep == n else min(_floor(outliers, n), n - keep)
            out.append([top, top + keep])
        return np.array(out)

    cuts = yield Largest([jnp.abs(d) for d in deltas], ranks, trim == "model")
    masks = []
    for i, d in enumerate(deltas):
        outlier, large = (above(jnp.abs(d), block.index, _cut(cuts, i, j)) for j in (0, 1))
        masks.append(large & ~outlier)
    return masks, _each(density, deltas)


def _random(deltas: list[jax.Array], block: Block, *, density: Each = 1.0) -> Steps:
    """Of each delta elements are dropped at random.

    DARE, arXiv 2311.03099, equation 4. A draw has 16 bits, so a density is met to 1e-5.
    """
    yield from ()
    shares = _each(density, deltas)
    draws = [block.noise(i).astype(jnp.float32) for i in range(len(deltas))]
    return [draw < shares[i] * _DRAWS for i, draw in enumerate(draws)], shares


def _magprune(
    deltas: list[jax.Array], block: Block, *, density: Each = 1.0, epsilon: Each = 0.15
) -> Steps:
    """Of each delta elements are dropped at random, small ones more often than large ones.

    In a row of n, the element of rank r by magnitude (from 1) is kept with probability
    density - epsilon + 2 epsilon (r - 1) / (n - 1), all where density is 1. Equal elements have the
    highest of their ranks; a row of one element is kept with probability density. DELLA, arXiv
    2406.11617, section 3.1 (MagPrune).
    """
    shares, halves = _each(density, deltas), _each(epsilon, deltas)
    orders = yield Sorted([jnp.abs(d) for d in deltas])
    masks, kept = [], []
    for i, d in enumerate(deltas):
        size, order = jnp.abs(d), orders[i]
        half = jnp.where((shares[i] >= 1) | (shares[i] <= 0), 0.0, halves[i])
        least = shares[i] - half
        last = size.shape[-1] - 1
        draw = block.noise(i).reshape(size.shape).astype(jnp.float32) / _DRAWS
        # Kept if draw < probability(rank), which is if its rank is beyond the one solved for.
        place = (draw - least) / jnp.maximum(2 * half, 1e-6) * last
        place = jnp.clip(jnp.floor(place) + 1, -1, last + 1).astype(jnp.int32)
        there = _at(order, jnp.clip(place, 0, last))
        varied = (place <= 0) | ((place <= last) & ~(size < there))
        masks.append(jnp.where((half == 0) | (last == 0), draw < shares[i], varied))
        step = 2 * half / max(1, last)
        probability = least + step * (_not_larger(order, size) - 1)
        kept.append(jnp.where(last == 0, shares[i], probability))
    return masks, kept


def _each(value: Each, deltas: list[jax.Array]) -> jax.Array:
    return jnp.broadcast_to(jnp.asarray(value, jnp.float32), (len(deltas),))


def _check_epsilon(params: Params) -> None:
    for density, epsilon in zip(params["density"], params["epsilon"], strict=True):
        if 0 < density < 1 and not 0 < density - epsilon <= density + epsilon < 1:
            raise InputError(
                "epsilon",
                found=f"{epsilon:g} with density {density:g}",
                expected="density - epsilon and density + epsilon between 0 and 1",
                fix="choose a smaller epsilon",
            )


def add(kept: list[jax.Array], weights: jax.Array, *, normalize: bool = False) -> jax.Array:
    """The deltas are summed by their weights."""
    total = weighted_sum(kept, weights)
    return total / divisor(sum(weights[1:], weights[0])) if normalize else total


def elect(
    kept: list[jax.Array], weights: jax.Array, *, normalize: bool = False, vote: Vote = "weighted"
) -> jax.Array:
    """Members elect each position's sign, that of the sum of their votes, plus if it is 0.

    The deltas with that sign are summed by their weights. TIES-Merging, algorithm 1.
    """
    terms = [w * d for w, d in zip(weights, kept, strict=True)]
    agree = _agree(terms if vote == "weighted" else kept, terms)
    total: Any = sum(select(a, x) for x, a in zip(terms, agree, strict=True))
    if not normalize:
        return total
    return total / divisor(sum(w * a for w, a in zip(weights, agree, strict=True)))


LARGEST = Sparsifier(_largest)
INNER = Sparsifier(_inner)
RANDOM = Sparsifier(_random, "density", {"random": True})
MAGPRUNE = Sparsifier(_magprune, "density", {"rows": True, "random": True, "check": _check_epsilon})

Consensus = Callable[..., jax.Array]
COMBINATIONS: dict[str, tuple[Sparsifier, Consensus, bool]] = {
    "ties": (LARGEST, elect, True),
    "breadcrumbs": (INNER, add, False),
    "breadcrumbs_ties": (INNER, elect, False),
    "dare_linear": (RANDOM, add, False),
    "dare_ties": (RANDOM, elect, False),
    "della_linear": (MAGPRUNE, add, False),
    "della": (MAGPRUNE, elect, True),
}
"""Method -> how deltas are thinned, how one is made of them, and whether it is normalised."""


def combine(
    name: str, sparsifier: Sparsifier, consensus: Consensus, normalize: bool
) -> Callable[..., Steps]:
    """The method of a sparsifier and a consensus; its signature has the parameters of both."""
    thinning, merging = _keywords(sparsifier.masks), _keywords(consensus)
    merging["normalize"] = merging["normalize"].replace(default=normalize)

    def method(
        base: Array,
        members: Sequence[Array],
        *,
        weights: Weights,
        scale: float = 1.0,
        rescale: Rescale = sparsifier.rescale,
        block: Block,
        **params: object,
    ) -> Steps:
        def given(own: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
            return {key: params.get(key, parameter.default) for key, parameter in own.items()}

        if unknown := params.keys() - thinning.keys() - merging.keys():
            raise TypeError(f"{name}() got an unexpected keyword argument {min(unknown)!r}")
        start, deltas = from_base(base, members)
        masks, kept = yield from sparsifier.masks(deltas, block, **given(thinning))
        thinned = yield from _rescaled(deltas, masks, kept, rescale)
        return start + scale * consensus(thinned, weights, **given(merging))

    whole = inspect.signature(method).parameters.values()
    own = [x for x in whole if x.kind is not x.VAR_KEYWORD]
    described: Any = method
    described.__name__ = described.__qualname__ = name
    described.__signature__ = inspect.Signature([*own, *thinning.values(), *merging.values()])
    described.__doc__ = f"{inspect.getdoc(sparsifier.masks)}\n\n{inspect.getdoc(consensus)}"
    return method


def _keywords(fn: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(fn).parameters
    return {name: x for name, x in parameters.items() if x.kind is x.KEYWORD_ONLY}


for _name, (_sparsifier, _consensus, _normalize) in COMBINATIONS.items():
    register(**_sparsifier.options)(combine(_name, _sparsifier, _consensus, _normalize))


@register()
def sce(base: Array, members: Sequence[Array], *, select_topk: float = 1.0, block: Block) -> Steps:
    """Select by variance, calculate weights, erase minority signs: SCE of FuseChat, 2408.07990.

    The floor(select_topk v) positions with the largest variance over the members are kept, v the
    number of those where it is not 0. A member's weight is its share of the sum of squares, its
    deltas count where their sign is that of the sum (section 3.3).

    Args:
        base: float array.
        members: K arrays of its shape.
        select_topk: share of the positions that is merged; 1 keeps all.
        block: where the arrays lie in the tensor.

    Returns:
        float32 array of that shape.
    """
    start, deltas = from_base(base, members)
    count = len(deltas)
    mean = sum(deltas[1:], deltas[0]) / count
    squares = [(d - mean) ** 2 for d in deltas]
    variance = sum(squares[1:], squares[0]) / count

    def ranks(params: Params, n: int, answers: Answers) -> np.ndarray:
        share = params["select_topk"]
        return np.array([[n if share >= 1 else _floor(share, int(answers[0]))]])

    yield Sum([(variance > 0).astype(jnp.float32)], lambda sums, params, n: np.uint32(sums[0]))
    cuts = yield Largest([variance], ranks)
    selected = above(variance, block.index, _cut(cuts, 0, 0))
    kept = [select(selected, d) for d in deltas]
    shares = yield Sum([d * d for d in kept], _shares)
    agree = _agree(kept, kept)
    total = sum(w * a for w, a in zip(shares, agree, strict=True))
    merged = weighted_sum([select(a, d) for d, a in zip(kept, agree, strict=True)], shares)
    return start + merged / jnp.where(total == 0, 1.0, total)


def _shares(sums: np.ndarray, params: Params, n: int) -> np.ndarray:
    total = sums.sum()
    return np.asarray(sums / (total or 1.0), np.float32)


def _floor(share: float, n: int) -> int:
    """floor(share n), of the decimal number that the float32 was read from."""
    return min(n, max(0, int(float(str(np.float32(share))) * n)))


def _cut(cuts: tuple[Array, Array], member: int, which: int) -> tuple[Array, Array]:
    return cuts[0][member, which], cuts[1][member, which]


def _at(rows: jax.Array, places: jax.Array) -> jax.Array:
    return jnp.take_along_axis(rows, places, axis=-1)


def _not_larger(order: jax.Array, values: jax.Array) -> jax.Array:
    """How many elements of an ordered row are at most each value: a search by bits."""
    width = order.shape[-1]
    bits = width.bit_length()

    def step(i: jax.Array, count: jax.Array) -> jax.Array:
        more = count + (1 << (bits - 1 - i))
        fits = (more <= width) & (_at(order, jnp.minimum(more, width) - 1) <= values)
        return jnp.where(fits, more, count)

    return jax.lax.fori_loop(0, bits, step, jnp.zeros(values.shape, jnp.int32))


def _rescaled(
    deltas: list[jax.Array], masks: list[jax.Array], kept: Sequence[Any], rescale: Rescale
) -> Steps:
    """The masked deltas, rescaled."""
    if rescale == "norm":  # in two passes, of which the second need not draw, sort or rank again
        found = yield Kept(masks)
        masks = [mask.reshape(d.shape) for d, mask in zip(deltas, found, strict=True)]
    masked = [select(mask, d) for d, mask in zip(deltas, masks, strict=True)]
    if rescale == "density":
        return [d / jnp.maximum(p, 1e-6) for d, p in zip(masked, kept, strict=True)]
    if rescale == "norm":
        ratios = yield Sum([jnp.abs(d) for d in [*deltas, *masked]], _ratios)
        return [d * r for d, r in zip(masked, ratios, strict=True)]
    return masked


def _ratios(sums: np.ndarray, params: Params, n: int) -> np.ndarray:
    before, after = np.split(sums, 2)
    return np.asarray(np.where(after > 0, before / np.where(after > 0, after, 1), 1), np.float32)


def _agree(votes: Sequence[Any], terms: Sequence[Any]) -> list[jax.Array]:
    """Which terms have the sign of the votes' sum, plus if it is 0."""
    positive = sum(votes[1:], votes[0]) >= 0
    return [jnp.where(positive, x > 0, x < 0) for x in terms]
