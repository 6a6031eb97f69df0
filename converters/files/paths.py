"""Files of checkpoints, wherever they lie: on a disk, or in a bucket (`gs://`, `s3://`).

A local folder stands for one in a bucket. Configs and tokenizers are copied to it, for the
libraries that want paths; weights are empty files there, whose bytes are read from the bucket where
they are asked for. So all that reads folders knows local paths only, and opens weights by the
functions here.
"""

import contextlib
import functools
import hashlib
import os
import posixpath
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from converters.files.buckets import (
    KINDS,
    Object,
    Range,
    asking,
    described,
    file_system,
    is_url,
    read_range,
    split,
    store,
)
from vfjax import InputError
from vfjax.atomic import STORES, UNFINISHED, Store
from vfjax.errors import SHOWN

if TYPE_CHECKING:
    import fsspec
    import tensorstore

COPIED = (".jinja", ".json", ".jsonl", ".model", ".txt", ".yaml", ".yml")
"""Endings of files that are copied with their folder; others wait until they are asked for."""

UNWRITTEN = ".vfjax-unfinished"
"""An object that is in a folder until all others are."""

PIECE = 1 << 20
"""Bytes of a request. What waits for a thread is there twice: as it came, and as Python's bytes."""

REQUESTS = 16
"""That wait for a bucket at a time."""


@functools.cache
def _root() -> Path:
    """Holds the local folders of this process, and is removed at its end."""
    made = tempfile.TemporaryDirectory(prefix="vfjax-buckets-")
    root = Path(made.name)
    _KEPT.append(made)
    UNFINISHED.add(root)
    for scheme in KINDS:
        prefix = f"{root / scheme}{os.sep}"
        SHOWN[prefix] = f"{scheme}://"
        STORES[prefix] = KNOWN[scheme]
    return root


_KEPT: list[object] = []
_OBJECTS: dict[Path, Object] = {}
"""Local path of a bucket's file -> what it stands for."""


def stand_in(path: str | os.PathLike[str]) -> Path:
    """The path itself, or the local one that stands for a URL; nothing is looked up.

    Raises:
        InputError: a URL that names nothing in a bucket.
    """
    if not is_url(path):
        return Path(path)
    scheme, bucket, key = split(str(path))
    return _root() / scheme / bucket / key


def url_of(path: Path) -> str:
    """The URL that a local path stands for, "" if there is none."""
    for start, scheme in SHOWN.items():
        if str(path).startswith(start) and scheme.removesuffix("://") in KINDS:
            return scheme + posixpath.normpath(str(path).removeprefix(start))
    return ""


def local(url: str) -> Path:
    """The local folder, or file, that stands for one of a bucket; there may be nothing in both.

    Args:
        url: its name; or that of a local folder beside one that stands for a bucket's.

    Raises:
        InputError: no such bucket, no credentials, the package that reads it is not installed, a
            server that refuses, or a folder that is not written whole.
    """
    place = stand_in(url) if is_url(url) else Path(os.path.normpath(url))
    url = url_of(place)
    scheme, bucket, key = split(url)
    files, start = file_system(scheme, url), url.partition("://")[2]
    with asking(url):
        found = files.find(start, detail=True)
    inside = {name: entry for name, entry in found.items() if name.startswith(start + "/")}
    inside = {name: entry for name, entry in inside.items() if not name.endswith("/")}
    unfinished = [x.removesuffix(UNWRITTEN) for x in inside if x.endswith(f"/{UNWRITTEN}")]
    if f"{start}/" in unfinished:
        raise InputError(
            url,
            found="a folder that is still written, or whose writing was killed",
            expected="a whole one",
            fix="wait for it, or write it again",
        )
    inside = {name: x for name, x in inside.items() if not name.startswith(tuple(unfinished))}
    wanted = {place.joinpath(*name[len(start) + 1 :].split("/")): x for name, x in inside.items()}
    if not wanted and start in found:
        wanted = {place: found[start]}
    with asking(url):
        _settle(place, {path: described(scheme, x) for path, x in wanted.items()}, files)
    if start in found:
        whole(place)
    return place


