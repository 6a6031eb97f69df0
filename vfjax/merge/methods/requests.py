"""What a formula may ask of a whole tensor, and the block of the tensor that it sees.

A formula that asks is a generator: it yields a request and is sent the answer: of the whole tensor
(`Sum`, `Largest`), of its rows (`Sorted`) or of its elements (`Kept`), as a tree of arrays.
`vfjax.merge.engine` answers, by blocks that are read one after another (`reductions`) or that lie
on a mesh (`mesh`), to the same bits: sums are kept in fixed lanes, everything else is exact.
"""

import dataclasses
from collections.abc import Callable, Generator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vfjax.merge.methods.registry import Array, Params

Answers = tuple[Any, ...]
"""To a formula's own requests, each of which it knows the kind of."""


@dataclasses.dataclass(frozen=True)
class Block:
    """The part of a tensor that a formula sees.

    Attributes:
        start: uint32, flat index in the tensor of its first element.
        words: uint32[ceil(K / 2), size], random; None where nothing that is computed is of them.
        size: number of elements, with those that pad the block at its end.
        is_vector: the tensor has one axis, or none.
    """

    start: jax.Array
    words: jax.Array | None
    size: int
    is_vector: bool = False

    @property
    def index(self) -> jax.Array:
        """Flat indices in the tensor of the block's elements, uint32[size]."""
        return self.start + jnp.arange(self.size, dtype=jnp.uint32)

    def noise(self, member: int) -> jax.Array:
        """uint32[size], uniform in 0..65535; two members share a word, of which each has a half."""
        if self.words is None:
            return jnp.zeros(self.size, jnp.uint32)
        word = self.words[member // 2]
        return word >> 16 if member % 2 else word & 0xFFFF


@dataclasses.dataclass(frozen=True)
class Sum:
    """Sums over the tensor.

    Attributes:
        terms: float32 arrays of the block's shape, zero where all sources are zero.
        solve: (float64 sums [len(terms)], parameters, number of elements) -> the answer, on the
            host in float64. It may not use traced values.
        columns: sums of each column instead, [len(terms), width], for methods with `rows`.
    """

    terms: Sequence[jax.Array | None]
    solve: Callable[[np.ndarray, Params, int], np.ndarray | np.generic]
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

    values: Sequence[jax.Array | None]
    ranks: Callable[[Params, int, Answers], np.ndarray]
    model: bool = False


@dataclasses.dataclass(frozen=True)
class Sorted:
    """Each row of a block in ascending order; the answer is float32[m, rows, width].

    Attributes:
        values: m arrays, float32 [rows, width], at least 0; not of the block's noise.
    """

    values: Sequence[jax.Array | None]


@dataclasses.dataclass(frozen=True)
class Kept:
    """Masks that are found once: later passes read their bits, not what they were made of.

    What is behind it may use no answer to `Sorted` and no noise from before it.

    Attributes:
        masks: m bool arrays of the block's shape; the answer is bool[m, size].
    """

    masks: Sequence[jax.Array | None]


Request = Sum | Largest | Sorted | Kept
"""Without arrays, as the host has them, each is None."""

Answer = Array | np.generic | tuple[Array, Array] | Sorted | Kept
"""`Sum`'s, `Largest`'s, and on the host `SORTED` and `KEPT`."""

Steps = Generator[Request, Any, Any]
"""A formula that asks: a generator of requests that returns the result. What it is sent depends on
the request before, which no type can say."""

SORTED = Sorted(())
"""Stands for the answer to `Sorted`, which is found anew for each block."""

KEPT = Kept(())
"""Stands for the answer to `Kept`, which is another for each block."""


def above(values: jax.Array, index: jax.Array, cut: tuple[Array, Array]) -> jax.Array:
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
