"""Numbers of whole tensors that formulas ask for, found by blocks that are read one after another.

Sums add up what each block gives. An order statistic takes one pass over the tensor: a sample says
between which two values the cut must lie; the pass counts what lies above them and keeps what lies
between. If the sample misled, the next window is where the counts say; so the answer is exact.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from types import EllipsisType
from typing import Protocol, TypeVar

import numpy as np

from vfjax.merge.methods.registry import Params
from vfjax.merge.methods.requests import KEPT, SORTED, Answer, Kept, Largest, Request, Sorted, Sum
from vfjax.merge.tensors import LazyTensor

ALL = np.uint32(0xFFFFFFFF)
TOP = 0x7FFFFFFF
"""The largest bits of a float32 without sign; such floats are in the order of their bits."""

_FEW = 1 << 21
"""Elements that are sorted at once."""
_PIECES, _PIECE = 16, 1 << 13
"""How many slices a tensor's sample has, and about how many elements each."""
_NARROW = 1 << 22
"""Width of a window whose values are kept; in a wider one they are counted by their first bits."""
_BIN_BITS = 16

Rows = slice | EllipsisType
Place = tuple[int, Rows]
"""A block: which tensor, which rows."""
Key = tuple[int, int]
"""A cut of `Largest`: which array, which rank."""
T = TypeVar("T")
R = TypeVar("R")


@cache
def pool() -> ThreadPoolExecutor:
    """The threads that blocks are read and evaluated by, one a core."""
    return ThreadPoolExecutor(len(os.sched_getaffinity(0)), "vfjax-merge")


class Blockwise(Protocol):
    """A tensor that is computed block by block, as requests and operations see it."""

    @property
    def name(self) -> str:
        """What the tensor is called; random numbers depend on it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of its axes, which are those of its sources."""

    @property
    def dtype(self) -> np.dtype:
        """Type of the merged values."""

    @property
    def sources(self) -> Sequence[tuple[str, LazyTensor]]:
        """Labels and tensors, the base first if it is read."""

    @property
    def params(self) -> Params:
        """Numbers and switches of its method."""

    @property
    def group(self) -> RankGroup:
        """Tensors that are ranked with it, where its method ranks the whole model."""

    @property
    def size(self) -> int:
        """Number of elements."""

    @property
    def width(self) -> int:
        """Elements in a row: along the last axis."""

    def padded_size(self, count: int) -> int:
        """Elements that a kernel is run on, for a block of `count`."""

    def blocks(self) -> Iterator[Rows]:
        """All blocks in order, as sums are taken over them."""

    def row_count(self, rows: Rows) -> int:
        """Elements in some rows."""

    def answers(self, count: int | None = None) -> list[Answer]:
        """Answers to the first `count` requests of its method."""

    def evaluate(self, rows: Rows, answers: Sequence[Answer]) -> np.ndarray:
        """What the request after `answers` reduces on some rows, or their result; padded."""


class RankGroup:
    """Tensors that `Largest` may rank as one.

    Locks are taken in one order: a tensor's, then those of its sources (which may be merged too),
    then its operation's, under which nothing waits. Tensors that are ranked as one share a lock: to
    answer for one of them is to ask all of them. Whoever holds a lock never waits for work that no
    thread has begun, see `_map`.

    Attributes:
        tensors: of an operation, or of all operations that differ in weights and scale alone.
        answers: to their method's requests over all of them, by step.
        lock: of its tensors, if they are ranked as one.
    """

    def __init__(self) -> None:
        self.tensors: list[Blockwise] = []
        self.answers: dict[int, dict[int, tuple[np.ndarray, np.ndarray]]] = {}
        self.lock = threading.RLock()


def answer(tensor: Blockwise, request: Request, earlier: Sequence[Answer]) -> Answer:
    """The answer to a request of a tensor's method, given those before it."""
    if isinstance(request, Sorted):
        return SORTED
    if isinstance(request, Kept):
        return KEPT
    if isinstance(request, Sum):
        parts = _map(lambda rows: tensor.evaluate(rows, earlier), tensor.blocks())
        return solve_sum(request, list(parts), tensor)
    return order_answer(tensor, request, earlier, cuts)


Cuts = Callable[[Sequence[Blockwise], int, np.ndarray], list[tuple[np.ndarray, np.ndarray]]]


