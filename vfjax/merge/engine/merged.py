"""Tensors of a merge's result, computed from their sources when sliced."""

from __future__ import annotations

import abc
import functools
import math
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from types import EllipsisType
from typing import NoReturn

import jax.numpy as jnp
import numpy as np

from vfjax.errors import InputError
from vfjax.merge.compatibility import REMEDY
from vfjax.merge.engine import reductions
from vfjax.merge.engine.account import Account, account
from vfjax.merge.engine.operation import Operation
from vfjax.merge.engine.reductions import RankGroup
from vfjax.merge.methods.registry import Params
from vfjax.merge.methods.requests import KEPT, SORTED, Answer, Request
from vfjax.merge.tensors import (
    LazyTensor,
    blocks,
    count_nonfinite,
    has_nonfinite,
    nonfinite_error,
    padded,
)

_SMALLEST = 1 << 12
"""Elements of the smallest block that a kernel is compiled for."""
Labelled = tuple[str, LazyTensor]
"""A tensor with the name that errors give its source."""
Find = Callable[["Computed", Request, list[Answer]], Answer]


class Merged(abc.ABC):
    """A tensor of the result; a `LazyTensor`.

    Attributes:
        name: what the tensor is called; random numbers depend on it.
        shape: sizes of its axes, which are those of its sources.
        dtype: type of the merged values.
        sources: (label, tensor), the base first if it is read.
        method: name of the method that makes it, "unchanged" if none does.
        has_base: the first source is the base.
    """

    method = "unchanged"
    has_base = False

    def __init__(self, name: str, dtype: np.dtype, sources: Sequence[Labelled]):
        self.name, self.dtype, self.sources = name, dtype, tuple(sources)
        self.shape = sources[0][1].shape

    @abc.abstractmethod
    def __getitem__(self, rows: slice | EllipsisType, /) -> np.ndarray:
        """Rows of the first axis, or everything."""

    def account(self) -> Account | None:
        """What its sources did to the base; None if the method reads none.

        The blocks that have been merged were counted then, if the `Merger` was told to.
        """
        return None


class Unmerged(Merged):
    """Integers or booleans, which no method merges: all sources must have the same values."""

    def __getitem__(self, rows: slice | EllipsisType, /) -> np.ndarray:
        arrays = [np.asarray(tensor[rows]) for _, tensor in self.sources]
        for i, array in enumerate(arrays):
            if not np.array_equal(array, arrays[0]):
                raise self.unequal(i)
        return arrays[0]

    def unequal(self, source: int) -> InputError:
        """What to raise when a source's values are not the first's."""
        return InputError(
            f"{self.sources[source][0]}: {self.name}",
            found=f"{self.dtype} values that differ from those of {self.sources[0][0]}",
            expected="equal values, as only float tensors are merged",
            fix=REMEDY,
        )


