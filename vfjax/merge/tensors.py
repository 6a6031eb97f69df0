"""Lazy tensors: read, or computed, when sliced; cut into blocks; checked for NaN by their bits."""

import math
from collections.abc import Iterator, Mapping
from types import EllipsisType
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from vfjax.errors import InputError

BLOCK = 1 << 20
"""Elements computed at a time: a few such arrays fit the last-level cache."""
ALIGNMENT = 64

EXPONENTS: dict[np.dtype, Any] = {
    np.dtype(jnp.bfloat16): np.uint16(0x7F80),
    np.dtype(np.float16): np.uint16(0x7C00),
    np.dtype(np.float32): np.uint32(0x7F800000),
}
"""Dtypes that merge, with their exponent bits: all of them set is what makes NaN and infinity."""


class Header(Protocol):
    """What is known of a tensor before it is read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""

    @property
    def dtype(self) -> np.dtype:
        """A type of numpy's, or of ml_dtypes' for bfloat16 and float8."""


class LazyTensor(Header, Protocol):
    """A tensor that is read, or computed, when sliced; a numpy array is one.

    `tensor[a:b]` reads those rows of the first axis and no others, `tensor[...]` everything. Slices
    may be taken in any order and from several threads.
    """

    def __getitem__(self, rows: slice | EllipsisType, /) -> np.ndarray:
        """Rows of the first axis, or everything."""


Tensors = Mapping[str, LazyTensor]


def blocks(shape: tuple[int, ...], rows: slice | EllipsisType = ...) -> Iterator[Any]:
    """Cuts the rows of a tensor into slices of at most `BLOCK` elements, or of one row.

    Yields:
        At least one index of a `LazyTensor` (`...` alone for a scalar), in order.
    """
    if not shape:
        yield ...
        return
    start, stop, step = (slice(None) if rows is ... else rows).indices(shape[0])
    if step != 1:
        raise ValueError(f"slices of lazy tensors have step 1, not {step}")
    height = block_rows(shape)
    yield slice(start, min(start + height, stop))
    for i in range(start + height, stop, height):
        yield slice(i, min(i + height, stop))


def padded(array: np.ndarray, size: int) -> np.ndarray:
    """Flat, with zeros up to `size`, at an address that JAX's CPU backend uses without a copy."""
    if array.size == size and array.flags.c_contiguous and array.ctypes.data % ALIGNMENT == 0:
        return array.reshape(-1)
    flat = aligned(size, array.dtype)
    flat[: array.size] = array.reshape(-1)
    flat[array.size :] = 0
    return flat


def block_rows(shape: tuple[int, ...]) -> int:
    """Rows of a block."""
    return max(1, BLOCK // max(1, math.prod(shape[1:])))


def aligned(size: int, dtype: np.dtype) -> np.ndarray:
    """An uninitialised flat array at a multiple of 64 bytes; sources read into one save a copy."""
    raw = np.empty(size * dtype.itemsize + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size * dtype.itemsize].view(dtype)


def has_nonfinite(array: np.ndarray) -> bool:
    """Whether there is a NaN or infinity; by the bits, as numpy's isfinite is slow on 16 bits."""
    exponent = EXPONENTS[array.dtype]
    bits = array.reshape(-1).view(exponent.dtype)
    return bool(bits.size) and bool((bits & exponent).max() == exponent)


def equal(a: LazyTensor, b: LazyTensor) -> bool:
    """Whether two tensors have one shape and the same values; reads on only while they do."""
    return tuple(a.shape) == tuple(b.shape) and all(
        np.array_equal(a[rows], b[rows]) for rows in blocks(tuple(a.shape))
    )


def count_nonfinite(tensor: LazyTensor) -> int:
    """How many elements are NaN or infinite."""
    return sum(
        int(np.count_nonzero(~np.isfinite(tensor[rows].astype(np.float32))))
        for rows in blocks(tensor.shape)
    )


def nonfinite_error(where: str, tensor: LazyTensor, count: int) -> InputError:
    """What to raise when `count_nonfinite` found some."""
    return InputError(
        where,
        found=f"{count} NaN or infinite of {math.prod(tensor.shape)} values",
        expected="finite weights",
        fix="download or export this checkpoint again",
    )


class Inner:
    """Rows `start` to `stop` of the `index`-th of the tensors that one holds, lazily."""

    def __init__(self, tensor: LazyTensor, index: int, start: int, stop: int):
        self.tensor, self.index, self.start = tensor, index, start
        self.dtype = tensor.dtype
        self.shape = (stop - start, *tensor.shape[2:])

    def __getitem__(self, rows: slice | EllipsisType, /) -> np.ndarray:
        start, stop, _ = (slice(None) if rows is ... else rows).indices(self.shape[0])
        whole = self.tensor[self.index : self.index + 1][0]
        return whole[self.start + start : self.start + stop]


class Stacked:
    """Tensors one after another along the first axis, lazily; or, of one, its first rows.

    Args:
        parts: (tensor, number of its first rows to skip, number of rows).
    """

    def __init__(self, *parts: tuple[LazyTensor, int, int]):
        self.parts = parts
        first = parts[0][0]
        self.dtype = first.dtype
        self.shape = (sum(count for _, _, count in parts), *first.shape[1:])

    def __getitem__(self, rows: slice | EllipsisType, /) -> np.ndarray:
        start, stop, _ = (slice(None) if rows is ... else rows).indices(self.shape[0])
        found, end = [], 0
        for tensor, skip, count in self.parts:
            begin, end = end, end + count
            low, high = max(start, begin), min(stop, end)
            if low < high:
                part = tensor[low - begin + skip : high - begin + skip]
                found.append(part.astype(self.dtype, copy=False))
        none = np.empty((0, *self.shape[1:]), self.dtype)
        return found[0] if len(found) == 1 else np.concatenate([none, *found])
