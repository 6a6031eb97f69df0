"""Merge formulas that read one position at a time."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from vfjax.merge.methods.registry import Array, Weights, register


@register()
def linear(members: Sequence[Array], *, weights: Weights, normalize: bool = True) -> jax.Array:
    """sum_i w_i x_i, over sum_i w_i if `normalize`.

    Model soups, arXiv 2203.05482, section 2 (the uniform soup has equal weights).

    Args:
        members: K float arrays of one shape.
        weights: K numbers.
        normalize: divide by the weights' sum.

    Returns:
        float32 array of that shape.
    """
    scaled = jnp.asarray(weights, jnp.float32)
    if not normalize:
        return weighted_sum(members, scaled)
    # Relative to the largest, equal weights are exactly 1 whatever their value, and the midpoint of
    # two members is exact.
    scaled = scaled / jnp.abs(scaled).max()
    return weighted_sum(members, scaled) / scaled.sum()


@register()
def task_arithmetic(
    base: Array,
    members: Sequence[Array],
    *,
    weights: Weights,
    scale: float = 1.0,
    normalize: bool = False,
) -> jax.Array:
    """Base + scale * sum_i w_i (x_i - base).

    Task arithmetic, arXiv 2212.04089, section 2; what VisionFuse, arXiv 2412.01289, merges its
    members' LLMs with.

    Args:
        base: float array, the pretrained weights.
        members: K arrays of its shape, fine-tuned from it.
        weights: K numbers.
        scale: multiplies the summed deltas.
        normalize: divide by the sum of the weights.

    Returns:
        float32 array of that shape.
    """
    start, deltas = from_base(base, members)
    scaled = jnp.asarray(weights, jnp.float32)
    total = weighted_sum(deltas, scaled)
    return start + scale * (total / divisor(scaled.sum()) if normalize else total)


@register(takes=(1, 1))
def passthrough(members: Sequence[Array], *, scale: float = 1.0) -> jax.Array:
    """Scale * x: one member as it is.

    Args:
        members: one float array.
        scale: multiplies it.

    Returns:
        float32 array of that shape.
    """
    return scale * jnp.asarray(members[0], jnp.float32)


@register(takes=(1, 1))
def nearswap(base: Array, members: Sequence[Array], *, t: float) -> jax.Array:
    """Base + min(1, t / |delta|) * delta: the member where it is within t of the base.

    Farther away the step from the base has length t. The method of alchemonaut's "QuartetAnemoi",
    as mergekit's nearswap.py has it.

    Args:
        base: float array.
        members: one array of its shape.
        t: largest step, in units of the weights.

    Returns:
        float32 array of that shape.
    """
    start = jnp.asarray(base, jnp.float32)
    delta = jnp.asarray(members[0], jnp.float32) - start
    return start + jnp.clip(t / jnp.maximum(jnp.abs(delta), 1e-6), 0.0, 1.0) * delta


def from_base(base: Array | float, members: Sequence[Array]) -> tuple[jax.Array, list[jax.Array]]:
    """The base and the members' deltas from it, in float32.

    Args:
        base: float array.
        members: K arrays of its shape.
    """
    start = jnp.asarray(base, jnp.float32)
    return start, [jnp.asarray(x, jnp.float32) - start for x in members]


def select(mask: jax.Array, x: jax.Array) -> jax.Array:
    """x, or 0 outside the mask; but NaN where x is not finite. (XLA makes x * mask a selection.)"""
    return jnp.where(mask, x, 0.0 * x)


def divisor(total: jax.Array) -> jax.Array:
    """The sum of weights, or 1 where they cancel."""
    return jnp.where(jnp.abs(total) < 1e-8, 1.0, total)


def weighted_sum(arrays: Sequence[Array], weights: jax.Array) -> jax.Array:
    """sum_i w_i x_i in float32, in the members' order.

    Args:
        arrays: K float arrays of one shape.
        weights: K numbers.
    """
    terms = [w * jnp.asarray(x, jnp.float32) for w, x in zip(weights, arrays, strict=True)]
    return sum(terms[1:], terms[0])
