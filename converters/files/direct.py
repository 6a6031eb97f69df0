"""Files written past the system's page cache.

A page that is new in the cache costs the kernel more than a merge spends on the values in it, and
drives out pages of the sources: 2 to 4 ns a byte, where a direct write takes 0.1.
"""

import contextlib
import errno
import fcntl
import io
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

Write = Callable[[memoryview], None]
"""Appends bytes to a file."""

BUFFER = 4 << 20
"""Bytes of a direct write, a multiple of any disk's block; smaller files go by the cache."""


@contextlib.contextmanager
def new_file(path: Path, size: int) -> Iterator[Write]:
    """A file that is emptied, then appended to, until the block ends.

    Args:
        path: of it.
        size: bytes that it will have.
    """
    if size < BUFFER:
        with path.open("wb", buffering=0) as file:
            yield lambda data: write_all(file, data)
        return
    with _open(path) as file:
        direct = _Direct(file)
        yield direct.write
        direct.finish()


def write_all(file: io.RawIOBase, data: memoryview) -> None:
    """Unbuffered, so that a refused write is not tried again when the file is closed."""
    while data:
        data = data[file.write(data) :]


def _open(path: Path) -> io.FileIO:
    try:
        return io.FileIO(path, "wb", opener=lambda path, flags: os.open(path, flags | _FLAG, 0o666))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return io.FileIO(path, "wb")  # the file system has no direct writes, as some in memory


_FLAG = getattr(os, "O_DIRECT", 0)  # macOS has none


class _Direct:
    """Appends to a file from a buffer at a page's start, as direct writes must."""

    def __init__(self, file: io.FileIO):
        self.file, self.buffer, self.filled = file, mmap.mmap(-1, BUFFER), 0
        self.values = np.frombuffer(self.buffer, np.uint8)  # numpy lets others run while it copies

    def write(self, data: memoryview) -> None:
        """Copies the bytes, and writes the buffer whenever it is full."""
        rest = np.frombuffer(data, np.uint8)
        while rest.size:
            count = min(rest.size, len(self.values) - self.filled)
            self.values[self.filled : self.filled + count] = rest[:count]
            self.filled, rest = self.filled + count, rest[count:]
            if self.filled == len(self.values):
                self._flush()

    def finish(self) -> None:
        """Writes what is left, which is no whole block, by the cache."""
        self._by_cache()
        self._flush()

    def _flush(self) -> None:
        with memoryview(self.buffer) as whole:
            begun = os.lseek(self.file.fileno(), 0, os.SEEK_CUR)
            try:
                write_all(self.file, whole[: self.filled])
            except OSError as error:
                # A file system that wants larger blocks, or one that is full and cut a write short.
                if error.errno != errno.EINVAL:
                    raise
                self._by_cache()
                done = os.lseek(self.file.fileno(), 0, os.SEEK_CUR) - begun
                write_all(self.file, whole[done : self.filled])
        self.filled = 0

    def _by_cache(self) -> None:
        handle = self.file.fileno()
        fcntl.fcntl(handle, fcntl.F_SETFL, fcntl.fcntl(handle, fcntl.F_GETFL) & ~_FLAG)
