"""GGUF files: their values as gguf dequantises them, headers that are cut or lie."""

import json
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

import converters
from converters.files.gguf import tensor
from converters.files.gguf_header import read_header
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


def of_type(path: Path, kind: gguf.GGMLQuantizationType, rows: int, wide: int) -> np.ndarray:
    """A file with a matrix of random bytes; those, one row a row."""
    block, stored = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(kind).integers(0, 256, (rows, wide // block * stored), np.uint8)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("blk.0.attn_q.weight", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return raw


UNKNOWN = ("Q8_1", "Q8_K", "Q1_0", "I8", "I16", "I32", "I64")
"""Types that gguf does not dequantise: of intermediate values, or not yet."""
TYPES = [x for x in gguf.GGML_QUANT_SIZES if x.name not in (*UNKNOWN, "F32", "F64", "F16", "BF16")]


@pytest.mark.parametrize("kind", TYPES, ids=lambda x: x.name)
def test_random_blocks_of_every_type(tmp_path: Path, kind: gguf.GGMLQuantizationType):
    """Blocks that gguf's own quantiser can't make, too: as gguf dequantises them, bit for bit."""
    rows, wide = 12, 512
    raw = of_type(tmp_path / "m.gguf", kind, rows, wide)
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(raw, kind)
        header = read_header(tmp_path / "m.gguf")
        plain = tensor(header, "blk.0.attn_q.weight")
        pairs = tensor(header, "blk.0.attn_q.weight", heads=2)
        parts = [plain[0:5], plain[5:6], plain[6:12]]
        found = pairs[...]
        part = pairs[4:11]
    assert expected.shape == (rows, wide) and np.isfinite(expected).mean() > 0.5
    np.testing.assert_array_equal(np.concatenate(parts).view(np.uint32), expected.view(np.uint32))
    order = [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]  # halves of a head's rows, one after another
    np.testing.assert_array_equal(found.view(np.uint32), expected[order].view(np.uint32))
    np.testing.assert_array_equal(part.view(np.uint32), found[4:11].view(np.uint32))


@pytest.mark.parametrize("name", UNKNOWN)
def test_types_that_gguf_does_not_dequantise(tmp_path: Path, name: str):
    of_type(tmp_path / "m.gguf", gguf.GGMLQuantizationType[name], 4, 512)
    header = read_header(tmp_path / "m.gguf")
    with pytest.raises(InputError, match=f"attn_q.weight: found a tensor of type {name}, which"):
        tensor(header, "blk.0.attn_q.weight")


def test_a_file_that_is_cut_after_it_was_opened(tmp_path: Path):
    write(tmp_path / "m.gguf", make("llama"), "llama", "Q8_0")
    tensors = converters.open_source(tmp_path / "m.gguf").parts["llm"]
    whole = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"m.gguf: found fewer bytes than its header says"):
        _ = [tensor[...] for tensor in tensors.values()]


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
