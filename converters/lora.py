"""The tensors of a model with an adapter, computed from those of its base as they are sliced.

All sums are in float32, rounded once to the base's dtype.
"""

import dataclasses
import functools
from types import EllipsisType

import numpy as np

from vfjax.merge import LazyTensor

ROWS = 4096
"""How many are in memory at a time where a whole tensor must be read."""


@dataclasses.dataclass(frozen=True)
class Updated:
    """A tensor of the shape and dtype of its base."""

    base: LazyTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> np.dtype:
        return self.base.dtype


@dataclasses.dataclass(frozen=True)
class LoRATensor(Updated):
    """A weight and its low-rank update, base + scale * b @ a (arXiv 2106.09685, equation 3).

    Of a convolution, whose weight is [out, in, h, w], a is [rank, in, h, w] and b [out, rank, 1, 1]
    (peft/tuners/lora/layer.py). With a magnitude, DoRA's (arXiv 2402.09353, equation 5): that
    tensor's rows, of an embedding's its columns, are scaled to those lengths.

    Attributes:
        base: [out, in] or [out, in, h, w].
        a: see above.
        b: see above.
        scale: of their product.
        magnitude: of each row, or of each column; None: the rows stay as they are.
        columns: whether it is of columns.
    """

    a: LazyTensor
    b: LazyTensor
    scale: float
    magnitude: LazyTensor | None = None
    columns: bool = False

    def __getitem__(self, rows: slice | EllipsisType) -> np.ndarray:
        base = self.base[rows]
        out = self._sum(base, rows)
        if self.magnitude is not None and self.columns:
            out *= self._column_factors
        elif self.magnitude is not None:
            length = np.linalg.norm(out, axis=1)
            out *= (_flat(self.magnitude)[rows] / length)[:, None]
        return out.reshape(base.shape).astype(self.dtype)

    def _sum(self, base: np.ndarray, rows: slice | EllipsisType) -> np.ndarray:
        a, b = (x.astype(np.float32) for x in (self.a[...], self.b[rows]))
        out = b.reshape(len(b), -1) @ a.reshape(len(a), -1)
        out *= np.float32(self.scale)
        out += base.astype(np.float32).reshape(out.shape)
        return out

    @functools.cached_property
    def _column_factors(self) -> np.ndarray:
        assert self.magnitude is not None
        squares = np.zeros(self.shape[1])
        for start in range(0, self.shape[0], ROWS):
            rows = slice(start, min(start + ROWS, self.shape[0]))
            squares += np.square(self._sum(self.base[rows], rows), dtype=np.float64).sum(axis=0)
        return _flat(self.magnitude) / np.sqrt(squares).astype(np.float32)


def _flat(tensor: LazyTensor) -> np.ndarray:
    return tensor[...].astype(np.float32).reshape(-1)


@dataclasses.dataclass(frozen=True)
class Transposed:
    """A small matrix the other way round, held in memory once it was read."""

    tensor: LazyTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape[::-1]

    @property
    def dtype(self) -> np.dtype:
        return self.tensor.dtype

    @functools.cached_property
    def _values(self) -> np.ndarray:
        return np.ascontiguousarray(self.tensor[...].T)

    def __getitem__(self, rows: slice | EllipsisType) -> np.ndarray:
        return self._values[rows]


@dataclasses.dataclass(frozen=True)
class Part:
    """Some rows of a matrix, and of them every `step`-th column from `first` on."""

    tensor: LazyTensor
    skip: int
    rows: int
    first: int = 0
    step: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rows, len(range(self.first, self.tensor.shape[1], self.step))

    @property
    def dtype(self) -> np.dtype:
        return self.tensor.dtype

    def __getitem__(self, rows: slice | EllipsisType) -> np.ndarray:
        start, stop, _ = (slice(None) if rows is ... else rows).indices(self.rows)
        return self.tensor[self.skip + start : self.skip + stop][:, self.first :: self.step]


@dataclasses.dataclass(frozen=True)
class Shifted(Updated):
    """A bias and what LoRA's own bias adds, base + scale * bias."""

    bias: LazyTensor
    scale: float

    def __getitem__(self, rows: slice | EllipsisType) -> np.ndarray:
        out = self.bias[rows].astype(np.float32) * np.float32(self.scale)
        return (self.base[rows].astype(np.float32) + out).astype(self.dtype)


@dataclasses.dataclass(frozen=True)
class RowsReplaced(Updated):
    """An embedding with a few rows of its own: those of `numbers`, in the order of `rows`."""

    numbers: tuple[int, ...]
    rows: LazyTensor

    def __getitem__(self, rows: slice | EllipsisType) -> np.ndarray:
        out = np.array(self.base[rows])
        start = rows.indices(self.shape[0])[0] if isinstance(rows, slice) else 0
        for number, row in zip(self.numbers, self.rows[...], strict=True):
            if start <= number < start + len(out):
                out[number - start] = row.astype(self.dtype)
        return out


def factors_fit(shape: tuple[int, ...], a: LazyTensor, b: LazyTensor, rank: int) -> bool:
    """Whether a weight of this shape has an update by these factors of `LoRATensor`."""
    rows, *columns = shape
    return (a.shape, b.shape) == ((rank, *columns), (rows, rank, *(1,) * (len(columns) - 1)))
