"""Models by their names on the hub, from a server on loopback and from its cache."""

import ast
import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants, file_download

import converters
from converters import open_source
from converters.files import hub
from converters.folder import open_members
from converters.inspect import inspect
from converters.mergekit import read_yaml
from experiments.tasks.common import named
from tests import checkpoints
from tests.adapters import peft_folder
from tests.checkpoints import write_json
from tests.hub import Account, Hub, serving
from vfjax import InputError

QUICK = {"account": False}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base; a member in two shards of `.bin`, whose tower is on the hub; another; an adapter."""
    root = tmp_path_factory.mktemp("models")
    llm = checkpoints.make_llama(0)
    checkpoints.llama_folder(root / "base", llm=llm)
    checkpoints.tower_folder(root / "clip", "clip", 3)
    checkpoints.upstream_llava_folder(
        root / "one", 1, llm=checkpoints.tuned(llm, 1), tower=root / "clip"
    )
    split(root / "one")
    config = json.loads((root / "one" / "config.json").read_text())
    write_json(root / "one" / "config.json", {**config, "mm_vision_tower": "org/clip"})
    checkpoints.upstream_llava_folder(root / "two", 2, llm=checkpoints.tuned(llm, 2))
    peft_folder(root / "lora", llm, 3, base="org/base", revision="v1")
    return root


def split(folder: Path) -> None:
    """Makes two shards of a folder's pytorch_model.bin."""
    tensors = list(torch.load(folder / "pytorch_model.bin").items())
    (folder / "pytorch_model.bin").unlink()
    places = {}
    for i, part in enumerate((tensors[:5], tensors[5:]), 1):
        file = f"pytorch_model-{i:05}-of-00002.bin"
        torch.save(dict(part), folder / file)
        places |= {name: file for name, _ in part}
    write_json(folder / "pytorch_model.bin.index.json", {"weight_map": places})


