"""GGUF files: their values as gguf dequantises them, headers that are cut or lie."""

import json
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

import converters
from converters.files.gguf import read_header
from converters.gguf import config_of
from tests.gguf import SIZES, make, write
from vfjax import InputError

QUANTISED = ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


@pytest.mark.parametrize("kind", QUANTISED)
def test_values_are_gguf_s(tmp_path: Path, kind: str):
    """Whole, or rows from the middle of a head on; plain ones in their own dtype."""
    theirs = make("llama", hidden_size=128)
    write(tmp_path / "m.gguf", theirs, "llama", kind)
    tensors = converters.open_source(tmp_path / "m.gguf").parts["llm"]
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"):
        type_ = gguf.GGMLQuantizationType[kind]
        value = theirs.state_dict()[name].numpy()
        expected = gguf.dequantize(gguf.quantize(value, type_), type_)
        found = tensors[name]
        np.testing.assert_array_equal(np.asarray(found[...], np.float32), expected)
        np.testing.assert_array_equal(np.asarray(found[37:61], np.float32), expected[37:61])
        assert found.dtype == {"F16": "float16", "BF16": "bfloat16"}.get(kind, "float32")


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write(path, make("llama"), "llama")
    return path


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        converters.open_source(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.0001, 0.001, 0.01, 0.03, 0.5, 0.99])
def test_a_file_that_is_cut(file: Path, tmp_path: Path, share: float):
    whole = file.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: int(share * len(whole))])
    assert "download it again" in refusal(tmp_path / "cut.gguf")


@pytest.mark.parametrize(
    ("at", "value", "found"),
    [
        (0, b"GGML", "no GGUF file"),
        (4, struct.pack("<I", 9), "version 9"),
        (4, struct.pack(">I", 3), "highest byte first"),
        (8, struct.pack("<Q", 1 << 60), "a whole GGUF file"),
        (16, struct.pack("<Q", 1 << 60), "a header that is longer"),
        (24, struct.pack("<Q", 1 << 60), "a header that is longer"),
    ],
)
def test_a_header_that_lies(file: Path, tmp_path: Path, at: int, value: bytes, found: str):
    whole = bytearray(file.read_bytes())
    whole[at : at + len(value)] = value
    (tmp_path / "odd.gguf").write_bytes(whole)
    assert found in refusal(tmp_path / "odd.gguf")


def test_random_bytes_in_the_header_are_one_line(file: Path, tmp_path: Path):
    """Read, or refused; nothing else."""
    whole, rng = file.read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        odd = bytearray(whole)
        at = int(rng.integers(4, 1200))
        odd[at : at + 4] = rng.bytes(4)
        (tmp_path / "odd.gguf").write_bytes(odd)
        try:
            config_of(read_header(tmp_path / "odd.gguf"))
        except InputError as error:
            refused += "\n" not in str(error)
    assert refused > 20


def test_a_file_among_others_is_named(file: Path, tmp_path: Path):
    (tmp_path / "model.gguf").symlink_to(file)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SIZES}))
    assert "pass the file" in refusal(tmp_path)
