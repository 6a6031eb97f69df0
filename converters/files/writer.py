"""Streaming, atomic writer of model folders: safetensors under Hugging Face's file names."""

import contextlib
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from types import EllipsisType

import jax
import numpy as np

from converters.files.output import Stage, check_new, open_stage
from converters.files.paths import stand_in, whole
from converters.files.shards import Shard, index, join, plan_shards
from vfjax import InputError
from vfjax.merge import LazyTensor, blocks

Content = bytes | Path | Callable[[], bytes]
"""Of a file: the bytes, a file to copy, or what returns the bytes."""

THREADS = min(8, os.cpu_count() or 1)


def write_folder(
    out: str | os.PathLike[str],
    weights: Mapping[str, Mapping[str, LazyTensor]],
    *,
    files: Mapping[str, Content] | None = None,
    shard_bytes: float = 5e9,
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int], object] | None = None,
    key: str = "",
    resume: bool = False,
) -> None:
    """Writes a model folder, whole or not at all.

    Threads read blocks of tensors ahead of the writing, so memory is bounded by a few blocks.
    Everything goes to a folder beside `out` (`.NAME.part`), is synced to disk, then renamed. On an
    error, SIGTERM or SIGHUP that folder is removed; a killed run leaves it, where nothing loads it,
    and a later one removes it or goes on with it. In a bucket a mark does so, see
    `converters.files.output`.

    Args:
        out: folder to make, or its URL; its parents are made too.
        weights: sub-folder ("" for `out` itself) -> name -> tensor. Each gets `model.safetensors`,
            or `model-00001-of-0000N.safetensors` and `model.safetensors.index.json`.
        files: path in `out` -> bytes, a file to copy, or a function that returns the bytes, called
            when all weights are written: config.json, tokenizer files.
        shard_bytes: most tensor bytes in a weights file; a larger tensor gets a file to itself.
        metadata: of the safetensors headers; by default {"format": "pt"}, as transformers wants.
        progress: called with the number of bytes after each write of tensor data.
        key: says what the tensors are made of.
        resume: keep the whole weights files that a killed run of the same key, names and shapes
            left, if there is one.

    Raises:
        InputError: before any work if `out` exists, another run is writing it, the name of the
            folder beside it is taken by something else, a path leaves it or occurs twice, a file
            to copy is absent, a dtype has no safetensors name, the disk has too little room, or
            there is a killed run to resume but of other tensors; during the work if writing fails
            or a tensor is not of the shape and dtype that it claims.
    """
    out = stand_in(out)
    check_new(out)
    shards = plan_shards(weights, shard_bytes, metadata)
    others = list((files or {}).items())
    for folder in weights:
        group = [shard for shard in shards if shard.folder == folder]
        if len(group) > 1:
            others.append((join(folder, "model.safetensors.index.json"), index(group)))
    _check_paths(out, [*(shard.path for shard in shards), *(path for path, _ in others)])
    sizes = sum(_size(source) for _, source in others)
    with _ending(), open_stage(out, shards, key, resume) as stage:
        done = {shard.path for shard in shards if stage.has(shard.path, shard.size)}
        todo = [shard for shard in shards if shard.path not in done]
        stage.check_room(sum(shard.size for shard in todo) + sizes)
        _keep_freed_memory()
        pool = ThreadPoolExecutor(THREADS)
        try:
            for shard in shards:
                if shard.path not in done:
                    _write_shard(stage, shard, pool, progress)
                elif progress:
                    progress(shard.size - len(shard.header))
        finally:  # of an error, without waiting for what is being read
            pool.shutdown(wait=False, cancel_futures=True)
        for path, source in sorted(others, key=lambda item: item[0] == "config.json"):
            _write_file(stage, path, source() if callable(source) else source)
        stage.finish()


class Ended(KeyboardInterrupt):
    """SIGTERM or SIGHUP came; the signal is its argument."""


@contextlib.contextmanager
def _ending() -> Iterator[None]:
    """SIGTERM and SIGHUP raise `Ended` where they would end the process at once; a second one does.

    So nothing is left behind without a name. Other handlers, and signals that are ignored as by
    nohup, stay.
    """

    def end(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise Ended(number)

    main = threading.current_thread() is threading.main_thread()
    alone = jax.process_count() == 1  # else JAX's own handler of SIGTERM may be there, unseen
    both = (signal.SIGTERM, signal.SIGHUP) if main and alone else ()
    mine = [each for each in both if signal.getsignal(each) is signal.SIG_DFL]
    for each in mine:
        signal.signal(each, end)
    try:
        yield
    finally:
        for each in mine:
            signal.signal(each, signal.SIG_DFL)


def _check_paths(out: Path, paths: list[str]) -> None:
    for i, path in enumerate(paths):
        pure = PurePosixPath(path)
        if pure.is_absolute() or ".." in pure.parts or path in paths[:i]:
            raise InputError(
                out / path,
                found="a path " + ("given twice" if path in paths[:i] else "outside the folder"),
                expected="different paths below the output folder",
                fix="rename the file",
            )


def _size(source: Content) -> int:
    if callable(source):
        return 0
    if isinstance(source, bytes):
        return len(source)
    if not source.is_file():
        raise InputError(source, found="no file", expected="a file to copy", fix="check the path")
    return source.stat().st_size


def _keep_freed_memory() -> None:
    """Has glibc keep freed blocks for the next ones.

    It returns megabytes to the system and takes them back page by page, which costs more than the
    arithmetic of a merge, until it has seen a block of up to 32 MiB freed: mallopt(3).
    """
    np.empty((32 << 20) - (64 << 10), np.uint8)


def _write_shard(
    stage: Stage, shard: Shard, pool: Executor, progress: Callable[[int], object] | None
) -> None:
    with stage.file(shard.path, shard.size) as write:
        write(memoryview(shard.header))
        for data in _read_ahead(pool, shard.tensors):
            write(data)
            if progress:
                progress(data.nbytes)


def _write_file(stage: Stage, path: str, source: bytes | Path) -> None:
    data = source if isinstance(source, bytes) else whole(source).read_bytes()
    with stage.file(path, len(data)) as write:
        write(memoryview(data))


def _read_ahead(pool: Executor, tensors: Mapping[str, LazyTensor]) -> Iterator[memoryview]:
    """The tensors' bytes in order, read by a few threads a few blocks ahead."""
    pending: deque[Future[memoryview]] = deque()
    for name, tensor in tensors.items():
        for rows in blocks(tensor.shape):
            pending.append(pool.submit(_read, name, tensor, rows))
            if len(pending) > THREADS:
                yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _read(name: str, tensor: LazyTensor, rows: slice | EllipsisType) -> memoryview:
    try:
        array = tensor[rows]
    except OSError as error:
        raise InputError(
            name, found=f"{error} while reading it", expected="a file", fix="check the source"
        ) from error
    shape = tensor.shape
    if isinstance(rows, slice):
        shape = (rows.stop - rows.start, *shape[1:])
    if (array.shape, array.dtype) != (shape, tensor.dtype):
        raise InputError(
            name,
            found=f"{array.dtype}{list(array.shape)} where it was read",
            expected=f"{tensor.dtype}{list(shape)}, as it claims",
            fix="check the source",
        )
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
