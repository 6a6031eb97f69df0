"""Merge formulas that read whole matrices.

Matrices are [out, in], as checkpoints store them. A tensor that is not a matrix gets
base + scale * mean of the deltas, as in the official code of each method; so does the head under
WUDI and OptMerge, by its name. Products run at highest
precision: accelerators would otherwise round their operands below float32.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vfjax.merge.methods.elementwise import from_base
from vfjax.merge.methods.registry import Array, register

COMMON = 0.8
"""Share of the rank that Iso-CTS gives to the common subspace (the paper's choice)."""
HEAD = ("lm_head",)
"""What WUDI and OptMerge do not optimise, though it is a matrix."""
MIN_COSINE = 1e-5
"""Singular values of a stack of unit vectors below this are rounding."""


@register(whole=True, averages=HEAD)
def wudi(
    base: Array,
    members: Sequence[Array],
    *,
    steps: float = 300.0,
    learning_rate: float = 1e-5,
    scale: float = 1.0,
) -> jax.Array:
    """Base + scale * tau, tau minimising sum_i |(tau - tau_i) tau_i^T|^2 / |tau_i|^2 by Adam.

    WUDI-Merging, arXiv 2503.08099, as `wudi_merging` of WalkerWorldPeace/MLLMerging has it: tau
    starts at the sum of the deltas tau_i. A member equal to the base takes no part. A tensor that
    is not a matrix, and the head: see the module. Their scripts also keep the base's embeddings,
    norms and biases, which rules can say.

    Args:
        base: float array, the pretrained weights.
        members: K arrays of its shape, fine-tuned from it.
        steps: of Adam, a whole number.
        learning_rate: of Adam; no entry moves farther than about steps * learning_rate.
        scale: multiplies the merged delta.

    Returns:
        float32 array of that shape.
    """
    start, deltas = from_base(base, members)
    if start.ndim != 2:
        return start + scale * _mean(deltas)
    return start + scale * _disentangle(deltas, deltas, deltas, steps, learning_rate)


@register(whole=True, averages=HEAD)
def optmerge(
    base: Array,
    members: Sequence[Array],
    *,
    steps: float = 300.0,
    learning_rate: float = 1e-5,
    scale: float = 1.0,
) -> jax.Array:
    """WUDI on denoised deltas, of rank k = max(1, rank // K).

    Minimises sum_i |(tau - t_i) (S_i V_i^T)^T|^2 / |tau_i|^2, where U_i S_i V_i^T is the rank-k SVD
    of tau_i, and t_i is the mean delta plus the rank-k SVD of tau_i - mean. OptMerge, arXiv
    2505.19892, as `wudi_merging2` of WalkerWorldPeace/MLLMerging (InternVL) has it: tau starts at
    the sum of the deltas. The head, a tensor that is not a matrix, and their scripts: see `wudi`.

    Args:
        base: float array, the pretrained weights.
        members: K arrays of its shape, fine-tuned from it.
        steps: of Adam, a whole number.
        learning_rate: of Adam.
        scale: multiplies the merged delta.

    Returns:
        float32 array of that shape.
    """
    start, deltas = from_base(base, members)
    mean = _mean(deltas)
    if start.ndim != 2:
        return start + scale * mean
    k = max(1, min(start.shape) // len(deltas))
    targets, features = [], []
    for delta in deltas:
        _, s, vt = _svd(delta)
        features.append(s[:k, None] * vt[:k])
        u, s, vt = _svd(delta - mean)
        targets.append(_mul(u[:, :k] * s[:k], vt[:k]) + mean)
    return start + scale * _disentangle(deltas, targets, features, steps, learning_rate)


@register(whole=True)
def tsv(base: Array, members: Sequence[Array], *, scale: float = 1.0) -> jax.Array:
    """Base + scale * U_perp S V_perp^T, of each delta's top max(1, rank // K) singular triples.

    U holds all members' left vectors; U_perp is the nearest matrix with orthonormal columns, P Q^T
    of U's SVD P D Q^T; V_perp likewise. Task singular vectors (TSV-Merge), arXiv 2412.00081, as
    `compute_and_sum_svd_mem_reduction` of AntoAndGar/task_singular_vectors has it. A member equal
    to the base takes no part. A tensor that is not a matrix: see the module.

    Args:
        base: float array, the pretrained weights.
        members: K arrays of its shape, fine-tuned from it.
        scale: multiplies the merged delta.

    Returns:
        float32 array of that shape.
    """
    start, deltas = from_base(base, members)
    if start.ndim != 2:
        return start + scale * _mean(deltas)
    k = max(1, min(start.shape) // len(deltas))
    u, s, vt = _stack([_top(delta, k) for delta in deltas])
    return start + scale * _mul(_whiten(u) * s, _whiten(vt))


@register(whole=True)
def iso(base: Array, members: Sequence[Array], *, scale: float = 1.0) -> jax.Array:
    """Base + scale * mean(S) U V^T, where U S V^T is the SVD of the deltas' sum.

    Isotropic merging in the common subspace (Iso-C), arXiv 2502.04959, as `iso_c` of
    danielm1405/iso-merging has it. If the sum lacks full rank, the SVD chooses the directions it
    lacks. A tensor that is not a matrix: see the module.

    Args:
        base: float array, the pretrained weights.
        members: K arrays of its shape, fine-tuned from it.
        scale: multiplies the merged delta.

    Returns:
        float32 array of that shape.
    """
    start, deltas = from_base(base, members)
    if start.ndim != 2:
        return start + scale * _mean(deltas)
    u, s, vt = _svd(_sum(deltas))
    return start + scale * _mul(u * s.mean(), vt)


@register(whole=True)
def iso_cts(base: Array, members: Sequence[Array], *, scale: float = 1.0) -> jax.Array:
    """Iso-C on common and task-specific directions together.

    The common ones are the top singular vectors of the deltas' sum, about `COMMON` of the rank; the
    rest of the rank is shared equally among the members, which give the top singular vectors of
    their deltas less the common left subspace. All are made orthonormal as in `tsv` and get the
    mean of their singular values. Iso-CTS, arXiv 2502.04959; sizes as `iso_cts` of
    danielm1405/iso-merging rounds them. A member equal to the base gives no direction. A tensor
    that is not a matrix: see the module.

    Args:
        base: float array, the pretrained weights.
        members: K arrays of its shape, fine-tuned from it.
        scale: multiplies the merged delta.

    Returns:
        float32 array of that shape.
    """
    start, deltas = from_base(base, members)
    if start.ndim != 2:
        return start + scale * _mean(deltas)
    rank = min(start.shape)
    specific = round((rank - int(rank * COMMON)) / len(deltas))
    common = _top(_sum(deltas), rank - specific * len(deltas))
    shared = common[0]
    residuals = [delta - _mul(shared, _mul(shared.T, delta)) for delta in deltas]
    u, s, vt = _stack([*(_top(residual, specific) for residual in residuals), common])
    return start + scale * _mul(_whiten(u) * s.mean(), _whiten(vt))


def _sum(deltas: list[jax.Array]) -> jax.Array:
    return sum(deltas[1:], deltas[0])


def _mean(deltas: list[jax.Array]) -> jax.Array:
    return _sum(deltas) / len(deltas)


def _mul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision="highest")


def _disentangle(
    deltas: list[jax.Array],
    targets: list[jax.Array],
    features: list[jax.Array],
    steps: float,
    learning_rate: float,
) -> jax.Array:
    """Adam from sum_i tau_i on sum_i |(tau - target_i) feature_i^T|^2 / |tau_i|^2.

    The gradient is 2 sum_i (tau - target_i) G_i, G_i = feature_i^T feature_i / |tau_i|^2. The Gram
    matrices are [in, in], so that an embedding makes no [vocabulary, vocabulary] product. With
    tau = sum_i tau_i + step it is 2 (step G + pull), G = sum_i G_i: one product an iteration
    whatever K, and exactly zero where nothing interferes (Adam would blow rounding up).
    """
    total = _sum(deltas)
    gram = jnp.zeros((total.shape[1], total.shape[1]), jnp.float32)
    pull = jnp.zeros_like(total)
    for delta, target, feature in zip(deltas, targets, features, strict=True):
        norm = jnp.sum(delta * delta)
        # A NaN is not less, and stays.
        inverse = jnp.where(norm < jnp.finfo(jnp.float32).tiny, 0.0, 1.0 / norm)
        mine = inverse * _mul(feature.T, feature)
        gram += mine
        pull += _mul(total - target, mine)

    adam = optax.adam(learning_rate)

    def iterate(_: jax.Array, carry: tuple[Any, optax.OptState]) -> tuple[Any, optax.OptState]:
        step, state = carry
        updates, state = adam.update(2.0 * (_mul(step, gram) + pull), state)
        return step + updates, state

    step = jnp.zeros_like(total)
    count = jnp.asarray(steps, jnp.float32).astype(jnp.int32)
    return total + jax.lax.fori_loop(0, count, iterate, (step, adam.init(step)))[0]


def _svd(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Thin SVD; all singular values are NaN if x is not finite, on which solvers differ."""
    finite = jnp.isfinite(x).all()
    u, s, vt = jnp.linalg.svd(jnp.where(finite, x, 0.0), full_matrices=False)
    return u, jnp.where(finite, s, jnp.nan), vt


def _top(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The top k singular triples; zeros for those of strength zero, which have no direction."""
    u, s, vt = _svd(x)
    real = s[:k] > 0
    return u[:, :k] * real, s[:k], vt[:k] * real[:, None]


def _stack(triples: list[tuple[jax.Array, ...]]) -> tuple[jax.Array, jax.Array, jax.Array]:
    us, ss, vts = zip(*triples, strict=True)
    return jnp.concatenate(us, axis=1), jnp.concatenate(ss), jnp.concatenate(vts)


def _whiten(x: jax.Array) -> jax.Array:
    """Nearest matrix with orthonormal columns (or rows), in the span of x.

    Outside the span (a zero column, two equal ones) the SVD's vectors are arbitrary, and left out.
    """
    p, d, qt = _svd(x)
    return _mul(p * (d > MIN_COSINE), qt)
