"""Buckets on this machine: moto's S3 server and a GCS emulator, in threads of the process."""

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from gcp_storage_emulator.server import create_server
from moto.s3.models import s3_backends
from moto.server import ThreadedMotoServer

from converters.files import buckets

BUCKET = "weights"


@contextlib.contextmanager
def serving(*schemes: str) -> Iterator[None]:
    """Two servers with one empty bucket each, which is where URLs lead to in the block."""
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        stack.callback(forget)
        for key in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
            patch.setenv(f"AWS_{key}", "x")
        patch.setenv("NO_GCE_CHECK", "true")
        if "s3" in schemes:
            server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
            server.start()
            stack.callback(server.stop)
            stack.callback(s3_backends.reset)
            patch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
            fsspec.filesystem("s3").mkdir(BUCKET)
        if "gs" in schemes:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            emulator = create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET)
            emulator.start()
            stack.callback(emulator.stop)
            patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        yield


def forget() -> None:
    """The next one asks the environment where buckets are."""
    buckets.store.cache_clear()
    for scheme in buckets.KINDS:
        fsspec.get_filesystem_class(scheme).clear_instance_cache()


def put(folder: Path, url: str) -> str:
    """Copies a folder into a bucket."""
    scheme, _, name = url.partition("://")
    files = buckets.file_system(scheme, url)
    for path in folder.rglob("*"):
        if path.is_file():
            files.put_file(str(path), f"{name}/{path.relative_to(folder)}")
    return url


def read(url: str) -> dict[str, bytes]:
    """Path below a URL -> bytes, of all objects there."""
    scheme, _, name = url.partition("://")
    files = buckets.file_system(scheme, url)
    return {path.removeprefix(f"{name}/"): files.cat_file(path) for path in files.find(name)}
