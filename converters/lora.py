"""The tensors of a model with an adapter, computed from those of its base as they are sliced."""

import dataclasses
from types import EllipsisType

import numpy as np

from vfjax.merge import LazyTensor


@dataclasses.dataclass(frozen=True)
class LoRATensor:
    """A weight and its low-rank update, base + scale * b @ a (arXiv 2106.09685, equation 3).

    Computed in float32 when sliced, and rounded once to the base's dtype. Of a convolution, whose
    weight is [out, in, h, w], a is [rank, in, h, w] and b [out, rank, 1, 1] (peft/tuners/lora).
    """

    base: LazyTensor
    a: LazyTensor
    b: LazyTensor
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> np.dtype:
        return self.base.dtype

    def __getitem__(self, rows: slice | EllipsisType) -> np.ndarray:
        base = self.base[rows].astype(np.float32)
        a, b = (x.astype(np.float32) for x in (self.a[...], self.b[rows]))
        out = b.reshape(len(b), -1) @ a.reshape(len(a), -1)
        out *= np.float32(self.scale)
        out += base.reshape(out.shape)
        return out.reshape(base.shape).astype(self.dtype)


def factors_fit(shape: tuple[int, ...], a: LazyTensor, b: LazyTensor, rank: int) -> bool:
    """Whether a weight of this shape has an update by these factors of `LoRATensor`."""
    rows, *columns = shape
    return (a.shape, b.shape) == ((rank, *columns), (rows, rank, *(1,) * (len(columns) - 1)))