def nearby(path: Path) -> Path:
    """The path; if it is one beside what stands for a bucket's folder, with what that has there.

    Where the bucket does not say, there is nothing.
    """
    with contextlib.suppress(InputError):
        if url_of(path):
            local(str(path))
    return path


def contents(path: Path) -> bytes:
    """The bytes of a file, which are not kept on the disk; raises InputError as `local`."""
    what = _OBJECTS.get(path)
    if what is None or _is_copied(path, what):
        return path.read_bytes()
    scheme, _, name = what.url.partition("://")
    with asking(what.url):
        return bytes(file_system(scheme, what.url).cat_file(name))


def publish(path: Path) -> None:
    """Copies a local file to its bucket; raises InputError as `local`."""
    url = url_of(path)
    scheme, _, name = url.partition("://")
    with asking(url):
        file_system(scheme, url).put_file(str(path), name)
    _OBJECTS.pop(path, None)
    _PUBLISHED[path] = _version(path)


def _is_copied(path: Path, what: Object) -> bool:
    """Whether a local file has what it stands for, or was changed since."""
    version = _version(path)
    return version[0] == what.size or version != _PUBLISHED.get(path)


def _version(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


@contextlib.contextmanager
def working(path: str | os.PathLike[str], write: bool = True) -> Iterator[Path]:
    """A folder to work in: of a bucket's URL the local one that stands for it.

    At the end of the block all files that are new there, or have changed, are copied to the bucket.

    Args:
        path: the folder, or its URL.
        write: whether this process copies them.

    Raises:
        InputError: as `local`.
    """
    if not is_url(path):
        yield Path(path)
        return
    place = local(str(path))
    place.mkdir(parents=True, exist_ok=True)
    try:
        yield place
    finally:
        for file in sorted(place.rglob("*")) if write else ():
            hidden = any(part.startswith(".") for part in file.relative_to(place).parts)
            if file.is_file() and not hidden and _PUBLISHED.get(file) != _version(file):
                publish(file)


_PUBLISHED: dict[Path, tuple[int, int]] = {}
"""Local file -> its size and time when it was last as in its bucket."""


def objects(folder: Path) -> "tensorstore.KvStore":
    """TensorStore's view of what a local folder stands for; raises InputError as `local`."""
    url = url_of(folder)
    scheme, bucket, key = split(url)
    with asking(url):
        return store(scheme, bucket) / f"{key}/"


KNOWN = {"gs": Store(local, contents, publish), "s3": Store(local, contents, publish, objects)}
STORES |= {f"{scheme}://": known for scheme, known in KNOWN.items()}


def _settle(place: Path, wanted: dict[Path, Object], files: "fsspec.AbstractFileSystem") -> None:
    """Brings a local folder to what its bucket has now."""
    if place.is_file() and place not in wanted:
        place.unlink()
    for path in [*place.rglob("*")] if place.is_dir() else []:
        if path.is_file() and path not in wanted:
            path.unlink()
            _OBJECTS.pop(path, None)
    todo = [path for path, what in wanted.items() if _OBJECTS.get(path) != what]
    for path in todo:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        _OBJECTS[path], _PUBLISHED[path] = wanted[path], _version(path)
    copied = [path for path in todo if path.suffix in COPIED]
    try:
        with ThreadPoolExecutor(REQUESTS) as pool:
            for _ in pool.map(lambda path: _copy(path, files), copied):
                pass
    except BaseException:
        for path in copied:  # which are copied again, if this is tried again
            _OBJECTS.pop(path, None)
        raise


def _copy(path: Path, files: "fsspec.AbstractFileSystem") -> None:
    scheme, _, name = _OBJECTS[path].url.partition("://")
    part = path.with_name(path.name + ".part")
    files.get_file(name, str(part))
    part.replace(path)
    _PUBLISHED[path] = _version(path)


def whole(path: Path) -> Path:
    """A file that is all on the disk: the same, or copied now.

    Raises:
        InputError: as `local`.
    """
    what = _OBJECTS.get(path)
    if what is not None and not _is_copied(path, what):
        with asking(what.url):
            _copy(path, file_system(what.url.partition(":")[0], what.url))
    return path


def size(path: Path) -> int:
    """Bytes of a file."""
    what = _OBJECTS.get(path)
    return path.stat().st_size if what is None else what.size


def threads(paths: Iterator[Path] | list[Path], least: int) -> int:
    """How many read these files at a time: processors, or more where they wait for a bucket."""
    return max(least, REQUESTS) if any(path in _OBJECTS for path in paths) else least


def name(path: Path) -> str:
    """What a file is remembered by: its URL, or its path with all links followed."""
    what = _OBJECTS.get(path)
    return str(path.resolve()) if what is None else what.url


def stat(path: Path) -> tuple[int, int, int, int]:
    """What tells whether a file has changed: size, times of the last change of the content and of
    the inode in nanoseconds, inode; in a bucket, size and a hash of what it says of the version.

    Raises:
        InputError: as `local`.
    """
    what = _OBJECTS.get(path)
    if what is None:
        found = path.stat()
        return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino
    scheme, _, key = what.url.partition("://")
    with asking(what.url):
        now = described(scheme, file_system(scheme, what.url).info(key))
    digest = hashlib.sha256(now.stamp.encode()).digest()
    return now.size, 0, 0, int.from_bytes(digest[:6])


def read_into(path: Path, into: memoryview, offset: int) -> int:
    """Reads bytes of a file to where they should lie.

    Returns:
        How many there were: fewer than asked for at the end of the file.

    Raises:
        InputError: the bucket's file has changed since it was opened, or as `local`.
    """
    what = _OBJECTS.get(path)
    if what is not None:
        into = into[: max(0, what.size - offset)]
        for start in range(0, len(into), PIECE):
            stop = min(start + PIECE, len(into))
            into[start:stop] = read_range(what, offset + start, offset + stop).result()
        return len(into)
    file, done = os.open(path, os.O_RDONLY), 0
    try:
        while done < len(into) and (read := os.preadv(file, [into[done:]], offset + done)):
            done += read
    finally:
        os.close(file)
    return done


def answer(path: Path, offset: int, count: int) -> bytes | None:
    """Bytes of a bucket's file that one request brings, as they come; fewer at the file's end.

    None: of a file on the disk, or of more bytes. Raises InputError as `read_into`.
    """
    what = _OBJECTS.get(path)
    if what is None or count > PIECE:
        return None
    stop = min(offset + count, what.size)
    return read_range(what, offset, stop).result() if offset < stop else b""


def in_bucket(path: Path) -> bool:
    """Whether a file's bytes come from a bucket."""
    return path in _OBJECTS


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    what = _OBJECTS.get(path)
    if what is None:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest, pending = hashlib.sha256(), deque[Range]()
    for start in range(0, what.size, PIECE):
        pending.append(read_range(what, start, min(start + PIECE, what.size)))
        if len(pending) == 2:
            digest.update(pending.popleft().result())
    while pending:
        digest.update(pending.popleft().result())
    return digest.hexdigest()


@contextlib.contextmanager
def header(path: Path) -> Iterator[Path]:
    """A local file of the same size that begins with the same bytes, for safetensors to check."""
    what = _OBJECTS.get(path)
    if what is None:
        yield path
        return
    start = bytes(read_range(what, 0, min(8, what.size)).result())
    length = min(8 + int.from_bytes(start, "little"), what.size)
    if length > 200 << 20:  # what safetensors refuses, too
        length = len(start)
    part = path.with_name(path.name + ".header")
    try:
        with part.open("wb") as file:
            for low in range(0, length, PIECE):
                file.write(read_range(what, low, min(low + PIECE, length)).result())
            file.truncate(what.size)  # zeros, which take no room
        yield part
    finally:
        part.unlink(missing_ok=True)
