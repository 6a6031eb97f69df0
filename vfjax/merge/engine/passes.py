"""What formulas in passes ask for, and the block of a tensor that they see.

A formula yields a request, and is sent its answer: numbers of the whole tensor (`Sum`, `Largest`)
or of the rows (`Sorted`). An answer is a tree of float32 and uint32 arrays. Requests are resolved
by `merger` (streams) and `mesh` (sharded arrays), to the same bits: sums are kept in fixed lanes,
everything else is exact.
"""

import dataclasses
from collections.abc import Callable, Generator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vfjax.merge.methods.registry import Array, Method, Params

LANES = 1024
"""Partial sums of a block: element i goes to lane i mod 1024, in order."""

Answers = tuple[Any, ...]
Steps = Generator[Any, Any, Any]
"""What a formula in passes is: a generator of requests that returns the result."""


@dataclasses.dataclass(frozen=True)
class Block:
    """The part of a tensor that a formula sees.

    Attributes:
        start: uint32, flat index in the tensor of its first element.
        words: uint32[ceil(K / 2), size], random, of `draw`; None for methods that draw none.
        size: number of elements, with those that pad the block at its end.
        is_vector: the tensor has one axis, or none.
    """

    start: jax.Array
    words: Any
    size: int
    is_vector: bool = False

    @property
    def index(self) -> jax.Array:
        """uint32[size], flat indices in the tensor."""
        return self.start + jnp.arange(self.size, dtype=jnp.uint32)

    def noise(self, member: int) -> jax.Array:
        """uint32[size], uniform in 0..65535; two members share a word, of which each has a half."""
        word = self.words[member // 2]
        return word >> 16 if member % 2 else word & 0xFFFF


def draw(start: jax.Array, keys: jax.Array, size: int) -> jax.Array:
    """Random words of a block: Threefry 2x32 with the flat index as counter.

    So a draw depends on the key and the index alone, not on how the tensor is cut.

    Args:
        start: uint32, flat index in the tensor of the block's first element.
        keys: uint32[m, 2].
        size: number of elements.

    Returns:
        uint32[m, size].
    """
    first, rest = start // 2, start % 2  # a count makes two words
    words = []
    for key in keys:
        state = jnp.concatenate([key, first[None], jnp.zeros(1, jnp.uint32)])
        algorithm = jax.lax.RandomAlgorithm.RNG_THREE_FRY
        drawn = jax.lax.rng_bit_generator(state, (size + 2,), jnp.uint32, algorithm)[1]
        words.append(jax.lax.dynamic_slice(drawn, (rest,), (size,)))
    return jnp.stack(words)


@dataclasses.dataclass(frozen=True)
class Sum:
    """Sums over the tensor.

    Attributes:
        terms: float32 arrays of the block's shape, zero where all sources are zero.
        solve: (float64 sums [len(terms)], parameters, number of elements) -> the answer, on the
            host in float64. It may not use traced values.
        columns: sums of each column instead, [len(terms), width], for methods with `rows`.
    """

    terms: Sequence[Any]
    solve: Callable[[np.ndarray, Params, int], Any]
    columns: bool = False


@dataclasses.dataclass(frozen=True)
class Largest:
    """Order statistics: where the k largest elements of the tensor end.

    Attributes:
        values: arrays of the block's shape, at least 0, and 0 where all sources are zero.
        ranks: (parameters, number of elements n, earlier answers) -> int [len(values), j], each in
            0..n: how many elements are to lie above each cut.
        model: over all tensors of the merge that use the method with the same shares, not this one
            alone.

    The answer holds float32 and uint32 [len(values), j]: the value at the cut, and the flat index
    before which equal values lie above it. Read it by `above`.
    """

    values: Sequence[Any]
    ranks: Callable[[Params, int, Answers], np.ndarray]
    model: bool = False


@dataclasses.dataclass(frozen=True)
class Sorted:
    """Each row of a block in ascending order; the answer is float32[m, rows, width].

    Attributes:
        values: m arrays, float32 [rows, width], at least 0.
    """

    values: Any


def above(values: Array, index: Array, cut: tuple[Array, Array]) -> Any:
    """Which elements lie above a cut of `Largest`: of equal ones, those that come first.

    Args:
        values: float32 array.
        index: uint32 array, the elements' flat indices.
        cut: scalars of `Largest`'s answer.

    Returns:
        bool array; true for NaN, so that it goes on.
    """
    value, end = cut
    return ~((values < value) | ((values == value) & (index >= end)))


def advance(
    method: Method,
    base: Array | None,
    members: Sequence[Array],
    params: Params,
    answers: Answers,
    block: Block,
    width: int | None,
) -> Any:
    """Runs a formula up to the request that follows `answers`, or to its end.

    Args:
        method: what to run.
        base: flat array, or None.
        members: flat arrays.
        params: numbers and switches.
        answers: to the first requests.
        block: what they are a part of.
        width: of the tensor's rows, for methods that compare the elements of a row.

    Returns:
        A request, or the flat result.
    """
    if width:
        base = None if base is None else base.reshape(-1, width)
        members = [x.reshape(-1, width) for x in members]
    if not method.in_passes:
        return method(base, members, **params).reshape(-1)
    steps = method(base, members, **params, block=block)
    try:
        request = next(steps)
        for answer in answers:
            request = steps.send(answer)
    except StopIteration as stop:
        return stop.value.reshape(-1)
    return request


def bare(request: Any) -> Any:
    """A request without its arrays, of which as many Nones are left; None for a result."""
    if isinstance(request, Sum):
        return dataclasses.replace(request, terms=(None,) * len(request.terms))
    if isinstance(request, Largest | Sorted):
        return dataclasses.replace(request, values=(None,) * len(request.values))
    return None


def lanes(terms: jax.Array) -> jax.Array:
    """float32[m, size] -> float32[m, LANES], partial sums that do not depend on padding."""
    terms = jnp.pad(terms, ((0, 0), (0, -terms.shape[1] % LANES)))
    return terms.reshape(len(terms), -1, LANES).sum(1)


def partial(request: Any, width: int | None) -> jax.Array:
    """What a block adds to the answer, to be computed under jit.

    Returns:
        `Sum`: float32[len(terms), LANES], or [len(terms), width] of columns. Otherwise the values,
        float32[len(values), size].
    """
    if isinstance(request, Sum):
        terms = jnp.stack([term.reshape(-1) for term in request.terms])
        if request.columns:
            return terms.reshape(len(terms), -1, width).sum(1)
        return lanes(terms)
    return jnp.stack([x.reshape(-1) for x in request.values]).astype(jnp.float32)
