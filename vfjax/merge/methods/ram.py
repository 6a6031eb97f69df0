"""Merge formulas that keep the deltas which matter, by their size against the others'."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vfjax.merge.methods.elementwise import from_base, select
from vfjax.merge.methods.registry import Array, Params, register
from vfjax.merge.methods.requests import Answers, Block, Largest, Steps, Sum


@register()
def ram(base: Array, members: Sequence[Array], *, epsilon: float = 1e-5) -> jax.Array:
    """Mean of the deltas that are not about 0: what one member alone learned is kept whole.

    Reinforced Agent Merging, arXiv 2601.13572, as mergekit's ram.py has it.

    Args:
        base: float array.
        members: K arrays of its shape.
        epsilon: a delta up to this magnitude is none.

    Returns:
        float32 array of that shape.
    """
    start, deltas = from_base(base, members)
    active, count = _active(deltas, epsilon)
    total = sum(select(a, d) for d, a in zip(deltas, active, strict=True))
    return start + total / jnp.maximum(count, 1.0)


@register()
def ramplus_tl(
    base: Array,
    members: Sequence[Array],
    *,
    r: float = 0.1,
    alpha: float = 0.2,
    epsilon: float = 1e-5,
    block: Block,
) -> Steps:
    """`ram`, with what one member alone learned amplified by how much of its own is shared.

    RAM+ of arXiv 2601.13572, its overlap counted in each tensor, as mergekit's ram.py has it. A
    member's own deltas are multiplied by 1 + r min(alpha, shared / own), numbers of its positions
    that others change too and that they do not.

    Args:
        base: float array.
        members: K arrays of its shape.
        r: strength of the amplification.
        alpha: largest ratio that counts.
        epsilon: a delta up to this magnitude is none.
        block: unused.

    Returns:
        float32 array of that shape.
    """
    start, deltas = from_base(base, members)
    active, count = _active(deltas, epsilon)
    shared = [(a & (count > 1)).astype(jnp.float32) for a in active]
    own = [(a & (count == 1)).astype(jnp.float32) for a in active]

    def factors(sums: np.ndarray, params: Params, n: int) -> np.ndarray:
        both, alone = np.split(sums, 2)
        ratios = both / np.maximum(alone, params["epsilon"])
        return np.asarray(1 + params["r"] * np.clip(ratios, 0, params["alpha"]), np.float32)

    amplified = yield Sum([*shared, *own], factors)
    terms = [
        select(a, jnp.where(count > 1, d / jnp.maximum(count, 1.0), d * amplified[i]))
        for i, (d, a) in enumerate(zip(deltas, active, strict=True))
    ]
    return start + sum(terms[1:], terms[0])


def _bregman(u: jax.Array) -> jax.Array:
    """(1 + u) log(1 + u) - u, from its series about 0, where the terms cancel."""
    near = jnp.where(jnp.abs(u) < 0.25, u, 0.0)
    series = sum((-near) ** k / (k * (k - 1)) for k in range(2, 12))
    return jnp.where(jnp.abs(u) < 0.25, series, (1 + u) * jnp.log1p(u) - u)


def _active(deltas: list[jax.Array], epsilon: float) -> tuple[list[jax.Array], Any]:
    """Where each delta is more than epsilon, and of how many members that is so."""
    active = [~(jnp.abs(d) <= epsilon) for d in deltas]
    return active, sum(a.astype(jnp.float32) for a in active)


@register(rows=True, takes=(1, 1))
def arcee_fusion(base: Array, members: Sequence[Array], *, block: Block) -> Steps:
    """The deltas that matter: |delta| times their row's divergence, from median + 1.5 IQR upwards.

    The divergence is KL(softmax(member's row) || softmax(base's row)), of probabilities to which
    1e-8 is added. As mergekit's arcee_fusion.py has it, with quantiles of all elements instead of a
    sample, and without its cancellation: of the deltas of a usual fine-tune it is mostly rounding.

    Args:
        base: float array.
        members: one array of its shape.
        block: unused.

    Returns:
        float32 array of that shape.
    """
    start, (delta,) = from_base(base, members)
    share = jax.nn.softmax(start, axis=-1)
    grown = jnp.log1p(jnp.sum(share * jnp.expm1(delta), axis=-1, keepdims=True))
    ratio = share * jnp.expm1(delta - grown) / (share + 1e-8)  # p / q - 1
    # sum p log(p / q) = sum q ((1 + u) log(1 + u) - u), as sum p = sum q: no term is negative
    divergence = jnp.sum((share + 1e-8) * _bregman(ratio), axis=-1, keepdims=True)
    importance = jnp.abs(delta) * divergence

    def ranks(params: Params, n: int, answers: Answers) -> np.ndarray:
        # In float32, as the peer rounds its positions; from the largest.
        places = (np.array([0.5, 0.25, 0.75], np.float32) * np.float32(n - 1)).astype(np.int64)
        return n - np.minimum(places, n - 1)[None]

    cuts = yield Largest([importance], ranks)
    median, low, high = cuts[0][0]
    return start + select(~(importance < median + 1.5 * (high - low)), delta)
