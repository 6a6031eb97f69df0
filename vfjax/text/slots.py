"""Where visual tokens stand in a row, and their numbers in a batch; on the host."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from vfjax.errors import InputError
from vfjax.text.prompts import IMAGE_ID
from vfjax.views import Prepared, bucket


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


def splice(
    row: np.ndarray, seen: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A row with each placeholder widened to its picture's visual tokens.

    Args:
        row: int64[r] ids, -200 at each picture.
        seen: the numbers of each picture's visual tokens.

    Returns:
        int64[s] ids (0 at visual tokens), int64[s] numbers of the visual tokens (-1 at text),
        int64[s] indices into `row`.
    """
    width = np.ones(len(row), np.int64)
    places = np.flatnonzero(row == IMAGE_ID)
    width[places] = [len(numbers) for numbers in seen]
    source = np.repeat(np.arange(len(row)), width)
    ids = np.where(row == IMAGE_ID, 0, row)[source]
    where = np.full(len(source), -1)
    if seen:
        where[row[source] == IMAGE_ID] = np.concatenate(seen)
    return ids, where, source


def numbered(ready: Prepared, shard: Shard) -> Prepared:
    """A branch's share with its tokens' numbers in the memory of all processes' shares."""
    own = ready.size - ready.shared
    first, end = shard.index * own, shard.count * own
    indices = [np.where(i < own, first + i, end - own + i) for i in ready.indices]
    return dataclasses.replace(ready, indices=indices, size=end + ready.shared)


def no_room(what: str, found: int, room: int) -> InputError:
    """The error of a share that has more than was agreed."""
    return InputError(
        "shard",
        found=f"{found} {what}",
        expected=f"at most {room}, as agreed between the processes, and no video",
        fix="make the shard from the same rows",
    )


def pooled(ready: Prepared, pools: Sequence[int]) -> tuple[list[np.ndarray], np.ndarray | None]:
    """A branch's tokens of each picture after pooling, and which of its memory make a pooled one.

    Args:
        ready: what the branch's views made.
        pools: tokens that are pooled into one, for each view.

    Returns:
        For each picture int64[k] numbers, the pooled ones behind the memory; and int32[m, p] the
        memory's tokens of each pooled one, m a bucket, None if nothing is pooled.
    """
    most = max(pools, default=1)
    if most == 1:
        return ready.indices, None
    seen, groups, count = [], [], 0
    for indices, pool in zip(ready.indices, pools, strict=True):
        if pool > 1:
            group = indices[: len(indices) // pool * pool].reshape(-1, pool)
            indices = ready.size + count + np.arange(len(group))
            groups.append(np.pad(group, ((0, 0), (0, most - pool)), mode="edge"))
            count += len(group)
        seen.append(indices)
    out = np.zeros((bucket(count), most), np.int32)
    out[:count] = np.concatenate(groups)
    return seen, out
