"""What buckets refuse, said in one line."""

import http.server
import threading

import fsspec
import pytest

import converters
from converters.files import buckets, paths
from tests.buckets import BUCKET, forget
from vfjax import InputError

pytestmark = pytest.mark.usefixtures("servers")


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_no_such_bucket_or_folder(scheme):
    with pytest.raises(InputError, match=f"^{scheme}://no-such-one/x: found no bucket no-such-one"):
        converters.load(f"{scheme}://no-such-one/x")
    with pytest.raises(InputError, match=f"^{scheme}://{BUCKET}/none: found no folder"):
        converters.load(f"{scheme}://{BUCKET}/none")
    for odd in ("", "/", f"/{BUCKET}", f"{BUCKET}/../x", f"{BUCKET}//x"):
        with pytest.raises(InputError, match="found no name in a bucket"):
            paths.local(f"{scheme}://{odd}")


def test_no_credentials(monkeypatch, tmp_path):
    forget()
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(key)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(InputError, match="found no credentials, expected a login; run aws"):
        converters.load(f"s3://{BUCKET}/x")
    forget()


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_missing_extra(monkeypatch, scheme, package):
    def missing(*_, **__):
        raise ImportError(f"Install {package}")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(InputError, match=f"found no {package} .*pip install 'vfjax"):
        converters.load(f"{scheme}://{BUCKET}/x")


def test_no_code_is_added_in_a_bucket():
    from converters.hf import remote

    with pytest.raises(InputError, match="^remote_code: found a folder in a bucket"):
        remote.check_place(f"s3://{BUCKET}/out")


class Busy(http.server.BaseHTTPRequestHandler):
    """Refuses every request as S3 does where there are too many."""

    def do_GET(self):
        self.send_response(503)
        self.end_headers()
        self.wfile.write(b"<Error><Code>SlowDown</Code><Message>Slow down</Message></Error>")

    def log_message(self, *_):
        pass


def test_a_busy_server(monkeypatch):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Busy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        forget()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        monkeypatch.setattr(fsspec.get_filesystem_class("s3"), "retries", 1)
        monkeypatch.setattr(buckets, "RETRIES", {"max_retries": 1, "initial_delay": "1ms"})
        with pytest.raises(InputError, match="found a server that is too busy"):
            converters.load(f"s3://{BUCKET}/x")
        with pytest.raises(InputError, match="found a server that is too busy"):
            buckets.read_range(buckets.Object(f"s3://{BUCKET}/x", 9, ""), 0, 9).result()
        server.shutdown()
    forget()
