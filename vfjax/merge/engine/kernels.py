"""What is compiled: a formula on a block of a tensor, or on all of it."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vfjax.merge.engine import passes
from vfjax.merge.methods.registry import Array, Flags, Method


def advance(
    sources: Sequence[Array],
    values: Mapping[str, Array],
    answers: Sequence[Any],
    start: Any,
    words: Any,
    *,
    method: Method,
    flags: Flags,
    has_base: bool,
    width: int | None,
    is_vector: bool,
) -> Any:
    """`passes.advance` on sources in one list, the base first if `has_base`."""
    size = sources[0].size
    block = passes.Block(jnp.asarray(start, jnp.uint32), words, size, is_vector)
    params = {**values, **dict(flags)}
    base, members = (sources[0], sources[1:]) if has_base else (None, sources)
    return passes.advance(method, base, members, params, tuple(answers), block, width)


draw = functools.partial(jax.jit, static_argnames=("size",))(passes.draw)
"""A call of its own: XLA would draw again for every use in a kernel."""

STATIC = ("method", "flags", "has_base", "dtype", "width", "is_vector")


@functools.partial(jax.jit, static_argnames=STATIC)
def block_kernel(
    sources: Sequence[Array],
    values: Mapping[str, Array],
    answers: Sequence[Any],
    start: Array,
    words: Any,
    *,
    dtype: np.dtype,
    **static: Any,
) -> jax.Array:
    """A block of the result, in its dtype, or what the block adds to the next answer."""
    result = advance(sources, values, answers, start, words, **static)
    return (
        result.astype(dtype)
        if isinstance(result, jax.Array)
        else passes.partial(result, static["width"])
    )


@functools.partial(jax.jit, static_argnames=STATIC)
def whole_kernel(
    sources: Sequence[Array],
    values: Mapping[str, Array],
    *,
    method: Method,
    flags: Flags,
    has_base: bool,
    dtype: np.dtype,
    width: None,
    is_vector: bool,
) -> jax.Array:
    """The whole result, in its dtype."""
    base, members = (sources[0], sources[1:]) if has_base else (None, sources)
    return method(base, members, **values, **dict(flags)).astype(dtype)
