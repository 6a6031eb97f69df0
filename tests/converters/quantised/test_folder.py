"""Whole folders, loaded, fused and written: as the same folders with plain weights."""

import struct
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import converters
from converters import open_source
from converters.files.reader import read_weights
from converters.inspect import inspect
from converters.quantised.folder import read_folder
from tests.checkpoints import hf_llava_folder, llama_folder, tuned, write_json
from tests.quantised import pick, quantise
from vfjax import InputError
from vfjax.atomic import read_json
from vfjax.model import forward


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama `base`, quantised as `fp8` and `gptq`; a LLaVA `sees` as `sees-fp8`."""
    root = tmp_path_factory.mktemp("quantised")
    base = llama_folder(root / "base", intermediate_size=48)
    llama_folder(root / "tuned", llm=tuned(base, 1))
    quantise(root / "base", root / "gptq", "gptq")
    quantise(root / "tuned", root / "fp8", "fp8")
    hf_llava_folder(root / "sees", 2, text={"intermediate_size": 40})
    quantise(root / "sees", root / "sees-fp8", "fp8")
    return root


def contents(folder: Path) -> dict[str, bytes]:
    """Weights files' bytes, by name."""
    return {x.name: x.read_bytes() for x in folder.glob("*.safetensors")}


def arrays(folder: Path) -> dict[str, np.ndarray]:
    """Its tensors as they are stored; safetensors' own reader has no float8 for numpy."""
    return {name: np.asarray(x[...]) for name, x in read_weights(folder).items()}


@pytest.mark.parametrize("name", ["gptq", "fp8", "sees-fp8"])
def test_folders_load_as_those_with_plain_weights(root: Path, name: str):
    """All kinds of rows that loading asks for; nothing of it is left in config or files."""
    model, processor = converters.load(root / name)
    plain, _ = converters.load(root / f"{name}-plain")
    for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(plain), strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b)
    assert "quantization_config" not in open_source(root / name).config


def test_what_is_seen_is_said(root: Path):
    assert "quantised: GPTQ, 4 bits; read as plain weights" in inspect(root / "gptq")
    assert "quantised:" not in inspect(root / "gptq-plain")
    assert open_source(root / "sees-fp8").quantised == ("FP8, blocks of 16 x 16",)


def test_fusing_is_that_of_the_plain_folders(root: Path, tmp_path: Path):
    """Members quantised in two ways and a plain one; the base is quantised, or is plain."""
    found = []
    for end in ("", "-plain"):
        members = {"a": root / f"fp8{end}", "b": root / "tuned"}
        out = tmp_path / f"out{end}"
        base = root / f"gptq{end}"
        converters.fuse(members, out, base=base, method="ties", export="llm", dtype="float32")
        found.append(contents(out))
        assert "quantization_config" not in read_json(out / "config.json")
    assert found[0] == found[1]
    card = (tmp_path / "out" / "MERGE.md").read_text()
    assert "`a`: `fp8`, quantised (FP8, blocks of 16 x 16): what was merged are the values" in card
    assert "`base`: `gptq`, quantised (GPTQ, 4 bits)" in card and "- `b`: `tuned`\n" in card


def test_exports_are_plain(root: Path, tmp_path: Path):
    model, _ = converters.load(root / "sees-fp8")
    converters.export(model, tmp_path / "out")
    assert "quantization_config" not in read_json(tmp_path / "out" / "config.json")
    own, plain = read_weights(tmp_path / "out"), read_weights(root / "sees-fp8-plain")
    assert own.keys() == plain.keys()
    for name, tensor in plain.items():
        assert np.array_equal(own[name][...], tensor[...])


