"""Folders in buckets, on moto's S3 server and a GCS emulator on this machine."""

import jax
import numpy as np
import pytest
from flax import nnx

import converters
from converters.files import buckets, paths
from converters.files.reader import read_weights
from converters.fingerprint import sampled
from converters.inspect import inspect
from tests.buckets import BUCKET, put
from tests.checkpoints import llama_folder
from vfjax import InputError
from vfjax.sharding import make_mesh

pytestmark = pytest.mark.usefixtures("servers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small LLM."""
    place = tmp_path_factory.mktemp("llm") / "llama"
    llama_folder(place, num_hidden_layers=1)
    return place


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
    buckets.file_system("s3", url).rm_file(f"{BUCKET}/changing/llama/tokenizer_config.json")
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


def test_a_cut_file_in_a_bucket(folder):
    url = f"s3://{BUCKET}/cut/llama"
    put(folder, url)
    files = buckets.file_system("s3", url)
    for data in ((folder / "model.safetensors").read_bytes()[:-5], b"abc", b"\xff" * 64):
        files.pipe_file(f"{BUCKET}/cut/llama/model.safetensors", data)
        with pytest.raises(InputError, match=f"{url}/model.safetensors: found {len(data)} bytes"):
            converters.load(url)
