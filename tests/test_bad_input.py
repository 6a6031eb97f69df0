"""What users get wrong: one line that names it, a non-zero exit, nothing left that loads."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import converters
from tests import adapters, checkpoints
from vfjax import InputError

ROOT = Path(__file__).resolve().parents[1]


def refused(run: Callable[[], object], *words: object) -> None:
    """`run` ends in one line that holds all words, and the remedy behind a semicolon."""
    with pytest.raises(InputError) as caught:
        run()
    line = str(caught.value)
    assert "\n" not in line
    assert ": found " in line and ", expected " in line and "; " in line, line
    for word in words:
        assert str(word) in line, line


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> dict[str, Path]:
    """A base and two LLaVAs of it, one in each layout."""
    root = tmp_path_factory.mktemp("family")
    paths = {name: root / name for name in ("base", "one", "two")}
    llm = checkpoints.llama_folder(paths["base"], 1)
    for seed, name in enumerate(("one", "two"), 2):
        checkpoints.upstream_llava_folder(
            paths[name], seed, llm=checkpoints.tuned(llm, seed), weights="safetensors"
        )
    return paths


@pytest.fixture
def member(family: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a member, to be broken."""
    shutil.copytree(family["two"], tmp_path / "member")
    return tmp_path / "member"


def edit_config(folder: Path, **keys: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    checkpoints.write_json(folder / "config.json", config | keys)


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


NORM = "model.layers.1.input_layernorm.weight"

BROKEN = {
    "missing tensor": (lambda t: t.pop(NORM), [NORM, "1 tensor missing"]),
    "extra tensor": (lambda t: t.update(surplus=torch.zeros(3)), ["surplus", "1 unknown"]),
    "misshaped tensor": (lambda t: t.update({NORM: torch.ones(5)}), [NORM, "(5,)", "(32,)"]),
    "integer tensor": (
        lambda t: t.update({NORM: torch.ones(32, dtype=torch.int32)}),
        [NORM, "int32"],
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_tensors(member: Path, name: str):
    change, words = BROKEN[name]
    edit_weights(member, change)
    refused(lambda: converters.load(member), member, *words)


class Trap:
    """Leaves a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def other_file(folder: Path) -> None:
    (folder / "model.safetensors").write_text("<html>")


def index(folder: Path, shard: str) -> None:
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "1.safetensors")
    places = dict.fromkeys(names, "1.safetensors") | {NORM: shard}
    checkpoints.write_json(folder / "model.safetensors.index.json", {"weight_map": places})


def pickled(folder: Path, content: object) -> None:
    torch.save(content, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


FILES = {
    "truncated": (truncated, ["model.safetensors", "no safetensors file"]),
    "another file": (other_file, ["model.safetensors", "no safetensors file"]),
    "absent shard": (lambda f: index(f, "2.safetensors"), ["2.safetensors", "no file"]),
    "shard above": (lambda f: index(f, "../x"), ["index.json", "'../x' outside the folder"]),
    "absolute shard": (lambda f: index(f, "/x/y"), ["index.json", "'/x/y' outside the folder"]),
    "code": (lambda f: pickled(f, {"a": Trap(f / "mark")}), ["pytorch_model.bin", "do not use it"]),
    "no tensors": (lambda f: pickled(f, {"a": 1}), ["pytorch_model.bin: a", "int"]),
    "none": (lambda f: (f / "model.safetensors").unlink(), ["no weights"]),
}


@pytest.mark.parametrize("name", FILES)
def test_weights_files(family: dict[str, Path], member: Path, tmp_path: Path, name: str):
    damage, words = FILES[name]
    damage(member)
    refused(lambda: converters.load(member), member, *words)
    refused(lambda: fuse(family, member, tmp_path / "out"), member, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["member"]
    assert not (member / "mark").exists()


def test_pickles_without_torch(member: Path, monkeypatch: pytest.MonkeyPatch):
    pickled(member, {NORM: torch.ones(32)})
    monkeypatch.setitem(sys.modules, "torch", None)  # what makes an import fail
    refused(lambda: converters.load(member), "pytorch_model.bin", "no torch", "vfjax[torch]")


CONFIGS = {
    "model_type": ({"model_type": "what"}, ["model_type 'what'", "llava"]),
    "projector": ({"mm_projector_type": "qformer"}, ["mm_projector_type", "'qformer'"]),
    "aspect": ({"image_aspect_ratio": "round"}, ["image_aspect_ratio", "'round'"]),
    "rope": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope_scaling", "'linear'"]),
    "activation": ({"hidden_act": "relu7"}, ["relu7"]),
    "tower": ({"mm_vision_tower": "nobody/nothing"}, ["nobody/nothing", "towers="]),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config(member: Path, name: str):
    keys, words = CONFIGS[name]
    if name == "tower":
        shutil.rmtree(member / "vision_tower")
    edit_config(member, **keys)
    refused(lambda: converters.load(member), *words)


def adapter(folder: Path, **config: int) -> None:
    adapters.llava_lora_folder(folder, checkpoints.make_llama(1, **config))


def adapter_with(folder: Path, **settings: object) -> None:
    adapter(folder)
    file = folder / "adapter_config.json"
    checkpoints.write_json(file, json.loads(file.read_text()) | settings)


def untold(folder: Path) -> None:
    """An adapter whose config.json says nothing of its LLM's sizes."""
    adapter(folder, intermediate_size=64)
    config = json.loads((folder / "config.json").read_text())
    checkpoints.write_json(folder / "config.json", config | {"intermediate_size": 48})


def projector(folder: Path, **config: object) -> None:
    adapters.projector_folder(folder, checkpoints.make_llama(1), **config)


PARTS = {
    "adapter without base": (adapter, False, ["base model 'someone/base'", "pass base="]),
    "projector without base": (projector, False, ["base model ''", "pass base="]),
    "vocabulary": (lambda f: adapter(f, vocab_size=330), True, ["config.json", "330", "320"]),
    "shape": (untold, True, ["adapter_model.safetensors", "lora_A.weight", "(32, 48)"]),
    "dora": (lambda f: adapter_with(f, use_dora=True), True, ["adapter_config.json: use_dora"]),
    "bias": (lambda f: adapter_with(f, bias="some"), True, ["adapter_config.json: bias", "'all'"]),
    "connector": (lambda f: projector(f, mm_projector_type="qformer"), True, ["'qformer'"]),
    "tower": (lambda f: shutil.rmtree(f / "vision_tower"), True, ["vision_tower", "towers="]),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_of_a_model(family: dict[str, Path], tmp_path: Path, name: str):
    """Adapters and projectors: alone, and as members of a fusion."""
    make, known, words = PARTS[name]
    part = tmp_path / "part"
    if name == "tower":
        projector(part)
    make(part)
    base = family["base"] if known else None
    refused(lambda: converters.load(part, base=base), *words)
    refused(lambda: fuse(family, part, tmp_path / "out", base=base), *words)
    assert [path.name for path in tmp_path.iterdir()] == ["part"]


def test_missing_files(member: Path, tmp_path: Path):
    refused(lambda: converters.load(tmp_path / "nowhere"), tmp_path / "nowhere", "no folder")
    (member / "vision_tower" / "preprocessor_config.json").unlink()
    refused(lambda: converters.load(member), member, "no preprocessor_config.json")
    (member / "config.json").write_text("{")
    refused(lambda: converters.load(member), member / "config.json", "JSON")


def test_a_broken_tokenizer(member: Path):
    (member / "tokenizer.json").write_text("{}")
    refused(lambda: converters.load(member), member, "tokenizer")


def picture(kind: str, folder: Path) -> Path:
    path = folder / f"{kind}.png"
    if kind == "unreadable":
        path.write_bytes(b"no picture")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "20,000 pixels":
        Image.new("1", (20_000, 20)).save(path)
    return path


@pytest.mark.parametrize("kind", ["absent", "unreadable", "empty", "20,000 pixels"])
def test_pictures(family: dict[str, Path], tmp_path: Path, kind: str):
    _, processor = converters.load(family["one"])
    path = picture(kind, tmp_path)
    refused(lambda: processor([path], input_ids=[[1, -200]]), path)


def test_prompts(family: dict[str, Path]):
    _, processor = converters.load(family["one"])
    image = np.zeros((8, 8, 3), np.uint8)
    refused(lambda: processor([image], ["no place"]), "1 picture for 0 <image>")
    refused(lambda: processor([image], ["<image> <image>"]), "1 picture for 2 <image>")
    refused(lambda: processor(None, ["word " * 2000]), "tokens", "context")
    refused(lambda: dataclasses.replace(processor, template="x").chat("a"), "template", "'x'")


def fuse(family: dict[str, Path], member: Path, out: Path, **options: object) -> None:
    members = {"one": family["one"], "two": member}
    params = {"weights": [0.5, 0.5]}
    converters.fuse(members, out, **({"base": family["base"], "params": params} | options))


def test_a_member_of_another_family(family: dict[str, Path], tmp_path: Path):
    other = tmp_path / "other"
    checkpoints.upstream_llava_folder(other, 9, llm=checkpoints.make_llama(9, vocab_size=330))
    refused(lambda: fuse(family, other, tmp_path / "out"), "two: vocab_size", "330", "320")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_nan_in_a_member(family: dict[str, Path], member: Path, tmp_path: Path):
    edit_weights(member, lambda t: t[NORM].__setitem__(slice(2), torch.nan))
    refused(lambda: fuse(family, member, tmp_path / "out"), member, NORM, "2 NaN")
    assert list(tmp_path.glob("*out*")) == []


def test_an_output_that_exists(family: dict[str, Path], tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    refused(lambda: fuse(family, family["two"], tmp_path / "out"), tmp_path / "out", "existing")
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["mine"]


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sys.argv = sys.argv[1:]
import runpy
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def command(*args: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, *(["-c", code] if code else []), "experiments/run.py"]
    return subprocess.run([*start, *args], cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_command_on_a_full_disk(family: dict[str, Path], tmp_path: Path):
    """The file system refuses after 20,000 bytes, as a full one would."""
    done = command(
        "--config=experiments/configs/fuse.py",
        f"--config.members=('{family['one']}', '{family['two']}')",
        f"--config.base={family['base']}",
        f"--config.output={tmp_path / 'out'}",
        code=LIMITED,
    )
    assert done.returncode != 0
    line = done.stderr.strip().splitlines()[-1]
    assert "model.safetensors" in line and "while writing" in line, done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_command_with_an_unknown_key():
    done = command("--config=experiments/configs/fuse.py", "--config.membres=('a',)")
    assert done.returncode != 0
    (line,) = done.stderr.strip().splitlines()
    assert "membres" in line and "expected" in line


def test_names_that_are_no_utf8(family: dict[str, Path], tmp_path: Path):
    """Folders of any name are read and written; what says their names escapes them."""
    odd = Path(shutil.copytree(family["one"], tmp_path / os.fsdecode(b"m\xff")))
    edit_config(odd, _name_or_path="\ud800")
    out = tmp_path / os.fsdecode(b"o\xff")
    fuse({**family, "one": odd}, family["two"], out)
    assert "`m\\udcff`" in (out / "MERGE.md").read_text("utf-8")
    assert converters.open_source(out).layout == "visionfuse"
    done = subprocess.run(
        [sys.executable, "-m", "converters", "inspect", odd], cwd=ROOT, capture_output=True
    )
    assert done.returncode == 0 and b"m\\udcff: layout llava" in done.stdout, done.stderr
    refused(lambda: converters.open_source(odd / "\ud800"), "\\ud800", "expected a path")
