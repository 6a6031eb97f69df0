"""A stage's states where Orbax writes none, in a bucket of S3, by TensorStore.

    STEP/NAME/...               an array in zarr's format, each chunk an object
    STEP/done-INDEX-of-COUNT    the share of that process is there

No object can be renamed, so a state counts only with the marks of all processes, and each writes
its mark behind its arrays. Each process writes the shards that it has, one copy of each.
"""

import functools
import math
import re
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
import tensorstore

CHUNK = 256 << 20
"""Bytes of an object, at most, where rows can be divided so."""

WRITES = 16
"""Shards that are on their way at a time."""


class _Copied(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]
    shards: list[tuple[tuple[slice, ...], np.ndarray]]


class Objects:
    """The last states of a stage below a name in a bucket.

    What a bucket refuses is TensorStore's ValueError, or another error of Python's own.

    Attributes:
        step: of the newest whole state at the start, None without one.
    """

    def __init__(self, store: tensorstore.KvStore, keep: int):
        """Opens what is there; what a killed run left unfinished is removed.

        That is before any process saves: none makes a step until all are here.

        Args:
            store: the name, with a slash behind it.
            keep: states that are kept.
        """
        self.store, self.keep = store, keep
        self.pool = ThreadPoolExecutor(1, "vfjax-states")
        self.saving: Future[None] | None = None
        found = self._found()
        whole = _whole(found)
        self.step = max(whole, default=None)
        if jax.process_index() == 0:
            for step in {*found} - {*whole}:
                self._remove(step, found[step])

    def save(self, step: int, arrays: Mapping[str, jax.Array]) -> None:
        """Starts writing once the state before is written; returns when the arrays are copied."""
        self.wait()
        copied = {
            name: _Copied(
                x.shape,
                x.dtype,
                chunk(x.sharding.shard_shape(x.shape), x.dtype.itemsize),
                [(s.index, np.array(s.data)) for s in x.addressable_shards if s.replica_id == 0],
            )
            for name, x in arrays.items()
        }
        self.saving = self.pool.submit(self._write, step, copied)

    def wait(self) -> None:
        """Returns when all is written."""
        if self.saving is not None:
            saving, self.saving = self.saving, None
            saving.result()

    def close(self) -> None:
        """Ends the thread that writes, once it has."""
        self.pool.shutdown()
        self.wait()

    def restore(self, like: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """The newest state's arrays, sharded as their structs say, not as they were saved.

        Raises:
            ValueError: it has no such array, or one of another shape or dtype, or a part is lost.
        """
        out: dict[str, jax.Array] = {}
        for name, want in like.items():
            array = tensorstore.open(
                {"driver": "zarr", "fill_missing_data_reads": False},
                kvstore=self.store / f"{self.step}/{name}/",
                open=True,
                dtype=want.dtype,
                shape=want.shape,
            ).result()
            assert want.sharding is not None
            read = functools.partial(_read, array)
            out[name] = jax.make_array_from_callback(want.shape, want.sharding, read)
        return out

    def _write(self, step: int, arrays: Mapping[str, _Copied]) -> None:
        first = jax.process_index() == 0
        pending: list[tensorstore.WriteFutures] = []
        spec = {
            "driver": "zarr",
            "metadata": {"compressor": None},
            "store_data_equal_to_fill_value": True,  # so that what is absent has been lost
        }
        for name, (shape, dtype, chunks, shards) in arrays.items():
            if not first and not shards:
                continue
            array = tensorstore.open(
                spec,
                kvstore=self.store / f"{step}/{name}/",
                open=not first,
                create=first,
                assume_metadata=not first,
                dtype=dtype,
                shape=shape,
                chunk_layout=tensorstore.ChunkLayout(chunk_shape=chunks),
            ).result()
            for index, value in shards:
                pending.append(array[index].write(value))
            while len(pending) > WRITES:
                pending.pop(0).result()
        for one in pending:
            one.result()
        mark = f"done-{jax.process_index()}-of-{jax.process_count()}"
        self.store.write(f"{step}/{mark}", b"").result()
        if first:
            found = self._found()
            for old in sorted(_whole(found))[: -self.keep]:
                self._remove(old, found[old])

    def _found(self) -> dict[int, set[str]]:
        """Step -> its marks."""
        found: dict[int, set[str]] = {}
        for key in self.store.list().result():
            step, _, name = key.decode().partition("/")
            if step.isdecimal():
                marks = found.setdefault(int(step), set())
                marks |= {name} if re.fullmatch(r"done-\d+-of-\d+", name) else set()
        return found

    def _remove(self, step: int, marks: set[str]) -> None:
        """The marks first: what is left of a killed removal is no state."""
        for mark in marks:
            self.store.write(f"{step}/{mark}", None).result()
        self.store.delete_range(tensorstore.KvStore.KeyRange(f"{step}/", f"{step}0")).result()


def _read(array: tensorstore.TensorStore, index: tuple[slice, ...] | None) -> np.ndarray:
    found: np.ndarray = array[index].read().result()
    return found


def _whole(found: Mapping[int, set[str]]) -> set[int]:
    """The steps that have the marks of all processes of one run."""

    def has_all(marks: set[str]) -> bool:
        counts = {int(mark.split("-")[3]) for mark in marks}
        return any(marks >= {f"done-{i}-of-{n}" for i in range(n)} for n in counts)

    return {step for step, marks in found.items() if has_all(marks)}


def chunk(shard: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The shape of a shard's objects: rows that divide it, of `CHUNK` bytes at most, or one."""
    if not shard:
        return shard
    rows, *rest = shard
    most = max(CHUNK // (math.prod(rest) * itemsize), 1)
    return (next(x for x in range(min(rows, most), 0, -1) if rows % x == 0), *rest)
