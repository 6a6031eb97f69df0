"""The merge engine: a method over named tensors, lazily, in bounded memory.

`merge` returns tensors that are computed when sliced, so whoever writes or places them decides how
much is in memory, in which order and on how many threads, and a merge of merges needs no file
between. Arithmetic runs on the CPU backend even where there is an accelerator: a stream is bound by
reading and writing. The formulas themselves run anywhere under `jax.jit`.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from types import EllipsisType
from typing import Any, NoReturn, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from vfjax.errors import InputError
from vfjax.merge.family import REMEDY, Header, check_tensors
from vfjax.merge.methods import Array, Flags, Method, find

BLOCK = 1 << 20
"""Elements computed at a time: a few such arrays fit the last-level cache."""
_SMALLEST = 1 << 12
ALIGNMENT = 64

EXPONENTS: dict[np.dtype, Any] = {
    np.dtype(jnp.bfloat16): np.uint16(0x7F80),
    np.dtype(np.float16): np.uint16(0x7C00),
    np.dtype(np.float32): np.uint32(0x7F800000),
}
"""Dtypes that merge, with their exponent bits: all of them set is what makes NaN and infinity."""


class LazyTensor(Header, Protocol):
    """A tensor that is read, or computed, when sliced; a numpy array is one.

    `tensor[a:b]` reads those rows of the first axis and no others, `tensor[...]` everything. Slices
    may be taken in any order and from several threads.
    """

    def __getitem__(self, rows: slice | EllipsisType, /) -> np.ndarray:
        """Rows of the first axis, or everything."""


Tensors = Mapping[str, LazyTensor]


def merge(
    base: Tensors | None,
    members: Mapping[str, Tensors],
    method: str,
    params: Mapping[str, Any],
    *,
    dtype: Any = None,
) -> dict[str, LazyTensor]:
    """Merges named tensors by a method of `METHODS`.

    Sums are in float32 and rounded once, to nearest even. XLA's CPU backend reads and writes
    float32 and bfloat16 values below 1.2e-38 as zero. A slice is computed `BLOCK` elements at a
    time (at least one row), so memory beyond the slice itself is bounded by the sources' blocks.

    Args:
        base: name -> tensor of the base LLM; the reference for names, shapes and dtypes. None if
            the method reads no base: the first member is the reference then.
        members: label -> name -> tensor, in the order of the method's weights.
        method: key of `METHODS`.
        params: the method's parameters.
        dtype: of the float results, bfloat16, float16 or float32; the reference's by default.

    Returns:
        The reference's names, in its order, each with a tensor computed when sliced. Slicing raises
        InputError if a source holds NaN or infinity, if the result leaves the dtype's range, or if
        tensors that are not float (which are not merged) differ.

    Raises:
        InputError: no members, a wrong parameter, no base for a method that reads it, sources of
            different families (names, shapes), or a dtype that cannot be merged.
    """
    if not members:
        raise InputError("members", found="none", expected="at least one", fix="name a member")
    found, values, flags = find(method, params, len(members))
    if found.needs_base and base is None:
        raise InputError(
            f"method {method}", found="no base", expected="the base LLM", fix="set base"
        )
    out = None if dtype is None else _checked("dtype", dtype)
    listed = [(f"member {label!r}", tensors) for label, tensors in members.items()]
    everything = listed if base is None else [("base", base), *listed]
    check_tensors(everything)
    used = everything if found.needs_base else listed
    cpu = jax.local_devices(backend="cpu")[0]
    rule = functools.partial(
        _compute, method=found, values=jax.device_put(values, cpu), flags=flags
    )

    merged: dict[str, LazyTensor] = {}
    for name, like in everything[0][1].items():
        sources = tuple((label, tensors[name]) for label, tensors in everything)
        if all(_is_exact(tensor.dtype) for _, tensor in sources):
            merged[name] = _Merged(name, like.shape, like.dtype, sources, None)
            continue
        for label, tensor in sources:
            _checked(f"{label}: {name}", tensor.dtype)
        sources = tuple((label, tensors[name]) for label, tensors in used)
        target = like.dtype if out is None else out
        merged[name] = _Merged(name, like.shape, target, sources, rule)
    return merged


def _is_exact(dtype: np.dtype) -> bool:
    """Integers and booleans: counters and indices, which must be equal everywhere."""
    return dtype.kind in "iub"


def _checked(where: str, dtype: Any) -> np.dtype:
    try:
        known = np.dtype(dtype) in EXPONENTS
    except TypeError:  # no numpy dtype at all
        known = False
    if not known:
        raise InputError(
            where,
            found=f"dtype {dtype}",
            expected=", ".join(map(str, EXPONENTS)),
            fix="convert to one of these first (dequantise what is quantised)",
        )
    return np.dtype(dtype)


@dataclasses.dataclass(frozen=True)
class _Merged:
    """A tensor computed from its sources, block by block, when sliced."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    sources: tuple[tuple[str, LazyTensor], ...]
    rule: functools.partial[np.ndarray] | None
    """None where the sources must be equal."""

    def __getitem__(self, rows: slice | EllipsisType, /) -> np.ndarray:
        parts = list(blocks(self.shape, rows))
        if len(parts) == 1:
            return self._block(parts[0])
        start, stop = parts[0].start, parts[-1].stop
        result = np.empty((stop - start, *self.shape[1:]), self.dtype)
        for part in parts:
            result[part.start - start : part.stop - start] = self._block(part)
        return result

    def _block(self, rows: slice | EllipsisType) -> np.ndarray:
        arrays = [np.asarray(tensor[rows]) for _, tensor in self.sources]
        if self.rule is None:
            self._check_equal(arrays)
            return arrays[0]
        result = self.rule(arrays, dtype=self.dtype)
        if _has_nonfinite(result):
            self._blame()
        return result

    def _check_equal(self, arrays: list[np.ndarray]) -> None:
        for (label, _), array in zip(self.sources, arrays, strict=True):
            if not np.array_equal(array, arrays[0]):
                raise InputError(
                    f"{label}: {self.name}",
                    found=f"{self.dtype} values that differ from those of {self.sources[0][0]}",
                    expected="equal values, as only float tensors are merged",
                    fix=REMEDY,
                )

    def _blame(self) -> NoReturn:
        for label, tensor in self.sources:
            count = sum(
                int(np.count_nonzero(~np.isfinite(tensor[rows].astype(np.float32))))
                for rows in blocks(self.shape)
            )
            if count:
                raise InputError(
                    f"{label}: {self.name}",
                    found=f"{count} NaN or infinite of {math.prod(self.shape)} values",
                    expected="finite weights",
                    fix="download or export this checkpoint again",
                )
        raise InputError(
            self.name,
            found=f"finite sources, but a merged value that is not finite in {self.dtype}",
            expected=f"values up to {jnp.finfo(self.dtype).max}",
            fix="choose smaller weights (not summing to 0 if normalised) or a wider dtype",
        )


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
    height = max(1, BLOCK // max(1, math.prod(shape[1:])))
    yield slice(start, min(start + height, stop))
    for i in range(start + height, stop, height):
        yield slice(i, min(i + height, stop))


def _compute(
    arrays: list[np.ndarray],
    *,
    method: Method,
    values: Mapping[str, jax.Array],
    flags: Flags,
    dtype: np.dtype,
) -> np.ndarray:
    """The method on arrays of one shape, where `values` lie."""
    count = arrays[0].size
    size = max(_SMALLEST, 1 << (count - 1).bit_length())  # powers of two: few compilations
    sources = [_padded(array, size) for array in arrays]
    result = _kernel(sources, values, method=method, flags=flags, dtype=dtype)
    return np.asarray(result)[:count].reshape(arrays[0].shape)


@functools.partial(jax.jit, static_argnames=("method", "flags", "dtype"))
def _kernel(
    sources: list[Array],
    values: Mapping[str, jax.Array],
    *,
    method: Method,
    flags: Flags,
    dtype: np.dtype,
) -> jax.Array:
    return method(sources, **values, **dict(flags)).astype(dtype)


def _padded(array: np.ndarray, size: int) -> np.ndarray:
    """Flat, with zeros up to `size`, at an address that JAX's CPU backend uses without a copy."""
    if array.size == size and array.flags.c_contiguous and array.ctypes.data % ALIGNMENT == 0:
        return array.reshape(-1)
    flat = aligned(size, array.dtype)
    flat[: array.size] = array.reshape(-1)
    flat[array.size :] = 0
    return flat


def aligned(size: int, dtype: np.dtype) -> np.ndarray:
    """An uninitialised flat array at a multiple of 64 bytes; sources read into one save a copy."""
    raw = np.empty(size * dtype.itemsize + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size * dtype.itemsize].view(dtype)


def _has_nonfinite(array: np.ndarray) -> bool:
    """By the bits: numpy's isfinite is slow on 16-bit floats."""
    exponent = EXPONENTS[array.dtype]
    bits = array.reshape(-1).view(exponent.dtype)
    return bool(bits.size) and bool((bits & exponent).max() == exponent)
