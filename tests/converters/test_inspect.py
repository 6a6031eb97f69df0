"""`python -m converters inspect`: what a folder is, from its headers."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from converters.__main__ import main
from converters.files.reader import FileTensor
from tests.adapters import llava_lora_folder
from tests.checkpoints import (
    fused_folder,
    header_file,
    hf_llava_folder,
    llama_folder,
    make_connector,
    make_llama,
    make_tower,
    upstream_llava_folder,
    write_json,
)

Inspect = Callable[[Path], list[str]]


@pytest.fixture
def inspect(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Inspect:
    """The lines of the verb, which must read no tensor."""

    def read(*args: object, **kwargs: object) -> np.ndarray:
        raise AssertionError("a tensor was read")

    def run(path: Path) -> list[str]:
        monkeypatch.setattr("sys.argv", ["converters", "inspect", str(path)])
        monkeypatch.setattr(FileTensor, "__getitem__", read)
        assert main() == 0
        return capsys.readouterr().out.splitlines()

    return run


LLM = "llm: llama, 2 layers x 32, 4 heads (2 for keys), vocabulary 320, context 512"
CLIP = (
    "branch {}: clip_vision_model, 3 layers x 32, taps [-2], 28 px {}, mlp2x_gelu, "
    "up to 16 tokens a picture; tower from {}"
)


def test_upstream(tmp_path: Path, inspect: Inspect):
    tower = make_tower("clip", 0)
    copy = {f"model.vision_tower.vision_tower.{n}": x for n, x in tower.state_dict().items()}
    upstream_llava_folder(tmp_path, tensors=copy, weights="safetensors")
    count = sum(x.numel() for x in tower.state_dict().values())
    lines = inspect(tmp_path)
    start = f"{len(copy)} tensors not read, the tower's own folder is used instead: "
    assert lines.pop().startswith(f"{start}model.vision_tower.vision_tower.embeddings.class")
    assert lines == [
        f"{tmp_path}: layout llava, template vicuna_v1",
        LLM,
        "base: not said in the checkpoint",
        CLIP.format("clip", "pad", tmp_path / "vision_tower"),
        "branches.clip.connector: 4 tensors mapped, 8,448 bytes; 0 known, not read",
        f"branches.clip.encoder: {len(copy)} tensors mapped, {4 * count:,} bytes; "
        "0 known, not read",
        "llm: 21 tensors mapped, 144,000 bytes; 0 known, not read",
    ]


def test_adapter(tmp_path: Path, inspect: Inspect):
    """The base is found beside it; its tensors are not read, nor are updates computed."""
    llm = make_llama(1)
    llama_folder(tmp_path / "base", llm=llm)
    llava_lora_folder(tmp_path / "lora", llm)
    lines = inspect(tmp_path / "lora")
    assert lines[0] == f"{tmp_path}/lora: layout llava, template vicuna_v1"
    assert lines[2] == f"base: {tmp_path}/base"
    assert lines[-1] == "llm: 21 tensors mapped, 144,000 bytes; 0 known, not read"


def test_transformers(tmp_path: Path, inspect: Inspect):
    hf_llava_folder(tmp_path, kind="dinov2", vision_feature_layer=[-1, -2])
    lines = inspect(tmp_path)
    assert lines[0] == f"{tmp_path}: layout llava-hf, template vicuna_v1"
    assert lines[3] == (
        "branch dinov2: dinov2, 3 layers x 32, taps [-1, -2], 28 px crop, mlp2x_gelu, "
        "up to 16 tokens a picture; tower from this folder"
    )


def test_fused(tmp_path: Path, inspect: Inspect):
    branches = {
        name: (
            make_tower("clip", i),
            make_connector((32, 32, 32), i),
            {"taps": [-2], "drop": 1, "aspect": "pad"},
        )
        for i, name in enumerate("ab")
    }
    fused_folder(tmp_path, make_llama(0, tie_word_embeddings=True), branches)
    lines = inspect(tmp_path)
    assert lines[0] == f"{tmp_path}: layout visionfuse, template vicuna_v1"
    assert lines[1] == LLM + ", tied head"
    assert lines[3] == "visual tokens: running positions, causal mask"
    assert lines[4:6] == [CLIP.format(name, "pad", "this folder") for name in "ab"]
    parts = [line.partition(":")[0] for line in lines[6:]]
    kinds = ("connector", "encoder")
    assert parts == [*(f"branches.{b}.{kind}" for b in "ab" for kind in kinds), "llm"]


def test_llm_of_seven_billion_without_its_data(tmp_path: Path, inspect: Inspect):
    """Old buffers are named: known and not read."""
    config = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 2}
    shapes = {
        "model.embed_tokens.weight": (32000, 4096),
        "model.norm.weight": (4096,),
        "lm_head.weight": (32000, 4096),
    }
    for i in range(2):
        start = f"model.layers.{i}."
        shapes |= {f"{start}self_attn.{name}_proj.weight": (4096, 4096) for name in "qkvo"}
        shapes |= {f"{start}mlp.{name}_proj.weight": (11008, 4096) for name in ("gate", "up")}
        shapes |= {f"{start}mlp.down_proj.weight": (4096, 11008)}
        norms = ("input_layernorm", "post_attention_layernorm")
        shapes |= {f"{start}{name}.weight": (4096,) for name in norms}
        shapes |= {f"{start}self_attn.rotary_emb.inv_freq": (64,)}
    write_json(tmp_path / "config.json", config)
    header_file(tmp_path / "model.safetensors", {n: ("BF16", s) for n, s in shapes.items()})
    assert inspect(tmp_path)[1:] == [
        "llm: llama, 2 layers x 4096, 32 heads (32 for keys), vocabulary 32000, context 2048",
        "base: not said in the checkpoint",
        "llm: 21 tensors mapped, 1,333,829,632 bytes; 2 known, not read: "
        "model.layers.*.self_attn.rotary_emb.inv_freq (2)",
    ]


def test_bin(tmp_path: Path, inspect: Inspect):
    llm = llama_folder(tmp_path, base_model="lmsys/vicuna-7b-v1.5")
    (tmp_path / "model.safetensors").unlink()
    torch.save(llm.state_dict(), tmp_path / "pytorch_model.bin")
    lines = inspect(tmp_path)
    assert lines[2:] == [
        "base: lmsys/vicuna-7b-v1.5",
        "llm: 21 tensors mapped, 144,000 bytes; 0 known, not read",
    ]


def test_a_folder_that_does_not_fit_its_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    llama_folder(tmp_path)
    config = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4}
    write_json(tmp_path / "config.json", config)
    monkeypatch.setattr("sys.argv", ["converters", "inspect", str(tmp_path)])
    assert main() == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "llm: found 21 tensors for 32 layers, expected the tensors of every layer" in err
