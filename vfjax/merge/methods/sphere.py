"""Merge formulas on the sphere. All are weighted sums whose weights follow from inner products.

So one pass finds the inner products, in float64 on the host the weights follow from them, and a
second pass sums. The products of a row or of a column are in float32.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vfjax.merge.methods.elementwise import from_base, weighted_sum
from vfjax.merge.methods.registry import Array, Params, Weights, register
from vfjax.merge.methods.requests import Block, Steps, Sum


def _origin(base: Array | None, members: Sequence[Array]) -> tuple[jax.Array | float, list]:
    """The base, or 0 without one, and the members as seen from it, in float32."""
    return from_base(0.0 if base is None else base, members)


def _gram(
    arrays: Sequence[jax.Array],
    solve: Callable[[np.ndarray, Params], np.ndarray],
    *,
    columns: bool = False,
) -> Sum:
    """Asks for weights that `solve` finds from the inner products, float64[..., K, K]."""
    count = len(arrays)
    upper = np.triu_indices(count)

    def solve_sums(sums: np.ndarray, params: Params, size: int) -> np.ndarray:
        gram = np.empty((*sums.shape[1:], count, count))
        gram[..., upper[0], upper[1]] = gram[..., upper[1], upper[0]] = np.moveaxis(sums, 0, -1)
        return solve(gram, params).astype(np.float32)

    products = [arrays[i] * arrays[j] for i in range(count) for j in range(i, count)]
    return Sum(products, solve_sums, columns)


@register(takes=(2, 2))
def slerp(members: Sequence[Array], *, t: float, block: Block) -> Steps:
    """(sin((1 - t) a) x_0 + sin(t a) x_1) / sin a, where a is the angle between the two tensors.

    Spherical linear interpolation, Shoemake 1985 ("Animating rotation with quaternion curves"),
    with the lengths left as they are; linear where cos a exceeds 0.9995, as in mergekit's slerp.py.

    Args:
        members: two float arrays of one shape.
        t: 0 gives the first, 1 the second.
        block: unused.

    Returns:
        float32 array of that shape.
    """
    _, arrays = _origin(None, members)

    def solve(gram: np.ndarray, params: Params) -> np.ndarray:
        return _arc(gram, float(params["t"]), 1 - 0.9995)

    weights = yield _gram(arrays, solve)
    return weighted_sum(arrays, weights)


@register(rows=True, takes=(2, 2))
def nuslerp(
    base: Array | None,
    members: Sequence[Array],
    *,
    weights: Weights,
    flatten: bool = True,
    row_wise: bool = False,
    block: Block,
) -> Steps:
    """`slerp` by t = w_1 / (w_0 + w_1), of the deltas where there is a base.

    As mergekit's nuslerp.py has it: t is 0.5 if the weights cancel, and only vectors that are
    parallel, or opposite, are interpolated linearly.

    Args:
        base: float array or None.
        members: two arrays of its shape.
        weights: two numbers.
        flatten: one angle a tensor; otherwise one for each vector along the last axis.
        row_wise: if not `flatten`, one for each vector along the first axis instead. A vector has
            one angle either way.
        block: says whether the tensor is a vector.

    Returns:
        float32 array of that shape.
    """
    start, arrays = _origin(base, members)

    def solve(gram: np.ndarray, params: Params) -> np.ndarray:
        first, second = params["weights"].astype(np.float64)
        total = first + second
        return _arc(gram, 0.5 if abs(total) < 1e-6 else second / total, None)

    if flatten or row_wise:
        found = yield _gram(arrays, solve, columns=not (flatten or block.is_vector))
        return start + weighted_sum(arrays, jnp.moveaxis(found, -1, 0))
    total = weights[0] + weights[1]
    t = jnp.where(jnp.abs(total) < 1e-6, 0.5, weights[1] / jnp.where(total == 0, 1.0, total))
    norms = [jnp.maximum(jnp.sqrt(jnp.sum(x * x, -1, keepdims=True)), 1e-7) for x in arrays]
    cosine = jnp.sum(arrays[0] / norms[0] * (arrays[1] / norms[1]), -1, keepdims=True)
    angle = jnp.arccos(jnp.clip(cosine, -1.0, 1.0))
    sine = jnp.sin(angle)
    parallel = (sine < 1e-8) | (cosine < 1e-6 - 1)
    sine = jnp.where(parallel, 1.0, sine)
    first = jnp.where(parallel, 1 - t, jnp.sin((1 - t) * angle) / sine)
    second = jnp.where(parallel, t, jnp.sin(t * angle) / sine)
    return start + first * arrays[0] + second * arrays[1]


def _arc(gram: np.ndarray, t: float, parallel: float | None) -> np.ndarray:
    """Weights of two vectors, float64[..., 2]; `parallel` is the least 1 - |cosine| of an arc."""
    norms = np.sqrt(np.einsum("...ii->...i", gram))
    norms = np.maximum(norms, 1e-7)
    cosine = np.clip(gram[..., 0, 1] / (norms[..., 0] * norms[..., 1]), -1, 1)
    angle = np.arccos(cosine)
    sine = np.sin(angle)
    # Of opposite vectors the arc is not defined, and near to them the weights grow without bound.
    straight = 1 - np.abs(cosine) < parallel if parallel else cosine < 1e-6 - 1
    straight |= sine < 1e-8
    sine = np.where(straight, 1, sine)
    first = np.where(straight, 1 - t, np.sin((1 - t) * angle) / sine)
    second = np.where(straight, t, np.sin(t * angle) / sine)
    return np.stack([first, second], -1)


@register()
def multislerp(
    base: Array | None,
    members: Sequence[Array],
    *,
    weights: Weights,
    normalize: bool = True,
    block: Block,
) -> Steps:
    """Weighted mean in the tangent space at the normalised mean direction, times the mean length.

    With u_i = x_i / |x_i|, m = sum_i w_i u_i normalised and T = sum_i w_i (u_i - <u_i, m> m):
    (cos|T| m + sin|T| T / |T|) sum_i w_i |x_i|, of the deltas where there is a base. As mergekit's
    multislerp.py has it (goddard.blog, "Multi-SLERP").

    Args:
        base: float array or None.
        members: K arrays of its shape.
        weights: K numbers.
        normalize: divide the weights by their sum.
        block: unused.

    Returns:
        float32 array of that shape. Members whose directions cancel are averaged.
    """
    start, arrays = _origin(base, members)

    def solve(gram: np.ndarray, params: Params) -> np.ndarray:
        shares = params["weights"].astype(np.float64)
        if params["normalize"]:
            shares = shares / shares.sum()
        norms = np.sqrt(np.diag(gram))
        units = gram / _outer(norms)
        mean = _unit(shares, units)
        if mean is None:
            return shares
        dots = units @ mean
        tangent = shares - (shares * dots).sum() * mean
        coefficients = _exponential(mean, tangent, units)
        return coefficients * (shares @ norms) / _safe(norms)

    found = yield _gram(arrays, solve)
    return start + weighted_sum(arrays, found)


@register()
def karcher(
    members: Sequence[Array], *, max_iter: float = 10, tol: float = 1e-5, block: Block
) -> Steps:
    """The Karcher mean of the directions, times the mean length.

    From the normalised mean u: T = mean_i a_i / sin a_i (u_i - cos a_i u), a_i the angle of u and
    u_i; u <- cos|T| u + sin|T| T / |T|, until |T| < tol. Karcher 1977; as mergekit's karcher.py has
    it, in which members of zero length have no direction.

    Args:
        members: K float arrays of one shape.
        max_iter: most steps.
        tol: radians.
        block: unused.

    Returns:
        float32 array of that shape.
    """
    _, arrays = _origin(None, members)

    def solve(gram: np.ndarray, params: Params) -> np.ndarray:
        norms = np.sqrt(np.diag(gram))
        tol = float(params["tol"])
        shares = (norms > tol).astype(np.float64)
        shares /= max(1.0, shares.sum())
        units = gram / _outer(norms)
        mean = _unit(shares, units)
        if mean is None:
            mean = np.eye(len(norms))[int(np.argmax(norms > tol))]
        for _ in range(int(params["max_iter"])):
            cosines = np.clip(units @ mean, -1, 1)
            angles = np.arccos(cosines)
            pull = np.where(angles < tol, 0, shares * angles / _safe(np.sin(angles)))
            tangent = pull - (pull @ cosines) * mean
            if _length(tangent, units) < tol:
                break
            mean = _exponential(mean, tangent, units)
            mean /= _length(mean, units)
        return mean * norms.mean() / _safe(norms)

    found = yield _gram(arrays, solve)
    return weighted_sum(arrays, found)


@register(rows=True, takes=(2, None))
def model_stock(
    base: Array, members: Sequence[Array], *, filter_wise: bool = False, block: Block
) -> Steps:
    """T mean_i(x_i) + (1 - t) base, with t = N c / (1 + (N - 1) c), c the deltas' mean cosine.

    Model Stock, arXiv 2403.19522, equation 5. The mean of the cosine is over all pairs of members.

    Args:
        base: float array.
        members: N arrays of its shape.
        filter_wise: one cosine a row, instead of one a tensor.
        block: unused.

    Returns:
        float32 array of that shape.
    """
    start, deltas = _origin(base, members)
    count = len(deltas)
    pairs = [(i, j) for i in range(count) for j in range(i)]
    if filter_wise:
        norms = [jnp.sqrt(jnp.sum(x * x, -1, keepdims=True)) for x in deltas]
        cosines = [
            jnp.sum(deltas[i] * deltas[j], -1, keepdims=True)
            / jnp.maximum(norms[i] * norms[j], 1e-12)
            for i, j in pairs
        ]
        cosine = sum(jnp.clip(c, -1.0, 1.0) for c in cosines) / len(pairs)
        shares = count * cosine / (1 + (count - 1) * cosine)
        return start + shares * sum(deltas) / count

    def solve(gram: np.ndarray, params: Params) -> np.ndarray:
        units = np.clip(gram / _outer(np.sqrt(np.diag(gram))), -1, 1)
        cosine = np.mean([units[i, j] for i, j in pairs])
        return np.asarray(cosine / (1 + (count - 1) * cosine))

    share = yield _gram(deltas, solve)
    return start + share * sum(deltas[1:], deltas[0])


def _safe(x: np.ndarray) -> np.ndarray:
    return np.where(x == 0, 1, x)


def _outer(norms: np.ndarray) -> np.ndarray:
    return _safe(np.outer(norms, norms))


def _length(coefficients: np.ndarray, gram: np.ndarray) -> float:
    return float(np.sqrt(max(0.0, coefficients @ gram @ coefficients)))


def _unit(coefficients: np.ndarray, gram: np.ndarray) -> np.ndarray | None:
    """A sum of vectors, by its coefficients, at length 1; None if it cancels."""
    length = _length(coefficients, gram)
    return None if length < 1e-8 else coefficients / length


def _exponential(mean: np.ndarray, tangent: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """The exponential map of the sphere at `mean`, by coefficients."""
    length = _length(tangent, gram)
    return mean * np.cos(length) + tangent * np.sinc(length / np.pi)
