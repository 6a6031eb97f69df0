"""Files and folders as they lie on disks: links of the hub's cache."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import converters
from converters.layouts import open_source
from converters.reader import read_weights
from tests import checkpoints
from tests.checkpoints import write_json
from vfjax import InputError


def hub_cache(folder: Path, root: Path) -> Path:
    """A snapshot as `huggingface_hub` lays it out: every file a link to a blob without suffix."""
    home = root / f"models--someone--{folder.name}"
    snapshot = home / "snapshots" / folder.name  # a revision, in earnest
    (home / "blobs").mkdir(parents=True)
    for file in (x for x in folder.rglob("*") if x.is_file()):
        blob = home / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        blob.write_bytes(file.read_bytes())
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def files_of(folder: Path) -> dict[str, bytes]:
    paths = (x for x in folder.rglob("*") if x.is_file())
    return {str(x.relative_to(folder)): x.read_bytes() for x in paths}


def shard(folder: Path, suffix: str) -> None:
    """Cuts a folder's model.safetensors in two, with an index."""
    stem = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    tensors = list(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    places = {}
    for i, part in enumerate((tensors[:3], tensors[3:]), 1):
        name = f"{stem}-{i:05}-of-00002.{suffix}"
        if suffix == "bin":
            torch.save(dict(part), folder / name)
        else:
            checkpoints.save_file(dict(part), folder / name)
        places |= dict.fromkeys(dict(part), name)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    write_json(folder / f"{stem}.{suffix}.index.json", index)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in two shards, a member of two `.bin` files with a tower elsewhere, another."""
    root = tmp_path_factory.mktemp("family")
    llm = checkpoints.make_llama(0)
    checkpoints.llama_folder(root / "base", llm=llm)
    shard(root / "base", "safetensors")
    checkpoints.tower_folder(root / "tower", "clip", 3)
    more = {"llm": checkpoints.tuned(llm, 1), "tower": root / "tower", "weights": "safetensors"}
    checkpoints.upstream_llava_folder(root / "one", 1, **more)
    shard(root / "one", "bin")
    checkpoints.upstream_llava_folder(root / "two", 2, llm=checkpoints.tuned(llm, 2))
    return root


@pytest.fixture(scope="module")
def cached(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in the hub's cache, under links of the same names."""
    root = tmp_path_factory.mktemp("hub")
    for folder in family.iterdir():
        (root / folder.name).symlink_to(hub_cache(folder, root))
    return root


def options(root: Path, tower: Path) -> dict:
    return {"base": root / "base", "towers": {str(tower): root / "tower"}}


def test_a_fuse_in_the_hubs_cache(family: Path, cached: Path, tmp_path: Path):
    """Equal to that of plain folders, byte by byte; so are what is opened and written again."""
    tower = family / "tower"
    for root, out in ((family, "plain"), (cached, "linked")):
        members = {name: root / name for name in ("one", "two")}
        converters.fuse(members, tmp_path / out, **options(root, tower))
        model, _ = converters.load(root / "one", towers={str(tower): root / "tower"})
        converters.export(model, tmp_path / f"{out}-again")
    for out in ("", "-again"):
        plain, linked = (files_of(tmp_path / (name + out)) for name in ("plain", "linked"))
        assert plain == linked and len(plain) > 4
    assert not any(x.is_symlink() for x in (tmp_path / "linked").rglob("*"))


def test_a_message_names_the_link(cached: Path, tmp_path: Path):
    """And not the blob, which nobody knows."""
    folder = tmp_path / "bad"
    checkpoints.llama_folder(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    checkpoints.save_file(tensors, folder / "model.safetensors")
    bad = hub_cache(folder, tmp_path / "hub")
    with pytest.raises(InputError) as error:
        converters.fuse({"a": bad, "b": bad}, tmp_path / "out", base=bad, export="llm")
    assert str(error.value).startswith(f"{bad}/model.safetensors: model.norm.weight: found 1 NaN")


def test_shards_of_the_cache_pass_and_others_elsewhere_do_not(cached: Path, tmp_path: Path):
    assert len(read_weights(cached / "base")) == len(open_source(cached / "base").parts["llm"])
    folder = tmp_path / "index"
    folder.mkdir()
    file = cached / "base" / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    for name in ("../elsewhere.safetensors", "/etc/passwd", "a/../../elsewhere.safetensors"):
        index["weight_map"]["model.norm.weight"] = name
        write_json(folder / "model.safetensors.index.json", index)
        with pytest.raises(InputError, match="outside the folder|no file"):
            read_weights(folder)


class Code:
    def __reduce__(self) -> tuple:
        return (print, ("run",))


@pytest.mark.parametrize("kind", ["code", "TorchScript", "no pickle"])
def test_torchs_advice_to_turn_its_check_off_is_not_handed_on(tmp_path: Path, kind: str):
    file = tmp_path / "pytorch_model.bin"
    if kind == "code":
        torch.save({"a": Code()}, file)
    elif kind == "TorchScript":
        torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).save(file)
    else:
        file.write_bytes((200).to_bytes(8, "little") + b"{}" + b" " * 198)
    with pytest.raises(InputError) as error:
        read_weights(tmp_path)
    said = {"code": "it asks for print", "TorchScript": "a TorchScript archive"}
    assert f"({said.get(kind, 'no pickle of torch.save')})" in str(error.value)
    assert "weights_only" not in str(error.value)
