"""Quantised tensors that are dequantised, piece by piece, when they are sliced."""

import dataclasses
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from types import EllipsisType

import numpy as np

from converters.files.gguf import PIECE, PLAIN, GGUFTensor
from vfjax import InputError
from vfjax.merge import LazyTensor
from vfjax.merge.tensors import has_nonfinite

HELD = 1 << 28
"""Bytes of packed tensors that are kept, and at least one: rows of a weight are columns of theirs,
so that each piece needs all of it."""


@dataclasses.dataclass(frozen=True, eq=False)
class Dequantised:
    """A matrix that its files hold quantised; `tensor[a:b]` dequantises only those rows.

    Attributes:
        name: in the folder, as if it were plain.
        shape: (out, in).
        dtype: of its values: that in which the format's own library dequantises it.
        kind: how it is quantised, for people.
        rows: (start, stop) -> the values of those rows, float[stop - start, in], to be rounded to
            `dtype`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    kind: str
    rows: Callable[[int, int], np.ndarray]

    def __getitem__(self, index: slice | EllipsisType) -> np.ndarray:
        """Rows of the first axis as a new array.

        Raises:
            InputError: a NaN or infinity among them, or a file that is shorter than its header
                said.
        """
        start, stop, step = (slice(None) if index is ... else index).indices(self.shape[0])
        assert step == 1, "only contiguous rows"
        out = np.empty((max(stop - start, 0), *self.shape[1:]), self.dtype)
        step = max(PIECE // max(math.prod(self.shape[1:]), 1), 1)
        with np.errstate(over="ignore", invalid="ignore"):
            for first in range(start, stop, step):
                last = min(first + step, stop)
                out[first - start : last - start] = self.rows(first, last)
        if has_nonfinite(out):
            raise InputError(
                self.name,
                found=f"NaN or infinity where it is dequantised ({self.kind})",
                expected="finite weights",
                fix="download this checkpoint again",
            )
        return out


def kinds(tensors: Iterable[object]) -> tuple[str, ...]:
    """How those are quantised that a file holds so, each kind once."""
    found = {x.kind for x in tensors if isinstance(x, Dequantised | GGUFTensor)}
    return tuple(sorted(found - PLAIN.keys()))


class Whole:
    """A small, or packed, tensor that is read whole; the last ones read are kept, up to `HELD`."""

    kept: "OrderedDict[Whole, np.ndarray]" = OrderedDict()
    _changing = threading.Lock()

    def __init__(self, tensor: LazyTensor):
        self.tensor = tensor
        self._reading = threading.Lock()

    def read(self) -> np.ndarray:
        """All of it, not to be written to."""
        with self._reading:  # once, whoever else wants it
            with self._changing:
                if self in self.kept:
                    self.kept.move_to_end(self)
                    return self.kept[self]
            found = np.asarray(self.tensor[...])
            with self._changing:
                self.kept[self] = found
                while len(self.kept) > 1 and sum(x.nbytes for x in self.kept.values()) > HELD:
                    self.kept.popitem(last=False)
        return found


def unpack(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Numbers of some bits each, one behind the other from the lowest bit of the first word.

    Args:
        words: integers[r, w] of any size.
        bits: of a number, 1 to 8.
        count: numbers of a row.

    Returns:
        uint8[r, count].
    """
    raw = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return raw[:, :count]
    if 8 % bits == 0:
        parts = [(raw >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
        return np.stack(parts, axis=-1).reshape(len(raw), -1)[:, :count]
    each = np.unpackbits(raw, axis=-1, count=count * bits, bitorder="little")
    return np.packbits(each.reshape(-1, count, bits), axis=-1, bitorder="little")[..., 0]


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E2M1 = np.concatenate([E2M1, -E2M1])
"""Values of the four bits of a float4_e2m1fn."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """One value, such as a scale, for each block of a matrix.

    Attributes:
        read: (first, last) -> the values of those rows of blocks, [last - first, columns of
            blocks].
        height: rows of a block.
        width: columns of a block.
        places: int[in], the column of blocks of each of the matrix's columns, where they are not in
            order.
    """

    read: Callable[[int, int], np.ndarray]
    height: int
    width: int
    places: Whole | None = None

    def __call__(self, start: int, stop: int, columns: int) -> np.ndarray:
        """The values of each element of some rows.

        Returns:
            float32[stop - start, columns], or [stop - start, 1] if all columns have the same.
        """
        first = start // self.height
        found = self.read(first, -(-stop // self.height)).astype(np.float32)
        if self.height > 1:
            found = found[np.arange(start, stop) // self.height - first]
        if self.places is not None:
            return found[:, self.places.read()]
        if found.shape[1] == 1:
            return found
        return np.repeat(found, self.width, axis=1)[:, :columns]
