"""A model loaded from a bucket, sharded over eight devices, beside one plain read of its bytes.

    python experiments/bench/buckets.py [--quick] [--layers=N] [--work=DIR] --out=FILE.json

The bucket is a server of this file on loopback, which speaks as much of S3 as reading takes: there
is no network to wait for, so what is measured is the work of the reader. The plain read is one
request a file, for the range of all its bytes, by Python's own client into memory that is kept.
Beside it stands a process's second load, whose programs are compiled, and its first.
"""

import argparse
import contextlib
import http.client
import http.server
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit
from xml.sax.saxutils import escape

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from experiments.bench.common import Row, report, row
from experiments.bench.llamas import write_model
from experiments.bench.load import arguments, asked, child, room

PACKAGES = ("jax", "jaxlib", "numpy", "s3fs", "tensorstore", "vfjax")
MIB = 1 << 20
BUCKET = "bucket"
DEVICES = 8

MEMORY = 64
"""MiB beyond the arrays that a load may take."""


def main(args: argparse.Namespace) -> None:
    """Measures, prints the table, writes the file."""
    shape, notes = asked(args)
    args.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="buckets-", dir=args.work) as name:
        folder = Path(name)
        room(folder, 2 * shape.size)
        write_model(folder / "model", shape, 0)
        with serving(folder) as address:
            rows = bench(folder / "model", address, args.repeats, notes)
    report(rows, notes, PACKAGES, args.out)


def bench(folder: Path, address: str, repeats: int, notes: dict[str, object]) -> list[Row]:
    """Bucket to arrays, and the memory that it takes."""
    environment = {
        "AWS_ENDPOINT_URL": f"http://{address}",
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
    }
    loads: list[dict[str, float]] = []
    plain: list[float] = []
    for _ in range(repeats):
        plain.append(plain_read(folder, address))
        loads.append(json.loads(child("again", f"s3://{BUCKET}/{folder.name}", **environment)))
    notes |= {"loads": loads, "seconds of a plain read": plain}
    name = f"load from a bucket, {DEVICES} devices"
    beyond = [max(x["beyond"] / MIB, 1) for x in loads]
    return [
        row(f"{name}: wall", [x["again"] for x in loads], plain, "plain read"),
        row(
            f"{name}, the first of a process: wall",
            [x["seconds"] for x in loads],
            plain,
            "plain read",
        ),
        row(f"{name}: memory beyond the arrays", beyond, [MEMORY], "limit", "MiB"),
    ]


def plain_read(folder: Path, address: str) -> float:
    """Seconds of a read of all bytes, file by file, each by one request."""
    kept, begin = [], time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        into = np.empty(size, np.uint8)
        view, done = into.data, 0
        connection = http.client.HTTPConnection(address)
        target = f"/{BUCKET}/{folder.name}/{path.name}"
        connection.request("GET", target, headers={"Range": f"bytes=0-{size - 1}"})
        with connection.getresponse() as response:
            while done < size and (count := response.readinto(view[done:])):
                done += count
        connection.close()
        assert done == size
        kept.append(into)
    return time.perf_counter() - begin


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The address of a process that serves a folder as a bucket."""
    command = [sys.executable, __file__, "--serve", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.kill()


class Bucket(http.server.BaseHTTPRequestHandler):
    """Lists and sends the files of a folder, as S3 does."""

    protocol_version = "HTTP/1.1"
    root = Path()

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        """A listing, or a file or a range of it."""
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        if "list-type" in query:
            self._list(query.get("prefix", [""])[0])
            return
        path = self.root / url.path.removeprefix(f"/{BUCKET}/")
        size, low, high = path.stat().st_size, 0, path.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked:
            low, high = int(asked[1]), min(int(asked[2]) + 1, size)
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(high - low))
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        self.send_header("Last-Modified", "Mon, 30 Nov 2026 00:00:00 GMT")
        if asked:
            self.send_header("Content-Range", f"bytes {low}-{high - 1}/{size}")
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.flush()
        with path.open("rb") as file:
            while low < high:
                low += os.sendfile(self.connection.fileno(), file.fileno(), low, high - low)

    do_HEAD = do_GET

    def _list(self, prefix: str) -> None:
        paths = [path for path in sorted(self.root.rglob("*")) if path.is_file()]
        names = {str(path.relative_to(self.root)): path for path in paths}
        entries = "".join(
            f"<Contents><Key>{escape(name)}</Key><Size>{path.stat().st_size}</Size>"
            f'<ETag>"{path.stat().st_mtime_ns}"</ETag>'
            "<LastModified>2026-11-30T00:00:00.000Z</LastModified></Contents>"
            for name, path in names.items()
            if name.startswith(prefix)
        )
        start = '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        text = f"{start}<IsTruncated>false</IsTruncated>{entries}</ListBucketResult>".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


def serve(folder: str) -> None:
    """Says the address, then serves until it is killed."""
    Bucket.root = Path(folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    print(f"127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2])
    else:
        main(arguments())
