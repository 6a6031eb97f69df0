"""Files of checkpoints, wherever they lie: on a disk, or in a bucket (`gs://`, `s3://`).

A local folder stands for one in a bucket. Configs and tokenizers are copied to it, for the
libraries that want paths; weights are empty files there, whose bytes are read from the bucket where
they are asked for. So all that reads folders knows local paths only, and opens weights by the
functions here.

fsspec's file systems (s3fs, gcsfs: extras, and what Orbax has of buckets) list, copy and write;
TensorStore reads byte ranges.
"""

import contextlib
import dataclasses
import functools
import hashlib
import logging
import os
import posixpath
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfjax import InputError
from vfjax.atomic import SCHEMES, UNFINISHED
from vfjax.errors import SHOWN, cut

if TYPE_CHECKING:
    import fsspec
    import tensorstore

KINDS = {"gs": "gcs", "s3": "s3"}
"""Scheme of a URL -> TensorStore's driver, and the extra that its bucket needs."""

PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}

LOGIN = {
    "gs": "run gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS",
    "s3": "run aws configure, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
}

COPIED = (".jinja", ".json", ".jsonl", ".model", ".txt", ".yaml", ".yml")
"""Endings of files that are copied with their folder; others wait until they are asked for."""

UNWRITTEN = ".vfjax-unfinished"
"""An object that is in a folder until all others are."""

PIECE = 4 << 20
"""Bytes of a request."""

REQUESTS = 8
"""That wait for a bucket at a time."""

RETRIES = {"max_retries": 8, "initial_delay": "500ms", "max_delay": "10s"}
"""Of a request that a busy server refuses; half a minute in all."""


@dataclasses.dataclass(frozen=True)
class Object:
    """A file in a bucket.

    Attributes:
        url: its whole name.
        size: bytes.
        stamp: what its bucket says of this version of it.
    """

    url: str
    size: int
    stamp: str


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
        SCHEMES[prefix] = local
    return root


