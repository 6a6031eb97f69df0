"""What is compiled: a formula on a block of a tensor, or on all of it."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vfjax.merge.methods.registry import Array, Flags, Method
from vfjax.merge.methods.requests import Answer, Block, Kept, Largest, Request, Sorted, Sum

LANES = 1024
"""Partial sums of a block: element i goes to lane i mod 1024, in order."""

STATIC = ("method", "flags", "has_base", "dtype", "width", "is_vector")


@functools.partial(jax.jit, static_argnames=STATIC)
def block_kernel(
    sources: Sequence[Array],
    values: Mapping[str, Array],
    answers: Sequence[Answer | None],
    start: Array,
    words: jax.Array | None,
    *,
    method: Method,
    flags: Flags,
    has_base: bool,
    dtype: np.dtype,
    width: int | None,
    is_vector: bool,
) -> jax.Array | tuple[jax.Array, ...]:
    """A block of the result, in its dtype, or what the block adds to the next answer.

    Args:
        sources: flat arrays, see `advance`.
        values: numbers of the method.
        answers: to its first requests; None to a `Sorted` that no later step needs.
        start: flat index in the tensor of the block's first element.
        words: random, of `draw`; None where none are drawn.
        method: see `advance`.
        flags: see `advance`.
        has_base: see `advance`.
        dtype: of the result.
        width: see `advance`.
        is_vector: see `advance`.
    """
    result = advance(
        sources,
        values,
        answers,
        start,
        words,
        method=method,
        flags=flags,
        has_base=has_base,
        width=width,
        is_vector=is_vector,
    )
    return result.astype(dtype) if isinstance(result, jax.Array) else partial_answer(result, width)


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
    """The whole result, in its dtype, of a method that takes full tensors."""
    base, members = (sources[0], sources[1:]) if has_base else (None, sources)
    return method(base, members, **values, **dict(flags)).astype(dtype)


@functools.partial(jax.jit, static_argnames=("size",))
def draw(start: Array, keys: Array, size: int) -> jax.Array:
    """Random words of a block: Threefry 2x32 with half of the flat index as counter.

    So a draw depends on the key and the index alone, not on how the tensor is cut. A counter makes
    two words, of an even index and the odd one behind it: those of JAX's own generator, which is
    called for whole arrays alone, and takes twice the time. The caller hands the words to
    `block_kernel`: in one fusion with a gather, XLA's CPU backend would draw them one by one.

    Args:
        start: uint32, flat index in the tensor of the block's first element.
        keys: uint32[m, 2].
        size: number of elements.

    Returns:
        uint32[m, size].
    """
    index = jnp.asarray(start, jnp.uint32) + jnp.arange(size, dtype=jnp.uint32)
    words = [jnp.where(index % 2 == 0, *_threefry(key, index // 2)) for key in keys]
    return jnp.stack(words)


def _threefry(key: Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Twenty rounds of Threefry 2x32 (Salmon et al. 2011, "Parallel random numbers")."""
    turns = ((13, 15, 26, 6), (17, 29, 16, 24))
    schedule = (key[0], key[1], key[0] ^ key[1] ^ np.uint32(0x1BD11BDA))
    x, y = count + schedule[0], jnp.zeros_like(count) + schedule[1]
    for i in range(5):
        for turn in turns[i % 2]:
            x += y
            y = x ^ (y << turn | y >> 32 - turn)
        x += schedule[(i + 1) % 3]
        y += schedule[(i + 2) % 3] + np.uint32(i + 1)
    return x, y


def advance(
    sources: Sequence[Array],
    values: Mapping[str, Array],
    answers: Sequence[Answer | None],
    start: Array | int,
    words: jax.Array | None,
    *,
    method: Method,
    flags: Flags,
    has_base: bool,
    width: int | None,
    is_vector: bool,
) -> Request | jax.Array:
    """Runs a formula up to the request that follows `answers`, or to its end.

    Args:
        sources: flat arrays, the base first if `has_base`.
        values: numbers of the method.
        answers: to its first requests; None to a `Sorted` that no later step needs.
        start: flat index in the tensor of the block's first element.
        words: random, of `draw`; None where none are drawn.
        method: what to run.
        flags: its switches.
        has_base: the first source is the base.
        width: of the tensor's rows, for methods that compare the elements of a row.
        is_vector: the tensor has one axis, or none.

    Returns:
        A request, or the flat result.
    """
    block = Block(jnp.asarray(start, jnp.uint32), words, sources[0].size, is_vector)
    arrays = [x.reshape(-1, width) for x in sources] if width else sources
    base, members = (arrays[0], arrays[1:]) if has_base else (None, arrays)
    params = {**values, **dict(flags)}
    if not method.multipass:
        return method(base, members, **params).reshape(-1)
    steps = method(base, members, **params, block=block)
    try:
        request = next(steps)
        for answer in answers:
            request = steps.send(_zeros(request) if answer is None else answer)
    except StopIteration as stop:
        return stop.value.reshape(-1)
    return request


def _zeros(request: Request) -> jax.Array:
    assert isinstance(request, Sorted)
    return jnp.zeros_like(jnp.stack([x for x in request.values if x is not None]))


def bare(request: Request | jax.Array) -> Request | None:
    """A request without its arrays, of which as many Nones are left; None for a result."""
    if isinstance(request, Sum):
        return dataclasses.replace(request, terms=(None,) * len(request.terms))
    if isinstance(request, Largest | Sorted):
        return dataclasses.replace(request, values=(None,) * len(request.values))
    if isinstance(request, Kept):
        return dataclasses.replace(request, masks=(None,) * len(request.masks))
    return None


def lanes(terms: jax.Array) -> jax.Array:
    """float32[m, size] -> float32[m, LANES], partial sums that do not depend on padding."""
    terms = jnp.pad(terms, ((0, 0), (0, -terms.shape[1] % LANES)))
    return terms.reshape(len(terms), -1, LANES).sum(1)


def partial_answer(request: Request, width: int | None) -> jax.Array | tuple[jax.Array, ...]:
    """What a block adds to the answer to a request, to be computed under jit.

    Returns:
        `Sum`: float32[len(terms), LANES], or [len(terms), width] of columns. `Kept`: the masks,
        bool[size]. Otherwise the values, float32[len(values), size].
    """
    if isinstance(request, Kept):
        return tuple(x.reshape(-1) for x in request.masks if x is not None)
    if isinstance(request, Sum):
        terms = jnp.stack([term.reshape(-1) for term in request.terms if term is not None])
        if request.columns:
            return terms.reshape(len(terms), -1, width).sum(1)
        return lanes(terms)
    return jnp.stack([x.reshape(-1) for x in request.values if x is not None]).astype(jnp.float32)