def test_bin_files(root: Path, tmp_path: Path):
    """Torch hands these over in float8, which numpy lacks."""
    folder = tmp_path / "bin"
    quantise(root / "base", folder, "fp8")
    whole = arrays(folder)
    scales = {n: torch.from_numpy(x) for n, x in whole.items() if x.dtype == np.float32}
    eight = {
        n: torch.from_numpy(x.view(np.uint8)).view(torch.float8_e4m3fn)
        for n, x in whole.items()
        if n not in scales
    }
    (folder / "model.safetensors").unlink()
    torch.save(scales | eight, folder / "pytorch_model.bin")
    plain = arrays(tmp_path / "bin-plain")
    for name, tensor in read_folder(folder).tensors.items():
        assert np.array_equal(tensor[...], plain[name])


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json"])
def test_a_config_beside(root: Path, tmp_path: Path, name: str):
    """Where older versions of AutoGPTQ, or AutoAWQ, say how it is quantised."""
    quantise(root / "base", tmp_path / "old", "gptq")
    config = read_json(tmp_path / "old" / "config.json")
    settings = config.pop("quantization_config") | {"quant_method": "gptq"}
    write_json(tmp_path / "old" / "config.json", config)
    write_json(tmp_path / "old" / name, settings)
    assert open_source(tmp_path / "old").quantised == ("GPTQ, 4 bits",)


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as error:
        converters.load(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_folders_that_are_refused(root: Path, tmp_path: Path):
    """Each by a line."""
    config = read_json(quantise(root / "base", tmp_path / "x", "fp8") / "config.json")
    file, whole = tmp_path / "x" / "model.safetensors", arrays(tmp_path / "x")
    name = next(filter(pick, whole))

    def said(tensors: dict[str, np.ndarray], **changes: object) -> str:
        save_file(tensors, file)
        write_json(tmp_path / "x" / "config.json", config | changes)
        return refusal(tmp_path / "x")

    without = {n: x for n, x in whole.items() if n != f"{name}_scale_inv"}
    assert f"{file}: {name}_scale_inv: found no tensor" in said(without)
    short = whole | {f"{name}_scale_inv": whole[f"{name}_scale_inv"][:1]}
    assert "found shape" in said(short)
    odd = whole | {f"{name}_scale_inv": np.full_like(whole[f"{name}_scale_inv"], np.nan)}
    assert f"{name}: found NaN or infinity where it is dequantised" in said(odd)
    assert "weights quantised by hqq" in said(whole, quantization_config={"quant_method": "hqq"})
    nested = {"quantization_config": {"quant_method": "fp8"}}
    assert "quantization_config: found weights quantised" in said(whole, text_config=nested)
    both = said(whole, quantization={"bits": 4})
    assert "quantization: found weights quantised" in both
    plain = load_file(tmp_path / "x-plain" / "model.safetensors")
    assert "by fp8, by the config, expected tensors that are; remove" in said(plain)


def test_a_dtype_of_less_than_a_byte_is_refused(root: Path, tmp_path: Path):
    folder = quantise(root / "base", tmp_path / "x", "fp8")
    header = b'{"x":{"dtype":"F4","shape":[2,4],"data_offsets":[0,4]}}'
    header += b" " * (-len(header) % 8)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    assert "x: found dtype F4, expected" in refusal(folder)


def test_a_file_that_is_cut_short_later(root: Path, tmp_path: Path):
    """After its header was read."""
    folder = quantise(root / "base", tmp_path / "x", "gptq")
    tensors = read_folder(folder).tensors
    file = folder / "model.safetensors"
    with file.open("r+b") as f:
        f.truncate(file.stat().st_size // 4)
    with pytest.raises(InputError, match="the file was cut short"):
        for tensor in tensors.values():
            tensor[...]


def test_logits(root: Path):
    """Of a member that sees, quantised: finite, and not those before."""
    found = []
    for name in ("sees", "sees-fp8"):
        model, processor = converters.load(root / name)
        batch = processor(input_ids=[[1, 70, 9]])
        found.append(np.asarray(forward(model, batch))[batch.mask])
    assert np.isfinite(found[1]).all() and 0 < np.abs(found[1] - found[0]).max() < 1
