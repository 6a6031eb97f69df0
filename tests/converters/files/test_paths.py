"""Folders in buckets, on moto's S3 server and a GCS emulator on this machine."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import converters
from converters.files import buckets, paths
from converters.files.paths import working
from converters.files.reader import read_weights
from converters.fingerprint import sampled
from converters.inspect import inspect
from tests.buckets import BUCKET, put, read
from tests.checkpoints import llama_folder
from vfjax import InputError
from vfjax.atomic import contents, replacing
from vfjax.data import Conversations
from vfjax.errors import shown
from vfjax.sharding import make_mesh
from vfjax.train.checkpoint import Checkpoints

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
    assert np.array_equal(tensor.peek(slice(5, 9)), rows) and len(asked) == 2
    monkeypatch.setattr(paths, "PIECE", 100)
    assert np.array_equal(tensor[5:9], rows) and np.array_equal(tensor.peek(slice(5, 9)), rows)
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


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_what_a_run_leaves_in_its_folder_is_in_the_bucket(scheme):
    url = f"{scheme}://{BUCKET}/work"
    with working(url) as place:
        with replacing(place / "stage" / "settings.json") as part:
            part.parent.mkdir()
            part.write_text("[1]")
        assert read(url) == {"stage/settings.json": b"[1]"}
        (place / "log.txt").write_text("a line\n")
    with working(url, write=False) as place:
        assert contents(place / "log.txt") == b"a line\n"
        (place / "other.txt").write_text("of a process that copies nothing")
    with pytest.raises(RuntimeError), working(url) as place:
        assert not (place / "other.txt").exists()
        with (place / "log.txt").open("a") as file:
            file.write("more\n")
        raise RuntimeError
    assert read(url) == {"stage/settings.json": b"[1]", "log.txt": b"a line\nmore\n"}
    assert shown(place / "log.txt") == f"{url}/log.txt"


def test_training_data_in_a_bucket(tmp_path):
    turns = [{"from": "human", "value": "<image>\n?"}, {"from": "gpt", "value": "!"}]
    rows = [{"id": i, "image": f"{i}.png", "conversations": turns} for i in range(2)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    for i in range(2):
        Image.new("RGB", (4, 3), (i, 2, 3)).save(tmp_path / f"{i}.png")
    url = put(tmp_path, f"s3://{BUCKET}/data")
    data = Conversations(f"{url}/rows.json", url)
    files = [sample.pictures[0] for sample in data]
    assert [contents(file) for file in files] == [(tmp_path / f.name).read_bytes() for f in files]
    assert [file.stat().st_size for file in files] == [0, 0]
    rows[0]["image"] = "none.png"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    put(tmp_path, url)
    with pytest.raises(InputError, match=f"^{url}/rows.json row 0 "):
        Conversations(f"{url}/rows.json", url)


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_states_in_a_bucket(scheme):
    """A state is read back by another process, which has another local folder."""
    url, state = f"{scheme}://{BUCKET}/states", {"x": jnp.arange(4.0), "n": jnp.int32(7)}
    with working(url) as place, Checkpoints(place / "a", {"x": 1}, keep=1) as states:
        states.save(3, jax.tree.map(jnp.zeros_like, state))
        states.save(5, state)
        states.wait()
    shutil.rmtree(place)
    with working(url) as place:
        with pytest.raises(InputError, match=f"^{url}/a/config.json: x: found 1"):
            Checkpoints(place / "a", {"x": 2})
        with Checkpoints(place / "a", {"x": 1}) as states:
            assert states.step == 5
            found = states.restore(jax.tree.map(jnp.zeros_like, state))
            assert (found["x"].tolist(), found["n"].tolist()) == ([0, 1, 2, 3], 7)
        with (
            pytest.raises(InputError, match=f"^{url}/a/5: found a state that does not fit"),
            Checkpoints(place / "a", {"x": 1}) as states,
        ):
            states.restore({"x": jnp.zeros(5), "n": jnp.int32(0)})
    assert {name.split("/")[1] for name in read(url)} == {"config.json", "5"}
