"""Folders in buckets, on moto's S3 server and a GCS emulator on this machine."""

import http.server
import threading

import fsspec
import jax
import numpy as np
import pytest
from flax import nnx

import converters
from converters.files import paths
from converters.files.reader import read_weights
from converters.fingerprint import sampled
from converters.inspect import inspect
from tests.buckets import BUCKET, forget, put, serving
from tests.checkpoints import llama_folder
from vfjax import InputError
from vfjax.sharding import make_mesh


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small LLM."""
    place = tmp_path_factory.mktemp("llm") / "llama"
    llama_folder(place, num_hidden_layers=1)
    return place


@pytest.fixture(scope="module", autouse=True)
def servers():
    with serving("s3", "gs"):
        yield


def same(one: nnx.Module, other: nnx.Module) -> bool:
    states = [jax.tree.leaves(nnx.state(model)) for model in (one, other)]
    return all(np.array_equal(a, b) for a, b in zip(*states, strict=True))


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_bucket_loads_as_its_folder_does(folder, scheme):
    url = put(folder, f"{scheme}://{BUCKET}/models/llama")
    mesh = make_mesh(data=2, model=4)
    model, _ = converters.load(url, mesh=mesh)
    assert same(model, converters.load(folder, mesh=mesh)[0])
    assert inspect(url).startswith(f"{url}: layout")


def test_what_changed_in_a_bucket_is_read_anew(folder, tmp_path):
    url = put(folder, f"s3://{BUCKET}/changing/llama")
    before = paths.local(url)
    tensor = read_weights(before)["model.norm.weight"]
    llama_folder(tmp_path / "other", 1, num_hidden_layers=1)
    put(tmp_path / "other", url)
    with pytest.raises(InputError, match=f"{url}/model.safetensors: found an object that changed"):
        tensor[...]
    paths.file_system("s3", url).rm_file(f"{BUCKET}/changing/llama/tokenizer_config.json")
    assert paths.local(url) == before
    assert not (before / "tokenizer_config.json").exists()
    expected = read_weights(tmp_path / "other")["model.norm.weight"][...]
    assert np.array_equal(read_weights(before)["model.norm.weight"][...], expected)


def test_weights_of_a_bucket_are_read_where_they_are_asked_for(folder, monkeypatch):
    url = put(folder, f"s3://{BUCKET}/rows/llama")
    place, asked = paths.local(url), []
    real = paths.read_range
    monkeypatch.setattr(paths, "read_range", lambda what, *at: asked.append(at) or real(what, *at))
    tensor = read_weights(place)["model.embed_tokens.weight"]
    asked.clear()
    rows = tensor[5:9]
    assert [stop - start for start, stop in asked] == [rows.nbytes]
    monkeypatch.setattr(paths, "PIECE", 100)
    assert np.array_equal(tensor[5:9], rows)
    monkeypatch.setattr(paths, "PIECE", 1 << 16)
    assert len(asked) > 2 and (place / "model.safetensors").stat().st_size == 0
    assert paths.sha256(place / "model.safetensors") == paths.sha256(folder / "model.safetensors")
    assert sampled(place / "model.safetensors") == sampled(folder / "model.safetensors")


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_no_such_bucket_or_folder(scheme):
    with pytest.raises(InputError, match=f"^{scheme}://no-such-one/x: found no bucket no-such-one"):
        converters.load(f"{scheme}://no-such-one/x")
    with pytest.raises(InputError, match=f"^{scheme}://{BUCKET}/none: found no folder"):
        converters.load(f"{scheme}://{BUCKET}/none")
    for odd in ("", "/", f"/{BUCKET}", f"{BUCKET}/../x", f"{BUCKET}//x"):
        with pytest.raises(InputError, match="found no name in a bucket"):
            paths.local(f"{scheme}://{odd}")


def test_a_cut_file_in_a_bucket(folder):
    url = f"s3://{BUCKET}/cut/llama"
    put(folder, url)
    files = paths.file_system("s3", url)
    for data in ((folder / "model.safetensors").read_bytes()[:-5], b"abc", b"\xff" * 64):
        files.pipe_file(f"{BUCKET}/cut/llama/model.safetensors", data)
        with pytest.raises(InputError, match=f"{url}/model.safetensors: found {len(data)} bytes"):
            converters.load(url)


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
        monkeypatch.setattr(paths, "RETRIES", {"max_retries": 1, "initial_delay": "1ms"})
        with pytest.raises(InputError, match="found a server that is too busy"):
            converters.load(f"s3://{BUCKET}/x")
        with pytest.raises(InputError, match="found a server that is too busy"):
            paths.read_range(paths.Object(f"s3://{BUCKET}/x", 9, ""), 0, 9).result()
        server.shutdown()
    forget()