class Computed(Merged):
    """A tensor that an operation computes, block by block or whole.

    Attributes:
        operation: what computes it.
        known: answers to the first requests of its method.
    """

    def __init__(
        self, name: str, dtype: np.dtype, sources: Sequence[Labelled], operation: Operation
    ):
        super().__init__(name, dtype, sources)
        self.operation, self.method = operation, operation.method.name
        self.has_base = operation.has_base
        self.known: list[Answer] = []
        self._lock = operation.group.lock if operation.is_joint else threading.RLock()
        self._accounts: dict[int, Account] = {}

    def __getitem__(self, rows: slice | EllipsisType, /) -> np.ndarray:
        if self.operation.method.whole:
            with self._lock:
                return self.operation.recent(self.name, self._whole)[rows]
        answers = self.answers()
        if self.one_row:
            return self._finished(..., answers)[rows]
        parts = list(blocks(self.shape, rows))
        if len(parts) == 1:
            return self._finished(parts[0], answers)
        start, stop = parts[0].start, parts[-1].stop
        result = np.empty((stop - start, *self.shape[1:]), self.dtype)
        for part in parts:
            result[part.start - start : part.stop - start] = self._finished(part, answers)
        return result

    def _finished(self, rows: slice | EllipsisType, answers: Sequence[Answer]) -> np.ndarray:
        arrays, count = self._read(rows), self.row_count(rows)
        result = self._run(arrays, rows, answers)[:count]
        self.operation.masks.drop(self._key(rows))
        if has_nonfinite(result):
            self.blame()
        if self.operation.accounts:  # while the arrays are in the cache
            self._accounts[_first(rows)] = account(arrays, count)
        return result.reshape(-1, *self.shape[1:]) if self.shape else result.reshape(())

    def account(self) -> Account | None:
        if not self.has_base:
            return None
        each = [
            self._accounts.get(_first(rows)) or account(self._read(rows), self.row_count(rows))
            for rows in self.blocks()
        ]
        return functools.reduce(operator.add, each)

    @property
    def params(self) -> Params:
        """Numbers and switches of its method."""
        return self.operation.params

    @property
    def group(self) -> RankGroup:
        """Tensors that are ranked with it, where its method ranks the whole model."""
        return self.operation.group

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def one_row(self) -> bool:
        """It is a vector that must not be cut."""
        return self.operation.method.rows and len(self.shape) < 2

    def blocks(self) -> Iterator[slice | EllipsisType]:
        """All blocks in order, as sums are taken over them."""
        return iter([...]) if self.one_row else blocks(self.shape)

    def row_count(self, rows: slice | EllipsisType) -> int:
        """Elements in a slice."""
        if rows is ... or not self.shape:
            return self.size
        return (rows.stop - rows.start) * math.prod(self.shape[1:])

    def answers(self, count: int | None = None, find: Find = reductions.answer) -> list[Answer]:
        """Answers to the first `count` requests of the method, to all by default; found once.

        Args:
            count: how many.
            find: (this tensor, request, earlier answers) -> its answer.
        """
        if not self.operation.method.multipass:
            return []
        with self._lock:
            while count is None or len(self.known) < count:
                request = self.operation.request(self, self.known)
                if request is None:
                    break
                self.known.append(find(self, request, list(self.known)))
            return self.known[:count]

    def evaluate(self, rows: slice | EllipsisType, answers: Sequence[Answer]) -> np.ndarray:
        """The formula on some rows, up to the request after `answers` or to its end.

        Returns:
            What that request reduces (`kernels.partial_answer`), or the flat result; with padding.
        """
        return self._run(self._read(rows), rows, answers)

    def _read(self, rows: slice | EllipsisType) -> list[np.ndarray]:
        size = self.padded_size(self.row_count(rows))
        return [padded(np.asarray(tensor[rows]), size) for _, tensor in self.sources]

    def _run(
        self, arrays: Sequence[np.ndarray], rows: slice | EllipsisType, answers: Sequence[Answer]
    ) -> np.ndarray:
        start = _first(rows) * math.prod(self.shape[1:])
        known: list[Answer | None] = []
        run, key = self.operation.run, self._key(rows)
        after = [i for i, each in enumerate(answers) if each is KEPT]
        masks = self.operation.masks.get(key) if after else None
        for i, each in enumerate(answers):
            if masks is not None and i < after[0]:
                known.append(None if each is SORTED else each)  # what the masks were made of
            elif each is SORTED:
                values = run(arrays, known, start, self, draws=False)
                known.append(np.sort(values.reshape(len(values), -1, self.width), axis=-1))
            elif each is KEPT:
                if masks is None:
                    masks = run(arrays, known, start, self)
                    self.operation.masks.put(key, masks)
                known.append(masks)
            else:
                known.append(each)
        return run(arrays, known, start, self, draws=not after)

    def _key(self, rows: slice | EllipsisType) -> tuple[object, int, int]:
        return self, _first(rows), self.row_count(rows)

    def padded_size(self, count: int) -> int:
        """Elements that a kernel is run on: powers of two, so that few are compiled."""
        if self.operation.method.rows:
            height = count // self.width
            return self.width << max(0, height - 1).bit_length()
        return max(_SMALLEST, 1 << max(0, count - 1).bit_length())

    @property
    def width(self) -> int:
        """Elements in a row: along the last axis."""
        return self.shape[-1] if self.shape else 1

    def _whole(self) -> np.ndarray:
        arrays = [np.asarray(tensor[...]) for _, tensor in self.sources]
        result = self.operation.run(arrays, [], 0, self)
        if has_nonfinite(result):
            self.blame()
        return result

    def blame(self, counts: Sequence[int] | None = None) -> NoReturn:
        """Raises InputError that names the source of a NaN or infinity, with their number.

        Args:
            counts: how many each source has, if it is known.
        """
        for i, (label, tensor) in enumerate(self.sources):
            if count := count_nonfinite(tensor) if counts is None else counts[i]:
                raise nonfinite_error(f"{label}: {self.name}", tensor, count)
        raise InputError(
            self.name,
            found=f"finite sources, but a merged value that is not finite in {self.dtype}",
            expected=f"values up to {jnp.finfo(self.dtype).max}",
            fix="choose smaller weights (not summing to 0 if normalised) or a wider dtype",
        )


def _first(rows: slice | EllipsisType) -> int:
    return rows.start if isinstance(rows, slice) else 0
