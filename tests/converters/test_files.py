"""Files and folders as they lie on disks: links of the hub's cache, names that are taken."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from ml_collections import ConfigDict
from safetensors.torch import load_file

import converters
from converters import open_source
from converters.files.checksums import audit
from converters.files.reader import read_weights
from converters.files.writer import write_folder
from experiments.tasks import demo
from tests import checkpoints
from tests.checkpoints import write_json
from vfjax import InputError
from vfjax.atomic import claim, empty, replacing
from vfjax.eval import log
from vfjax.sharding import make_mesh
from vfjax.train.checkpoint import Checkpoints


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


def state_of(folder: Path) -> dict[str, str]:
    """All that lies below a folder: what links lead to, what files hold."""
    paths = sorted(folder.rglob("*"))
    return {
        str(x.relative_to(folder)): os.readlink(x)
        if x.is_symlink()
        else hashlib.sha256(x.read_bytes()).hexdigest()
        if x.is_file()
        else "folder"
        for x in paths
    }


def taken(root: Path, family: Path, how: str) -> Path:
    """Where fuse is to write; what lies at that name, or at that of the folder beside it."""
    out, stage, mine = root / "out", root / ".out.part", root / "mine"
    shutil.copytree(family / "base", mine)
    if how == "a link at the stage":
        stage.symlink_to(mine)
    elif how == "a link to nowhere at the stage":
        stage.symlink_to(root / "nowhere")
    elif how == "a folder at the stage":
        shutil.copytree(mine, stage)
    elif how == "a file at the stage":
        stage.write_text("mine")
    elif how == "a link in the stage":
        (stage / "out").parent.mkdir()
        (stage / ".vfjax").touch()
        (stage / "out").symlink_to(mine)
    elif how == "a mark that is a link":
        shutil.copytree(mine, stage)
        (stage / ".vfjax").symlink_to(mine / "config.json")
    elif how == "a link to nowhere at the output":
        out.symlink_to(root / "nowhere")
    elif how == "a link at the output":
        out.symlink_to(mine)
    return out


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    "how",
    [
        *("a link at the stage", "a link to nowhere at the stage", "a folder at the stage"),
        *("a file at the stage", "a link in the stage", "a mark that is a link"),
        *("a link to nowhere at the output", "a link at the output"),
    ],
)
def test_what_is_not_its_own_is_left_alone(tmp_path: Path, family: Path, how: str, resume: bool):
    out = taken(tmp_path, family, how)
    before = state_of(tmp_path)
    with pytest.raises(InputError, match=r"out(\.part)?(/\w+)?: found an? (exist|link|fold|file)"):
        write_folder(out, {"": {"w": np.ones(3, np.float32)}}, resume=resume)
    assert state_of(tmp_path) == before


def test_a_killed_runs_folder_is_used_again(tmp_path: Path):
    stage = tmp_path / ".out.part"
    (stage / "out" / "sub").mkdir(parents=True)
    (stage / ".vfjax").touch()
    (stage / "out" / "config.json").write_text("{}")
    write_folder(tmp_path / "out", {"": {"w": np.ones(3, np.float32)}})
    assert set(state_of(tmp_path)) == {"out", "out/model.safetensors"}


def test_output_in_a_source(family: Path, tmp_path: Path):
    """Its files stay as they are; a source that a killed run left is not emptied."""
    shutil.copytree(family, tmp_path / "family")
    members = {name: tmp_path / "family" / name for name in ("one", "two")}
    more = options(tmp_path / "family", family / "tower")
    before = state_of(tmp_path)
    converters.fuse(members, members["one"] / "fused", **more)
    after = state_of(tmp_path)
    assert before.items() <= after.items()
    assert all("one/fused" in name for name in after.keys() - before.keys())
    stage = tmp_path / ".out.part"
    shutil.copytree(members["two"], stage / "out")
    (stage / ".vfjax").touch()
    before = state_of(tmp_path)
    with pytest.raises(InputError, match=r"\.out\.part/out: found a source in the folder that"):
        converters.fuse({**members, "two": stage / "out"}, tmp_path / "out", **more)
    assert state_of(tmp_path) == before


@pytest.mark.parametrize("what", ["link", "folder", "other name"])
def test_a_file_that_is_replaced(tmp_path: Path, what: str):
    part, mine = tmp_path / ".results.json.part", tmp_path / "mine"
    mine.write_text("mine")
    if what == "link":
        part.symlink_to(mine)
    elif what == "folder":
        part.mkdir()
    else:
        part.hardlink_to(mine)
    expected = pytest.raises(InputError, match="part: found a (link|folder)")
    with expected if what != "other name" else contextlib.nullcontext():
        with replacing(tmp_path / "results.json") as file:
            file.write_text("new")
        assert (tmp_path / "results.json").read_text() == "new"
    assert mine.read_text() == "mine"


def test_folders_that_tasks_empty(tmp_path: Path):
    """Only what vfjax made, by its mark: not a folder that happens to have the right names."""
    mine = tmp_path / "mine"
    (mine / "scenes").mkdir(parents=True)
    (mine / "scenes" / "1.png").write_text("mine")
    before = state_of(tmp_path)
    config = ConfigDict({"members": ("clip",)})
    with pytest.raises(InputError, match="mine: found a folder with scenes that vfjax did not"):
        demo.run(config, mine)
    (tmp_path / "link").symlink_to(mine)
    with pytest.raises(InputError, match="link: found a link"):
        demo.run(config, tmp_path / "link")
    (tmp_path / "link").unlink()
    assert state_of(tmp_path) == before
    made = claim(tmp_path / "made")
    (made / "old").mkdir()
    assert list(empty(made).iterdir()) == [made / ".vfjax"]
    (tmp_path / "stage" / "7").mkdir(parents=True)
    with pytest.raises(InputError, match="stage/7: found a folder that no training made"):
        Checkpoints(tmp_path / "stage", {"seed": 1})
    for name in ("predictions.jsonl", "predictions-0-of-2.jsonl", "predictions-old.jsonl"):
        (tmp_path / name).touch()
    assert [x.name for x in log.parts(tmp_path)] == [
        "predictions-0-of-2.jsonl",
        "predictions.jsonl",
    ]


def test_one_file_beside_an_old_index(tmp_path: Path):
    """As transformers' from_pretrained: the file, then the index, safetensors before `.bin`."""
    wanted = checkpoints.make_llama(1)
    wanted.save_pretrained(tmp_path)
    places = {"model.norm.weight": "model-00001-of-00002.safetensors"}
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": places})
    torch.save({"model.norm.weight": torch.ones(32)}, tmp_path / "pytorch_model.bin")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for each in (model.state_dict(), read_weights(tmp_path)):
        for name, tensor in wanted.state_dict().items():
            np.testing.assert_array_equal(np.asarray(each[name][...]), tensor.numpy())


