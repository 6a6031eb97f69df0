"""A process's share of a batch that several make together, on the host."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from vfjax.architectures.base import Prepared, Run, bucket
from vfjax.errors import InputError, counted
from vfjax.rows import placeholders, texts


@dataclasses.dataclass(frozen=True)
class Shard:
    """A process's share of a batch that several make together; from `Processor.shard`.

    Put together on their first axes, the arrays of all shares are one batch.

    Attributes:
        index: of the process.
        count: of the processes.
        length: t, of all rows of the batch.
        pictures: that each process makes room for; 0 if no row of the batch has any.
        text: ids of a prompt that each process makes room for.
    """

    index: int
    count: int
    length: int
    pictures: int
    text: int


def agree(
    rows: Sequence[np.ndarray],
    index: int,
    count: int,
    *,
    tokens: int,
    bucket_of: Callable[[int], int],
    truncate: int | None = None,
    multiple: int = 1,
) -> Shard:
    """What the processes have to agree on, from what all know: the ids of the whole batch.

    Args:
        rows: ids of all rows of the batch, in order, -200 at each picture; process i has the i-th
            of `count` equal parts.
        index: of this process.
        count: of the processes.
        tokens: of a picture in all branches, at most.
        bucket_of: the length that a row of so many tokens is filled up to.
        truncate: most tokens of a row.
        multiple: of pictures that a process makes room for, if any row has one.

    Raises:
        InputError: the rows don't divide, or what `bucket_of` raises of a row that is too long.
    """
    if len(rows) % count:
        raise InputError(
            "batch",
            found=counted(len(rows), "row"),
            expected=f"a multiple of {count}, the number of processes",
            fix="choose another batch size",
        )
    pictures = np.array([placeholders(row) for row in rows])
    lengths = [len(row) + n * (tokens - 1) for row, n in zip(rows, pictures, strict=True)]
    most = int(pictures.reshape(count, -1).sum(axis=1).max())
    return Shard(
        index=index,
        count=count,
        length=bucket_of(min(max(lengths), truncate or max(lengths))),
        pictures=-(-bucket(most) // multiple) * multiple if most else 0,
        text=bucket_of(max((len(words[:truncate]) for words in texts(rows)), default=1)),
    )


def numbered(ready: Prepared, shard: Shard) -> Prepared:
    """A branch's share with its tokens' numbers in the memory of all processes' shares."""
    own = ready.size - ready.shared
    first, end = shard.index * own, shard.count * own

    def moved(run: Run) -> Run:
        indices = np.where(run.indices < own, first + run.indices, end - own + run.indices)
        return dataclasses.replace(run, indices=indices)

    return dataclasses.replace(ready, runs=[moved(r) for r in ready.runs], size=end + ready.shared)


def no_room(what: str, found: int, room: int) -> InputError:
    """The error of a share that has more than was agreed."""
    return InputError(
        "shard",
        found=f"{found} {what}",
        expected=f"at most {room}, as agreed between the processes, and no video",
        fix="make the shard from the same rows",
    )