_KEPT: list[object] = []
_OBJECTS: dict[Path, Object] = {}
"""Local path of a bucket's file -> what it stands for."""


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether it names something in a bucket."""
    return str(path).startswith(tuple(f"{scheme}://" for scheme in KINDS))


def split(url: str) -> tuple[str, str, str]:
    """A URL's scheme, bucket and key.

    Raises:
        InputError: it has no bucket, or its key leads out of it.
    """
    scheme, _, rest = url.partition("://")
    bucket, _, key = rest.partition("/")
    key = key.rstrip("/")
    if not bucket or key and any(part in ("", ".", "..") for part in key.split("/")):
        raise InputError(
            url, found="no name in a bucket", expected=f"{scheme}://BUCKET/FOLDER", fix="correct it"
        )
    return scheme, bucket, key


def local(url: str) -> Path:
    """The local folder, or file, that stands for one of a bucket; there may be nothing in both.

    Args:
        url: its name; or that of a local folder beside one that stands for a bucket's.

    Raises:
        InputError: no such bucket, no credentials, the package that reads it is not installed, a
            server that refuses, or a folder that is not written whole.
    """
    for prefix, shown in SHOWN.items():
        if url.startswith(prefix):
            url = shown + posixpath.normpath(url.removeprefix(prefix))
    scheme, bucket, key = split(url)
    url = f"{scheme}://{bucket}/{key}".rstrip("/")
    files = file_system(scheme, url)
    with _asking(url):
        found = files.find(f"{bucket}/{key}".rstrip("/"), detail=True)
    place, start = _root() / scheme / bucket / key, f"{bucket}/{key}".rstrip("/")
    inside = {name: entry for name, entry in found.items() if name.startswith(start + "/")}
    inside = {name: entry for name, entry in inside.items() if not name.endswith("/")}
    if any(name.endswith("/" + UNWRITTEN) for name in inside):
        raise InputError(
            url,
            found="a folder that is still written, or whose writing was killed",
            expected="a whole one",
            fix="wait for it, or write it again",
        )
    wanted = {place.joinpath(*name[len(start) + 1 :].split("/")): x for name, x in inside.items()}
    if not wanted and start in found:
        wanted = {place: found[start]}
    with _asking(url):
        _settle(place, {path: _object(scheme, x) for path, x in wanted.items()}, files)
    return place


SCHEMES |= {f"{scheme}://": local for scheme in KINDS}


def _object(scheme: str, entry: dict[str, Any]) -> Object:
    """What a listing says of a file."""
    name, size = entry["name"], int(entry["size"] or 0)
    split(f"{scheme}://{name}")
    stamp = [str(entry.get(key)) for key in ("ETag", "etag", "generation", "LastModified", "mtime")]
    return Object(f"{scheme}://{name}", size, " ".join(stamp))


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
        _OBJECTS[path] = wanted[path]
    copied = [path for path in todo if path.suffix in COPIED]
    with ThreadPoolExecutor(REQUESTS) as pool:
        for _ in pool.map(lambda path: _copy(path, files), copied):
            pass


def _copy(path: Path, files: "fsspec.AbstractFileSystem") -> None:
    scheme, _, name = _OBJECTS[path].url.partition("://")
    part = path.with_name(path.name + ".part")
    files.get_file(name, str(part))
    part.replace(path)


def whole(path: Path) -> Path:
    """A file that is all on the disk: the same, or copied now.

    Raises:
        InputError: as `local`.
    """
    what = _OBJECTS.get(path)
    if what is not None and path.stat().st_size != what.size:
        with _asking(what.url):
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
    with _asking(what.url):
        now = _object(scheme, file_system(scheme, what.url).info(key))
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


@dataclasses.dataclass(frozen=True)
class Range:
    """Bytes on their way."""

    what: Object
    count: int
    future: "tensorstore.Future[tensorstore.KvStore.ReadResult]"

    def result(self) -> bytes:
        """Waits for them.

        Raises:
            InputError: the object has changed since it was opened, or as `local`.
        """
        with _asking(self.what.url):
            found = self.future.result()
        if found.state != "value" or len(found.value) != self.count:
            raise _changed(self.what)
        if _GENERATIONS.setdefault(self.what, found.stamp.generation) != found.stamp.generation:
            raise _changed(self.what)
        return found.value


_GENERATIONS: dict[Object, bytes] = {}


def _changed(what: Object) -> InputError:
    return InputError(
        what.url,
        found="an object that changed while it was read",
        expected="the same until the end",
        fix="wait until it is whole, then run again",
    )


def read_range(what: Object, start: int, stop: int) -> Range:
    """Starts to read the bytes from `start` to `stop` of an object."""
    scheme, bucket, key = split(what.url)
    with _asking(what.url):
        future = store(scheme, bucket).read(key, byte_range=slice(start, stop))
    return Range(what, stop - start, future)


@functools.cache
def store(scheme: str, bucket: str) -> "tensorstore.KvStore":
    """TensorStore's view of a bucket, at the endpoint that fsspec's file system uses."""
    import tensorstore

    spec: dict[str, Any] = {"driver": KINDS[scheme], "bucket": bucket}
    spec["context"] = {f"{KINDS[scheme]}_request_retries": RETRIES}
    if scheme == "s3":
        meta = file_system(scheme, bucket).s3.meta
        if "amazonaws.com" not in meta.endpoint_url:
            spec |= {"endpoint": meta.endpoint_url, "aws_region": meta.region_name or "us-east-1"}
        if "AWS_ACCESS_KEY_ID" in os.environ:  # else it looks for files first, and says so
            spec["aws_credentials"] = {"type": "environment"}
    return tensorstore.KvStore.open(spec).result()


def file_system(scheme: str, url: str) -> "fsspec.AbstractFileSystem":
    """Fsspec's file system of a scheme.

    Raises:
        InputError: its package is not installed.
    """
    if host := os.environ.get("STORAGE_EMULATOR_HOST"):  # gcsfs' variable, and TensorStore's
        os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", host)
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    log = logging.getLogger(PACKAGES[scheme])  # gcsfs shows a stack for what is a line here
    log.setLevel(log.level or logging.CRITICAL)
    try:
        import fsspec

        return fsspec.filesystem(scheme, use_listings_cache=False)
    except ImportError as error:
        raise InputError(
            url,
            found=f"no {PACKAGES[scheme]} to read it with",
            expected=PACKAGES[scheme],
            fix=f"pip install 'vfjax[{KINDS[scheme]}]'",
        ) from error


@contextlib.contextmanager
def _asking(url: str) -> Iterator[None]:
    """Turns what a bucket and its libraries refuse into InputErrors."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # of botocore, aiohttp, google.auth, TensorStore, the system
        raise _refusal(url, error) from error


def _refusal(url: str, error: Exception) -> InputError:
    scheme, bucket, _ = split(url)
    kind, text = type(error).__name__, f"{error} {error.__cause__ or ''}"
    said = cut(text, 150)
    if isinstance(error, FileNotFoundError):
        return InputError(
            url, found=f"no bucket {bucket}", expected="one that exists", fix="check its name"
        )
    if "Credentials" in kind or kind == "RefreshError":
        return InputError(url, found="no credentials", expected="a login", fix=LOGIN[scheme])
    if any(word in text for word in ("SlowDown", "reduce your request rate", "429", "503")):
        return InputError(
            url,
            found=f"a server that is too busy ({said})",
            expected="an answer after several tries",
            fix="run it again later",
        )
    if isinstance(error, PermissionError) or any(x in text for x in ("401", "403", "Forbidden")):
        return InputError(
            url, found=f"no access ({said})", expected="leave to read it", fix=LOGIN[scheme]
        )
    return InputError(
        url, found=f"{kind}: {said}", expected="an answer", fix="check name, network and login"
    )