def rewrite(file: Path, at: int = -8) -> None:
    """Changes bytes in place; size and time of the last change stay."""
    before = file.stat()
    with file.open("r+b") as out:
        out.seek(at, os.SEEK_END)
        out.write(b"\x01\x02\x03\x04")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def test_a_file_that_changed_in_place_is_read_again(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "model.safetensors"
    checkpoints.save_file({"a": torch.ones(1000)}, file)
    for _ in range(2):
        assert audit({"x": file})["x"] == hashlib.sha256(file.read_bytes()).hexdigest()
        rewrite(file)
    with file.open("r+b") as out:
        out.seek(-4, os.SEEK_END)
        out.write(np.float32("nan").tobytes())
    with pytest.raises(InputError, match="model.safetensors: a: found 1 NaN or infinite of 1000"):
        audit({"x": file})


def test_a_source_that_changes_in_place_while_it_is_merged(family: Path, tmp_path: Path):
    shutil.copytree(family / "base", tmp_path / "base")
    members = dict.fromkeys("ab", tmp_path / "base")
    (file, *_) = sorted((tmp_path / "base").glob("*.safetensors"))
    more = {"export": "llm", "base": family / "base", "progress": lambda nbytes: rewrite(file)}
    with pytest.raises(InputError, match="found a file that changed while it was read"):
        converters.fuse(members, tmp_path / "out", **more)
    assert not list(tmp_path.glob("*out*"))


@pytest.fixture
def odd(family: Path, tmp_path: Path) -> Path:
    """The member `two` with an infinity where nothing reads it, in one safetensors file."""
    out = tmp_path / "odd"
    model, _ = converters.load(family / "two")
    converters.export(model, out)
    put(out, "model.layers.0.self_attn.rotary_emb.inv_freq", torch.full((4,), torch.inf))
    return out


def put(folder: Path, name: str, tensor: torch.Tensor) -> None:
    (file,) = folder.glob("model.safetensors")
    checkpoints.save_file(load_file(file) | {name: tensor}, file)


UNREAD = "inv_freq: found 4 NaN or infinite of 4 values; nothing reads it"


def test_infinity_in_what_nothing_reads(odd: Path, family: Path, tmp_path: Path):
    """It is said, and does not refuse the merge; a projector's does where that is written."""
    members = {"odd": odd, "two": family / "two"}
    with pytest.warns(UserWarning, match=UNREAD):
        converters.fuse(members, tmp_path / "out", base=family / "base")
    converters.load(odd)
    put(odd, "model.mm_projector.0.bias", torch.full((32,), torch.nan))
    with pytest.warns(UserWarning, match=r"projector.0.bias: found 32 NaN .*; nothing reads it"):
        converters.fuse(members, tmp_path / "llm", base=family / "base", export="llm")
    with pytest.raises(InputError, match="projector.0.bias: found 32 NaN or infinite of 32"):
        converters.fuse(members, tmp_path / "out2", base=family / "base")


@pytest.mark.parametrize("how", ["plain", "int8", "sharded"])
@pytest.mark.parametrize("end", ["layers.1.mlp.fc1.weight", "q_proj.weight", "linear_1.bias"])
def test_nan_is_named_when_a_model_is_loaded(tmp_path: Path, how: str, end: str):
    checkpoints.hf_llava_folder(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    name = max(n for n in tensors if n.endswith(end))
    tensors[name].view(-1)[7] = torch.nan
    checkpoints.save_file(tensors, file)
    more = {"int8": how == "int8", "mesh": make_mesh(4, 2) if how == "sharded" else None}
    with pytest.raises(InputError) as error:
        converters.load(tmp_path / "model", **more)
    count = tensors[name].numel()
    line = f"{file}: {name}: found 1 NaN or infinite of {count} values, expected finite weights;"
    assert str(error.value).startswith(line)


SLOW = """
import signal, sys, time
sys.path.insert(0, {root!r})
from converters.files import writer
import numpy as np
if {ignored}:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
def progress(nbytes):
    print("wrote", flush=True)
    time.sleep(0.5 if {ignored} else 30)
tensors = {{"w": np.zeros(3_000_000, np.float32)}}
try:
    writer.write_folder({out!r}, {{"": tensors}}, progress=progress, resume={resume})
except writer.Ended as error:
    print(error.args[0] + 0, *getattr(error, "__notes__", ()))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("resume", [False, True])
def test_a_signal_leaves_nothing_unnamed(tmp_path: Path, number: int, resume: bool):
    out, said = signalled(tmp_path, number, resume=resume)
    stage = tmp_path / ".out.part"
    note = f" {stage} keeps what is whole; the same command goes on from there" if resume else ""
    assert said == f"{number}{note}\n"
    assert sorted(tmp_path.iterdir()) == ([stage] if resume else [])


def test_nohup_is_obeyed(tmp_path: Path):
    out, said = signalled(tmp_path, signal.SIGHUP, ignored=True)
    assert out.is_dir() and not said.replace("wrote\n", "")


def signalled(root: Path, number: int, **more: bool) -> tuple[Path, str]:
    """A folder that is being written when a signal comes; what is said after it."""
    repo, out = str(Path(__file__).resolve().parents[2]), root / "out"
    code = SLOW.format(root=repo, out=str(out), **{"ignored": False, "resume": False, **more})
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "wrote\n"
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return out, said


def test_inspect_into_a_pipe_that_closes(family: Path):
    shell = ["bash", "-c", f"{sys.executable} -m converters inspect {family / 'base'} | true"]
    repo = Path(__file__).resolve().parents[2]
    done = subprocess.run(shell, cwd=repo, capture_output=True, text=True, check=False)
    assert done.stderr == ""