@pytest.fixture
def server(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """All of them at org/NAME, and nobody waits for a busy hub."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with serving(tmp_path / "cache", monkeypatch) as found:
        for folder in models.iterdir():
            found.add(f"org/{folder.name}", folder)
        yield found


def members(start: str | Path) -> dict[str, str]:
    return {name: f"{start}/{name}" for name in ("one", "two")}


def files_of(folder: Path) -> dict[str, bytes]:
    return {x.name: x.read_bytes() for x in folder.iterdir()}


def test_a_fusion_by_names(
    server: Hub, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As of folders, byte by byte, but for what says where the sources are from.

    Then the same from the cache alone.
    """
    towers = {"org/clip": models / "clip"}
    converters.fuse(
        members(models), tmp_path / "local", base=models / "base", towers=towers, **QUICK
    )
    plan = converters.dry_run(members("org"), tmp_path / "out", base="org/base")
    converters.fuse(members("org"), tmp_path / "out", base="org/base", **QUICK)
    asked = len(server.asked)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    converters.fuse(members("org"), tmp_path / "again", base="org/base", **QUICK)
    assert len(server.asked) == asked
    local, out, again = (files_of(tmp_path / name) for name in ("local", "out", "again"))
    assert out == again
    for name in ("model.safetensors", "tokenizer.json"):
        assert out[name] == local[name]
    assert len(out["model.safetensors"]) == plan["files"]["model.safetensors"]
    configs = [json.loads(files["config.json"]) for files in (local, out)]
    shas = {name: repository.refs["main"] for name, repository in server.repositories.items()}
    assert configs[1]["recipe"].pop("repositories") == {
        "base": f"org/base@{shas['org/base']}",
        "one": f"org/one@{shas['org/one']}",
        "one/branches.clip.encoder": f"org/clip@{shas['org/clip']}",
        "two": f"org/two@{shas['org/two']}",
    }
    assert configs[0] == configs[1]
    assert f"`org/one@{shas['org/one']}`".encode() in out["MERGE.md"]
    assert not [name for name, data in out.items() if str(tmp_path).encode() in data]


def test_a_model_by_its_name(server: Hub, models: Path):
    """Its parameters, what it was read from, and a tokenizer."""
    model, processor = converters.load("org/base")
    like, _ = converters.load(models / "base")
    np.testing.assert_array_equal(model.llm.embedding[...], like.llm.embedding[...])
    assert processor.tokenizer is not None
    lines = inspect("org/one").splitlines()
    assert lines[0].startswith(f"org/one@{server.repositories['org/one'].refs['main']}: layout")
    assert "tower from org/clip@" in lines[3]
    assert converters.load_encoder("org/clip") is not None
    made, _ = converters.create("org/base", "org/clip", {"kind": "mlp"})
    assert made.config.branches


def test_only_what_is_read_is_downloaded(server: Hub, models: Path, tmp_path: Path):
    """Beside safetensors no `.bin`, no other library's weights, no sub-folders."""
    folder = shutil.copytree(models / "two", tmp_path / "two")
    needed = {*(x.name for x in folder.iterdir() if x.is_file())}
    needed |= {f"vision_tower/{x.name}" for x in (folder / "vision_tower").iterdir()}
    model = next(name for name in needed if name.startswith("pytorch_model"))
    source = torch.load(folder / model)
    checkpoints.save_file({k: x.clone() for k, x in source.items()}, folder / "model.safetensors")
    for name in ("consolidated.safetensors", "model.gguf", "onnx/model.onnx", "tf_model.h5"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    for name in ("trainer_state.json", "vision_tower/pytorch_model.bin", "runs/config.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"{}")
    server.add("org/many", folder)
    open_source("org/many")
    assert server.fetched("org/many") == sorted({*needed, "model.safetensors"} - {model})
    open_source("org/one")
    found = [name for name in server.fetched("org/one") if name.startswith("pytorch_model")]
    assert len(found) == 3  # two shards and their index


def test_a_towers_weights_that_the_checkpoint_has(
    server: Hub, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Are not downloaded where its own are read, as they are without a network."""
    folder = shutil.copytree(models / "two", tmp_path / "two")
    tower = checkpoints.load_file(folder / "vision_tower" / "model.safetensors")
    tensors = torch.load(folder / "pytorch_model.bin")
    tensors |= {f"model.vision_tower.vision_tower.{name}": x for name, x in tower.items()}
    torch.save(tensors, folder / "pytorch_model.bin")
    shutil.rmtree(folder / "vision_tower")
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, "mm_vision_tower": "org/clip"})
    open_source(folder, tower_source="checkpoint")
    assert "model.safetensors" not in server.fetched("org/clip")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert open_source(folder).towers == {}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert hub.named(open_source(folder).towers["branches.clip.encoder"].path)
    assert "model.safetensors" in server.fetched("org/clip")


def test_revisions(server: Hub, models: Path, monkeypatch: pytest.MonkeyPatch):
    """A branch, a tag, a commit, a pull request; without one the main branch, as it is now."""
    first = server.repositories["org/base"].refs["main"]
    for ref in ("v1", "refs/pr/1"):
        server.repositories["org/base"].refs[ref] = first
    second = server.add("org/base", models / "two")
    for revision in ("v1", "refs/pr/1", first):
        assert hub.named(hub.folder(f"org/base@{revision}")) == f"org/base@{first}"
    assert hub.named(hub.folder("org/base")) == f"org/base@{second}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.named(hub.folder("org/base@v1")) == f"org/base@{first}"


def test_adapters_name_a_base(server: Hub, models: Path):
    """With its revision; where a base is given, theirs is not worth a download."""
    server.repositories["org/base"].refs["v1"] = server.repositories["org/base"].refs["main"]
    base = open_source("org/lora").base
    assert base is not None and hub.named(base) == f"org/base@{sha(server, 'base')}"


def test_a_base_that_is_given_is_taken(server: Hub, models: Path):
    own = open_members({"lora": "org/lora"}, base=models / "base")["lora"]
    assert own.base == models / "base"
    assert server.fetched("org/base") == []


def test_models_of_a_mergekit_yaml(server: Hub, models: Path, tmp_path: Path):
    """With revisions, adapters and mappings, as mergekit has them."""
    first = server.repositories["org/base"].refs["main"]
    server.repositories["org/base"].refs["v1"] = first
    file = tmp_path / "recipe.yml"
    file.write_text(
        "merge_method: linear\n"
        "models:\n"
        "- {model: org/base@v1, parameters: {weight: 0.5}}\n"
        "- {model: org/base+org/lora, parameters: {weight: 0.25}}\n"
        "- model: {model: {path: org/base, revision: refs/pr/1}}\n"
        "  parameters: {weight: 0.25}\n"
    )
    recipe = read_yaml(file)
    assert list(recipe.folders.values()) == ["org/base@v1", "org/lora", "org/base@refs/pr/1"]
    assert recipe.below == {"lora": "org/base"} and list(recipe.folders)[0] == "base-2"
    server.repositories["org/base"].refs["refs/pr/1"] = first
    converters.fuse({}, tmp_path / "out", recipe=file, export="llm")
    card = (tmp_path / "out" / "MERGE.md").read_text()
    assert card.count(f"org/base@{first}") >= 3
    assert not (tmp_path / "out" / "org").exists()


def test_the_library_is_imported_late():
    """Which takes half a second: by functions, and for types."""
    files = [x for x in Path(converters.__file__).parent.rglob("*.py") if x.parent.name != "hf"]
    for file in files:
        tree = ast.parse(file.read_text())
        names = [
            alias.name if isinstance(node, ast.Import) else node.module
            for node in tree.body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        ]
        assert not [name for name in names if str(name).startswith("huggingface_hub")], file
    assert len(files) > 60


def test_a_folder_of_the_name_comes_first(
    server: Hub, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models / "base", tmp_path / "org" / "base")
    assert open_source("org/base").path == Path("org/base")
    assert server.asked == []


@pytest.mark.parametrize(
    "text", ["name", "./org/name", "a/b/c", "/a/b", "a--b/c", "../b", "a/b@", "a/b.git"]
)
def test_what_is_no_name(text: str):
    assert hub.parse(text) is None


def test_names_of_members():
    found = named("members", ("org/a.b@v2", "x=org/y@main", "folder/z/"))
    assert found == {"a-b": "org/a.b@v2", "x": "org/y@main", "z": "folder/z/"}


def test_a_broken_connection_goes_on(server: Hub):
    """Behind the last piece that came whole."""
    server.faults.append((f"GET /org/base/resolve/{sha(server, 'base')}/model.safe", 5500))
    open_source("org/base")
    ranges = [ranged for request, ranged in server.asked if ranged]
    assert ranges == ["bytes=5000-"]


def test_a_download_that_was_broken_off(server: Hub, monkeypatch: pytest.MonkeyPatch):
    """It says so without a network; with one the next call asks for what it lacks alone."""
    second = f"GET /org/one/resolve/{sha(server, 'one')}/pytorch_model-00002"
    server.faults += [(second, 0)] * 9
    line = refused("org/one")
    assert "a transfer that broke off" in line and line.endswith("files that are whole are kept")
    server.faults.clear()
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "a part of it in the cache" in refused("org/one")
    server.asked.clear()
    open_source("org/one")
    assert server.fetched("org/one") == ["pytorch_model-00002-of-00002.bin"]


def test_processes_download_a_file_once(server: Hub):
    """By huggingface_hub's lock of the file; as users start them."""
    code = "from converters.files import hub; print(hub.named(hub.folder('org/base')))"
    own = {"HF_ENDPOINT": server.url, "HF_HUB_CACHE": constants.HF_HUB_CACHE, "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", code]
    both = [
        subprocess.Popen(command, env={**os.environ, **own}, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [each.communicate()[0] for each in both] == [f"org/base@{sha(server, 'base')}\n"] * 2
    files = server.fetched("org/base")
    assert "model.safetensors" in files and len(files) == len({*files})


def sha(server: Hub, name: str) -> str:
    return server.repositories[f"org/{name}"].refs["main"]


def refused(name: str) -> str:
    with pytest.raises(InputError) as error:
        open_source(name)
    line = str(error.value)
    assert "\n" not in line and line.startswith(name)
    return line


def test_gated(server: Hub, monkeypatch: pytest.MonkeyPatch):
    server.repositories["org/base"].gated = True
    page = f"accept its conditions at {server.url}/org/base"
    assert refused("org/base") == (
        "org/base: found a gated repository, and no login, expected access to it; "
        f"{page}, then run hf auth login"
    )
    server.accounts["t"] = Account(reads=False)
    monkeypatch.setenv("HF_TOKEN", "t")
    assert refused("org/base").endswith(f"{page} with the account of hf auth login")
    server.accounts["t"] = Account()
    open_source("org/base")


def test_a_gated_base(server: Hub):
    """Of an adapter: the line says whose."""
    server.repositories["org/base"].refs["v1"] = sha(server, "base")
    server.repositories["org/base"].gated = True
    with pytest.raises(InputError, match=r"base model 'org/base': found a gated repository"):
        open_source("org/lora")


def test_refusals(server: Hub, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert "no such repository at http://127.0.0.1" in refused("org/none")
    assert "found no revision 'v9', expected one of org/base" in refused("org/base@v9")
    folder = shutil.copytree(models / "one", tmp_path / "one")
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    server.add("org/short", folder)
    assert "found no file pytorch_model-00002-of-00002.bin" in refused("org/short")
    for path in folder.glob("pytorch_model*"):
        path.unlink()
    server.add("org/short", folder)
    assert "found no weights, expected safetensors" in refused("org/short")
    (folder / "q4.gguf").write_bytes(b"GGUF")
    server.add("org/short", folder)
    assert "found weights in q4.gguf alone" in refused("org/short")
    monkeypatch.setenv("HF_TOKEN", "old")
    assert "found a token that the hub does not know" in refused("org/base")


def test_a_busy_hub_is_asked_again(server: Hub):
    for part in ("/api/models/org/base", "/tree/", "/model.safetensors"):
        server.faults.append((part, 503))
    open_source("org/base")
    assert server.faults == []
    server.faults += [("GET /api/models/org/two", 503)] * 99
    assert "without a network (HfHubHTTPError" not in refused("org/two")
    assert f"found status 503 after {len(hub.PAUSES) + 1} tries" in refused("org/two")


def test_no_network(server: Hub, monkeypatch: pytest.MonkeyPatch):
    """What is in the cache is read; else one line."""
    open_source("org/base")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    open_source("org/base")
    assert "nothing of it in the hub's cache, without a network (ConnectError" in refused("org/two")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    line = refused("org/two")
    assert "with HF_HUB_OFFLINE set" in line and line.endswith("hf download org/two")


def test_a_full_disk(server: Hub, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(file_download, "http_get", full)
    assert "found No space left on device in " in refused("org/base")