def order_answer(
    tensor: Blockwise, request: Largest, earlier: Sequence[Answer], find: Cuts
) -> tuple[np.ndarray, np.ndarray]:
    """The answer to `Largest`, of the tensor or of all of its group, by a function as `cuts`."""
    step, params = len(earlier), tensor.params
    if not request.model:
        return find([tensor], step, request.ranks(params, tensor.size, tuple(earlier)))[0]
    known, everything = tensor.group.answers, tensor.group.tensors
    if step not in known:  # the caller holds the lock that they share
        size = sum(each.size for each in everything)
        found = find(everything, step, request.ranks(params, size, tuple(earlier)))
        known[step] = {id(each): x for each, x in zip(everything, found, strict=True)}
    return known[step][id(tensor)]


def solve_sum(request: Sum, parts: Sequence[np.ndarray], tensor: Blockwise) -> Answer:
    """The answer to `Sum` from what the blocks add to it, in order."""
    lanes = np.sum(np.stack(parts).astype(np.float64), axis=0)
    with np.errstate(
        invalid="ignore"
    ):  # of infinite weights, which end in an error that names them
        sums = lanes if request.columns else lanes.sum(-1)
        return request.solve(sums, tensor.params, tensor.size)


def _map(fn: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """The results in order, from all cores.

    What no thread has begun when its turn comes is done by the caller: the pool's threads may all
    be waiting for a lock that the caller holds, or be callers themselves.
    """
    begun = [(pool().submit(fn, item), item) for item in items]
    try:
        for future, item in begun:
            yield fn(item) if future.cancel() else future.result()
    finally:  # of an error
        for future, _ in begun:
            future.cancel()


@dataclasses.dataclass
class _Window:
    """Where one cut is looked for.

    Attributes:
        low: bits of the smallest value.
        high: bits of the largest.
        shift: last bits that are dropped when values are counted.
    """

    low: int
    high: int
    shift: int


@dataclasses.dataclass
class _Count:
    """What a block has in a window: how many above it, which values in it and how often."""

    above: int
    values: np.ndarray
    times: np.ndarray


def cuts(
    tensors: Sequence[Blockwise], step: int, ranks: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The answers to `Largest` of one tensor, or of several taken as one.

    Args:
        tensors: of one `RankGroup`.
        step: number of requests before this one.
        ranks: int [m, j].

    Returns:
        For each tensor, float32[m, j] and uint32[m, j].
    """
    answers = [tensor.answers(step) for tensor in tensors]
    places = [(i, rows) for i, tensor in enumerate(tensors) for rows in tensor.blocks()]

    def bits(i: int, rows: Rows) -> np.ndarray:
        values = tensors[i].evaluate(rows, answers[i])
        return values.view(np.uint32)[:, : tensors[i].row_count(rows)]

    total = sum(tensor.size for tensor in tensors)
    values = np.empty(ranks.shape, np.float32)
    ends = np.empty((len(tensors), *ranks.shape), np.uint32)
    flat = [(m, j) for m in range(ranks.shape[0]) for j in range(ranks.shape[1])]
    todo = {}
    for m, j in flat:
        k = int(ranks[m, j])
        if 0 < k < total:
            todo[m, j] = k
        else:  # nothing lies above, or everything
            values[m, j], ends[:, m, j] = (0, ALL) if k else (np.inf, 0)
    found = _search(places, bits, todo, _sample(tensors, bits, todo, total))
    for (m, j), (value, ties, counts) in found.items():
        values[m, j] = np.uint32(value).view(np.float32)
        ends[:, m, j] = _ends(tensors, places, bits, m, value, ties, counts)
    return [(values, ends[i]) for i in range(len(tensors))]


def _sample(
    tensors: Sequence[Blockwise],
    bits: Callable[[int, Rows], np.ndarray],
    todo: Mapping[Key, int],
    total: int,
) -> dict[Key, _Window]:
    """Windows that should hold the cuts, from slices spread over the tensors."""
    if total <= _FEW or not todo:
        return {key: _Window(0, TOP, 0) for key in todo}
    places = []
    pieces = max(1, _PIECES * 4 // len(tensors)) if len(tensors) > 1 else _PIECES
    for i, tensor in enumerate(tensors):
        row = max(1, tensor.size // max(1, tensor.shape[0] if tensor.shape else 1))
        count, height = tensor.shape[0] if tensor.shape else 1, max(1, _PIECE // row)
        if not tensor.shape or count <= height * pieces:
            places += [(i, rows) for rows in tensor.blocks()]
            continue
        starts = np.linspace(0, count - height, pieces).astype(int)
        places += [(i, slice(int(a), int(a) + height)) for a in starts]
    read = list(_map(lambda place: bits(*place), places))
    sizes = np.array([x.shape[-1] for x in read])
    of = np.array([i for i, _ in places])
    # A slice stands for its tensor's size, whatever the share of it that it is.
    each = np.array([tensor.size for tensor in tensors]) / np.bincount(of, sizes)
    weights = np.repeat(each[of], sizes)
    windows = {}
    for m in {m for m, _ in todo}:
        values, rank = np.concatenate([x[m] for x in read]), np.arange(1, len(weights) + 1)
        if len(tensors) == 1:
            values, rank = np.sort(values)[::-1], rank * each[0]
        else:
            order = np.argsort(values)[::-1]
            values, rank = values[order], np.cumsum(weights[order])
        for (n, j), k in todo.items():
            if n == m:
                spread = 6 * np.sqrt(k * (1 - k / total) * total / len(rank)) + 8 * each.max()
                top, end = np.searchsorted(rank, (k - spread, k + spread))
                last = len(rank) - 1
                windows[n, j] = _window(int(values[min(end, last)]), int(values[min(top, last)]))
    return windows


def _search(
    places: Sequence[Place],
    bits: Callable[[int, Rows], np.ndarray],
    todo: Mapping[Key, int],
    windows: dict[Key, _Window],
) -> dict[Key, tuple[int, int, list[int]]]:
    """Cut -> its value's bits, how many equal values lie above it, how many each place has."""
    found = {}
    while windows:
        current = dict(windows)

        def count(place: Place, windows: Mapping[Key, _Window] = current) -> dict[Key, _Count]:
            x = bits(*place)
            return {key: _count(x[key[0]], window) for key, window in windows.items()}

        counts = list(_map(count, places))
        for key, window in current.items():
            k, above = todo[key], sum(each[key].above for each in counts)
            values, times = _together([each[key] for each in counts])
            reach = above + np.cumsum(times[::-1])[::-1]  # elements at this value or above it
            if k <= above:
                windows[key] = _window(window.high + 1, TOP)
            elif not values.size or k > reach[0]:
                windows[key] = _window(0, window.low - 1)
            else:
                at = int(np.flatnonzero(reach >= k)[-1])
                low = window.low + (int(values[at]) << window.shift)
                if window.shift:
                    windows[key] = _window(low, low + (1 << window.shift) - 1)
                    continue
                del windows[key]
                each = [int(c[key].times[c[key].values == values[at]].sum()) for c in counts]
                found[key] = (low, k - int(reach[at] - times[at]), each)
    return found


def _window(low: int, high: int) -> _Window:
    width = high - low
    return _Window(low, high, 0 if width < _NARROW else width.bit_length() - _BIN_BITS)


def _count(bits: np.ndarray, window: _Window) -> _Count:
    offset = bits - np.uint32(window.low)
    # by indices, as numpy takes few elements by a mask at half the speed
    inside = offset[np.flatnonzero(offset <= np.uint32(window.high - window.low))]
    above = int(np.count_nonzero(bits > np.uint32(window.high)))
    values, times = np.unique(inside >> np.uint32(window.shift), return_counts=True)
    return _Count(above, values, times)


def _together(counts: Sequence[_Count]) -> tuple[np.ndarray, np.ndarray]:
    """Values in ascending order, with how often they are in all the blocks."""
    values, places = np.unique(np.concatenate([c.values for c in counts]), return_inverse=True)
    times = np.bincount(places, np.concatenate([c.times for c in counts]), len(values))
    return values, times.astype(np.int64)


def _ends(
    tensors: Sequence[Blockwise],
    places: Sequence[Place],
    bits: Callable[[int, Rows], np.ndarray],
    m: int,
    value: int,
    ties: int,
    counts: Sequence[int],
) -> np.ndarray:
    """For each tensor, the flat index before which elements equal to the cut lie above it."""
    ends = np.zeros(len(tensors), np.uint32)
    if not value:  # deltas of zero, and padding where there is some
        return np.full(len(tensors), ALL)
    before = np.cumsum([0, *counts])
    last = int(np.searchsorted(before, ties)) - 1  # the place of the last tie that lies above
    i, rows = places[last]
    ends[:i] = ALL
    start = 0 if rows is ... else rows.start * (tensors[i].size // tensors[i].shape[0])
    at = np.flatnonzero(bits(i, rows)[m] == np.uint32(value))[ties - int(before[last]) - 1]
    ends[i] = start + int(at) + 1
    return ends
