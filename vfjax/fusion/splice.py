"""Where the tokens of pictures stand in a row, and their numbers in a batch; on the host."""

import dataclasses
from collections.abc import Sequence
from typing import Self

import numpy as np

from vfjax.architectures.base import Gather, Prepared, bucket
from vfjax.fusion.shard import Shard, no_room, numbered
from vfjax.text.prompts import IMAGE_ID


@dataclasses.dataclass(frozen=True)
class Slots:
    """Tokens of a row, or of a picture in it.

    Attributes:
        ids: int64[k], 0 at visual tokens.
        visual: int64[k] numbers of visual tokens in the batch, -1 at text.
        segments: int64[k], k + 1 for branch k's tokens and marks, 0 for other text.
        place: int64[k, 3], time, row and column of a picture's token; see `vfjax.model.Batch`.
        steps: int64[k], positions that the text goes on after each; see `vfjax.model.Batch`.
    """

    ids: np.ndarray
    visual: np.ndarray
    segments: np.ndarray
    place: np.ndarray
    steps: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def text(cls, ids: np.ndarray) -> Self:
        """Text alone, int64[k]."""
        n = len(ids)
        none, zeros = np.full(n, -1), np.zeros(n, np.int64)
        return cls(ids, none, zeros, np.zeros((n, 3), np.int64), np.ones(n, np.int64))

    @classmethod
    def join(cls, parts: Sequence["Slots"]) -> Self:
        """One after another; at least one."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def __getitem__(self, where: slice | np.ndarray) -> Self:
        names = [field.name for field in dataclasses.fields(self)]
        return type(self)(*(getattr(self, name)[where] for name in names))


def expand(row: np.ndarray, seen: Sequence[Sequence[Slots]]) -> tuple[Slots, np.ndarray]:
    """A row with each placeholder widened to its picture's tokens.

    Marks that a branch begins and ends a picture with (`<img>`, `</img>`), the outermost of them at
    least, and that the row has around the placeholder already, as chat templates write them, are
    read once.

    Args:
        row: int64[r] ids, -200 at each picture.
        seen: the tokens of each picture, by branch.

    Returns:
        The tokens [s], and int64[s] indices into `row`.
    """
    parts, of, first = list[Slots](), list[np.ndarray](), 0
    for at, branches in zip(np.flatnonzero(row == IMAGE_ID).tolist(), seen, strict=True):
        before, after = _around(row, first, at, branches)
        picture = Slots.join(branches)
        parts += [Slots.text(row[first : at - before]), picture]
        of += [np.arange(first, at - before), np.full(len(picture), at)]
        first = at + 1 + after
    rest = Slots.text(row[first:])
    return Slots.join([*parts, rest]), np.concatenate([*of, np.arange(first, len(row))])


def _around(row: np.ndarray, first: int, at: int, branches: Sequence[Slots]) -> tuple[int, int]:
    """How many ids of a row around a placeholder are the marks of one of the branches."""
    for slots in branches:
        visual = np.flatnonzero(slots.visual >= 0)
        if not len(visual):
            continue
        start, end = slots.ids[: visual[0]], slots.ids[visual[-1] + 1 :]
        before = _shared(start, row[first:at])
        after = _shared(end[::-1], row[at + 1 :][::-1])
        if before and after:
            return before, after
    return 0, 0


def _shared(start: np.ndarray, before: np.ndarray) -> int:
    """How many ids a picture begins with and the text before it ends with, at most."""
    counts = range(min(len(start), len(before)), 0, -1)
    return next((k for k in counts if np.array_equal(start[:k], before[-k:])), 0)


def layout(
    ready: Prepared, first: int, branch: int, shard: Shard | None = None
) -> tuple[list[Slots], Gather | None, int]:
    """The tokens of each of a branch's pictures, and how those are made that the memory lacks.

    Args:
        ready: what the branch prepared.
        first: number of its first visual token in the batch.
        branch: its number.
        shard: the pictures are this share's; numbers are those of the whole batch.

    Raises:
        InputError: more tokens are made than the share has room for.

    Returns:
        For each picture its tokens; the gather that makes those behind the memory, None without;
        and how many visual tokens the branch has.
    """
    index, processes = (shard.index, shard.count) if shard else (0, 1)
    if shard:
        ready = numbered(ready, shard)
    room, width = ready.room or (0, 1)
    behind = ready.size + index * room
    made: list[tuple[np.ndarray, np.ndarray | None]] = []
    out, count = [], 0
    for run in ready.runs:
        indices, marks = run.indices, run.text
        numbers = indices[:, 0].copy()
        plain = np.full(len(run), indices.shape[1] == 1)
        if run.weights is not None:
            whole = run.weights == 1
            plain = whole.any(axis=1)
            numbers = np.take_along_axis(indices, whole.argmax(axis=1)[:, None], axis=1)[:, 0]
        new = ~plain & (marks < 0)
        numbers[new] = behind + count + np.arange(new.sum())
        count += int(new.sum())
        if new.any():
            made.append((indices[new], None if run.weights is None else run.weights[new]))
        place, steps = np.zeros((len(run), 3), np.int64), np.ones(len(run), np.int64)
        if run.place is not None:
            place, steps = run.place, np.zeros(len(run), np.int64)
            steps[-1] = run.span
        text = marks >= 0
        out.append(
            Slots(
                np.where(text, marks, 0),
                np.where(text, -1, first + numbers),
                np.full(len(run), branch + 1),
                place,
                steps,
            )
        )
    if ready.room is None and count:
        room = bucket(count)
    if count > room:
        raise no_room("visual tokens made of others", count, room)
    gather = _gather(made, room, width) if room else None
    return out, gather, ready.size + processes * room


def _gather(made: Sequence[tuple[np.ndarray, np.ndarray | None]], room: int, width: int) -> Gather:
    """One for all pictures, filled up to `room` tokens, each of `width` others at least."""
    most = max(width, *(indices.shape[1] for indices, _ in made), 1)
    largest = any(weights is None for _, weights in made)
    assert not (largest and any(weights is not None for _, weights in made)), "one kind a branch"
    out, shares = np.zeros((room, most), np.int32), np.zeros((room, most), np.float32)
    at = 0
    for indices, weights in made:
        here = slice(at, at := at + len(indices))
        out[here] = np.pad(indices, ((0, 0), (0, most - indices.shape[1])), mode="edge")
        if weights is not None:
            shares[here, : weights.shape[1]] = weights
    return Gather(out, None if largest else shares)


def pad(rows: Sequence[Slots], length: int, side: str) -> tuple[Slots, np.ndarray]:
    """Rows of a batch, filled up to one length.

    Args:
        rows: b of them, none longer than `length`; at least one.
        length: t.
        side: "left" fills rows before their first token, else after their last.

    Returns:
        Arrays [b, t] of int32, and bool[b, t], False at padding. What is picked of an array by it
        is the rows' one after another.
    """
    lengths, at = np.array([[len(row)] for row in rows]), np.arange(length)
    mask = at >= length - lengths if side == "left" else at < lengths
    every, padding = Slots.join(rows), {"visual": -1, "steps": 1}
    arrays = []
    for field in dataclasses.fields(Slots):
        values = getattr(every, field.name)
        array = np.full(mask.shape + values.shape[1:], padding.get(field.name, 0), np.int32)
        array[mask] = values
        arrays.append(array)
    return Slots(*arrays), mask
