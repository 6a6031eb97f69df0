"""Shapes that must fit one another are compared on opening, and told by their numbers."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import converters
from converters import open_source
from converters.create import describe
from converters.inspect import inspect
from converters.load import model_config
from tests.checkpoints import (
    fused_folder,
    hf_llava_folder,
    make_connector,
    make_llama,
    make_tower,
    tower_folder,
    upstream_llava_folder,
    write_json,
)
from vfjax import InputError
from vfjax.atomic import read_json


def refused(path: Path, **options: Any) -> str:
    """The error of `load`, which `inspect` gives too, from headers alone."""
    with pytest.raises(InputError) as error:
        converters.load(path, **options)
    with pytest.raises(InputError) as seen:
        inspect(path, **options)
    assert str(seen.value) == str(error.value)
    return str(error.value)


def edit(path: Path, **keys: Any) -> None:
    write_json(path / "config.json", {**read_json(path / "config.json"), **keys})


HIDDEN = {"mm_hidden_size": 50}
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "mlp": ("llava15_mlp2x", HIDDEN, "reads 50 channels, expected 1 x "),
    "sti": ("dc_sti", HIDDEN, "found a connector that reads 50 channels, expected 1 x 32, the"),
    "dci": ("dc_dci", HIDDEN, "found a connector that reads 50 channels, expected 3 x 32, the"),
    "mining": ("mgm_plain", HIDDEN, "reads 50 channels, expected 1 x "),
    "aux": ("mgm_plain", {"mm_hidden_size_aux": 7}, "reads 7 channels, expected 1 x "),
    "mined": (
        "mgm_plain",
        {"mm_dense_connector_type": "sti", "mm_dense_connector_layers": 4},
        "mm_dense_connector_type: found tokens that are not one a patch, in patch info mining",
    ),
    "slime": ("slime_vicuna", HIDDEN, "found a connector that reads 50 channels, expected 1 x "),
    "separator": (
        "slime_vicuna",
        {"seperator": 320},
        "found token id 320, expected one of the 320",
    ),
    "taps": (
        "llava15_mlp2x",
        {"mm_vision_select_layer": -9},
        "encoder: taps: found [-9], expected",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_connector_says_what_it_reads(shared: Path, tmp_path: Path, name: str):
    case, keys, message = CASES[name]
    for file in (shared / "golden" / case).iterdir():
        (tmp_path / file.name).symlink_to(file)
    text = read_json(tmp_path / "config.json")
    (tmp_path / "config.json").unlink()
    write_json(tmp_path / "config.json", {**text, **keys})
    assert message in refused(tmp_path)


def test_comm(tmp_path: Path):
    tower_folder(tmp_path / "clip", "clip")
    tower_folder(tmp_path / "dino", "dinov2")
    llm = tmp_path / "llm"
    make_llama(0).save_pretrained(llm)
    for kind, more in (("comm", {"aux": tmp_path / "dino"}), ("dci", {})):
        source = describe(llm, tmp_path / "clip", {"kind": kind}, **more)
        model_config(source)
        source.branches[0].connector["din"] += 1
        with pytest.raises(InputError, match="the width of clip_vision_model from .*/clip; take"):
            model_config(source)
    source = describe(llm, tmp_path / "clip", {"kind": "comm"}, aux=tmp_path / "dino")
    source.branches[0].connector["din_aux"] = 31
    with pytest.raises(InputError, match="reads 31 channels, expected 1 x 32, the width of dinov2"):
        model_config(source)


def test_a_tower_of_another_width(tmp_path: Path):
    """Named by `towers=`: both widths are told, and the folder."""
    upstream_llava_folder(tmp_path / "llava")
    tower_folder(tmp_path / "siglip", "siglip")
    shutil.rmtree(tmp_path / "llava/vision_tower")
    line = refused(tmp_path / "llava", towers={"vision_tower": tmp_path / "siglip"})
    assert line == (
        f"{tmp_path}/llava: branches.siglip.connector: found a connector that reads 32 channels, "
        f"expected 1 x 24, the width of siglip_vision_model from {tmp_path}/siglip; take the tower "
        "that the connector was trained with"
    )


def test_a_branch_of_another_llm(tmp_path: Path):
    branch = {"taps": [-2], "drop": 1, "aspect": "pad"}
    parts = (make_tower("clip", 0), make_connector((32, 24, 24), 1), branch)
    fused_folder(tmp_path, make_llama(0), {"a": parts})
    branches = read_json(tmp_path / "config.json")["branches"]
    branches[0]["connector"]["dout"] = 24
    edit(tmp_path, branches=branches)
    where = f"{tmp_path}: branches.a.connector"
    assert refused(tmp_path).startswith(f"{where}: found visual tokens of width 24, expected 32, ")


def test_tokens_of_the_template(tmp_path: Path):
    """Ids without a row: refused where prompts need them, else said by `inspect` and as used."""
    hf_llava_folder(tmp_path, text={"vocab_size": 223})
    line = refused(tmp_path)
    assert "tokenizer: found id 223 of 'Ġ', which prompts of template vicuna_v1 have" in line
    assert "expected ids below 223, the rows of the embedding" in line


def test_tokens_without_a_row(tmp_path: Path):
    hf_llava_folder(tmp_path, text={"vocab_size": 259})
    edit(tmp_path, image_token_index=259)
    file = read_json(tmp_path / "tokenizer.json")
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    file["added_tokens"] += [{"id": 259, "content": "<image>", "special": True, **flags}]
    write_json(tmp_path / "tokenizer.json", file)
    assert "tokenizer: 1 token without a row: '<image>'" in inspect(tmp_path).splitlines()
    _, processor = converters.load(tmp_path)
    with pytest.raises(InputError, match="row 0: found token id 259, expected ids below 259"):
        processor(input_ids=[processor.tokenizer("a<image>").input_ids])


def clip(path: Path) -> None:
    tower_folder(path, "clip")


def whole_clip(path: Path) -> None:
    """As the hub has CLIP: both halves' configs; the text's tensors are left out here."""
    tower_folder(path, "clip")
    config = read_json(path / "config.json")
    write_json(path / "config.json", {"model_type": "clip", "vision_config": config})


def dino(path: Path) -> None:
    tower_folder(path, "dinov2")


@pytest.mark.parametrize(
    ("make", "kind", "width", "px"),
    [
        (clip, "clip_vision_model", 32, 28),
        (whole_clip, "clip_vision_model", 32, 28),
        (dino, "dinov2", 32, 35),
    ],
)
def test_inspect_says_that_a_folder_is_a_tower(
    tmp_path: Path, make: Callable[[Path], None], kind: str, width: int, px: int
):
    make(tmp_path)
    first, second, third = inspect(tmp_path).splitlines()
    assert first == (
        f"{tmp_path}: a vision tower alone, with preprocessor_config.json; converters.load_encoder "
        "reads it, and towers= takes it for that of a model"
    )
    assert second == f"encoder: {kind}, 3 layers x {width}, {px} px"
    assert third.startswith("encoder: ") and " tensors mapped, " in third
    converters.load_encoder(tmp_path)
    with pytest.raises(InputError, match="a vision tower, expected one of the layouts .*load_enc"):
        open_source(tmp_path)


def other(path: Path, *names: str) -> None:
    path.mkdir()
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text('{"peft_type": "LORA", "target_modules": ["q_proj"]}')
        if name == "mm_projector.bin":
            torch.save({"model.mm_projector.0.bias": torch.zeros(2)}, path / name)
        if name == "adapter_model.safetensors":
            module = "base_model.model.model.layers.0.self_attn.q_proj"
            factors = {f"{module}.lora_{x}.weight": torch.zeros(2, 2) for x in "AB"}
            save_file(factors, path / name)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "found an empty folder, expected a checkpoint; download"),
        (
            ("m.Q4_K_M.gguf",),
            "found GGUF weights, m.Q4_K_M.gguf, expected a checkpoint; pass the file, ",
        ),
        (("tokenizer.json", "tokenizer_config.json"), "found a tokenizer alone, "),
        (("model.safetensors",), "found weights without config.json, "),
        (("open_clip_config.json",), "model_cfg"),
        (("adapter_config.json", "adapter_model.safetensors"), "base model '': found a LoRA adap"),
        (("mm_projector.bin",), "base model '': found a projector without it, expected its folder"),
        (
            ("refs/main", "snapshots/abc/config.json"),
            "no config.json, expected a checkpoint; pass ",
        ),
        (("notes.txt",), "found no config.json, expected a checkpoint; check the path"),
    ],
)
def test_folders_that_hold_no_model(tmp_path: Path, names: tuple[str, ...], message: str):
    path = tmp_path / "x"
    other(path, *names)
    if names == ("open_clip_config.json",):
        with pytest.raises(InputError, match="found a vision tower, of OpenCLIP, expected"):
            converters.load(path)
        return
    line = refused(path)
    assert line.startswith(str(path)) and message in line
    if "snapshots" in str(names):
        assert line.endswith(f"pass {path}/snapshots/abc")


def test_files(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"x")
    assert refused(path).startswith(f"{path}: found a file, expected a checkpoint; pass its folder")
