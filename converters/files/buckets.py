"""Buckets (`gs://`, `s3://`): what lists, reads and writes objects, and what they refuse.

fsspec's file systems (s3fs, gcsfs: extras, and what Orbax has of buckets) list, copy and write;
TensorStore reads byte ranges, as fast as one connection that reads them all.
"""

import contextlib
import dataclasses
import functools
import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vfjax import InputError
from vfjax.errors import cut

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


def described(scheme: str, entry: dict[str, Any]) -> Object:
    """What a listing says of a file."""
    name, size = entry["name"], int(entry["size"] or 0)
    split(f"{scheme}://{name}")
    stamp = [str(entry.get(key)) for key in ("ETag", "etag", "generation", "LastModified", "mtime")]
    return Object(f"{scheme}://{name}", size, " ".join(stamp))


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
        with asking(self.what.url):
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
    with asking(what.url):
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
def asking(url: str) -> Iterator[None]:
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
            url, found=f"no access ({said})", expected="access to it", fix=LOGIN[scheme]
        )
    return InputError(
        url, found=f"{kind}: {said}", expected="an answer", fix="check name, network and login"
    )
