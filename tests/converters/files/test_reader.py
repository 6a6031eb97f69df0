"""Checkpoint files as lazy tensors, against the libraries that wrote them."""

import json
import os
import pickle
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from converters.files.reader import DTYPES, read_weights
from tests.checkpoints import write_json
from vfjax import InputError
from vfjax.atomic import read_json

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    """One array of every dtype of safetensors, any bits; ranks 0 to 4, one empty."""
    rng = np.random.default_rng(seed)
    shapes = [(5, 3), (), (7,), (0, 4), (2, 3, 4, 5)]
    out = {}
    for i, (name, dtype) in enumerate(DTYPES.items()):
        shape = shapes[i % len(shapes)]
        raw = rng.integers(0, 256, (*shape, dtype.itemsize), dtype=np.uint8)
        raw = raw % 2 if name == "BOOL" else raw
        out[name] = np.frombuffer(raw.tobytes(), dtype).reshape(shape)
    return out


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    """A small PyTorch state, in all float dtypes, some not contiguous, one a scalar."""
    rng = torch.Generator().manual_seed(seed)
    out = {str(d): torch.randn(6, 4, generator=rng).to(d).T for d in FLOATS}
    return out | {"ids": torch.arange(5), "scalar": torch.tensor(2.5, dtype=torch.bfloat16)}


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def assert_reads(found: Mapping, expected: Mapping[str, np.ndarray]) -> None:
    """Same names, and for each tensor same dtype, shape and bytes, whole and by rows."""
    assert set(found) == set(expected)
    for name, array in expected.items():
        tensor = found[name]
        assert (tensor.shape, tensor.dtype) == (array.shape, array.dtype), name
        whole = tensor[...]
        assert (whole.shape, whole.dtype, whole.tobytes()) == (
            array.shape,
            array.dtype,
            array.tobytes(),
        ), name
        if array.ndim:
            for rows in (slice(0, 1), slice(1, 4), slice(2, 100), slice(3, 3)):
                part = tensor[rows]
                assert part.shape == array[rows].shape, (name, rows)
                assert part.tobytes() == array[rows].tobytes(), (name, rows)


def test_safetensors_of_every_dtype(tmp_path: Path):
    expected = arrays()
    save_file(expected, tmp_path / "model.safetensors", {"format": "pt"})
    assert_reads(read_weights(tmp_path), expected)


def test_shards(tmp_path: Path):
    expected = arrays()
    places = {
        name: f"model-0000{1 + i % 3}-of-00003.safetensors" for i, name in enumerate(expected)
    }
    for shard in set(places.values()):
        save_file({n: a for n, a in expected.items() if places[n] == shard}, tmp_path / shard)
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": places})
    found = read_weights(tmp_path)
    assert_reads(found, expected)
    assert {name: tensor.path.name for name, tensor in found.items()} == places


def test_shards_may_be_links(tmp_path: Path):
    """The Hugging Face cache keeps the content elsewhere."""
    expected = arrays()
    (tmp_path / "blobs").mkdir()
    save_file(expected, tmp_path / "blobs" / "abc")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "a.safetensors").symlink_to(tmp_path / "blobs" / "abc")
    index = {"weight_map": dict.fromkeys(expected, "a.safetensors")}
    write_json(tmp_path / "snapshot" / "model.safetensors.index.json", index)
    assert_reads(read_weights(tmp_path / "snapshot"), expected)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before zip"])
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_bin(tmp_path: Path, zipped: bool, sharded: bool):
    expected = state()
    parts = {"pytorch_model.bin": list(expected)}
    if sharded:
        names = list(expected)
        parts = {"pytorch_model-1.bin": names[:2], "pytorch_model-2.bin": names[2:]}
        places = {name: shard for shard, listed in parts.items() for name in listed}
        write_json(tmp_path / "pytorch_model.bin.index.json", {"weight_map": places})
    for shard, listed in parts.items():
        torch.save(
            {name: expected[name] for name in listed},
            tmp_path / shard,
            _use_new_zipfile_serialization=zipped,
        )
    assert_reads(read_weights(tmp_path), {n: as_numpy(t) for n, t in expected.items()})


def test_a_training_checkpoint(tmp_path: Path):
    """As OpenCLIP publishes: the tensors behind a key, other things beside it."""
    expected = state()
    content = {"epoch": 3, "name": "x", "state_dict": expected, "optimizer": {"lr": [0.1]}}
    torch.save(content, tmp_path / "pytorch_model.bin")
    assert_reads(read_weights(tmp_path), {n: as_numpy(t) for n, t in expected.items()})


def test_safetensors_are_preferred_to_bin(tmp_path: Path):
    expected = arrays()
    save_file(expected, tmp_path / "model.safetensors")
    torch.save(state(), tmp_path / "pytorch_model.bin")
    assert_reads(read_weights(tmp_path), expected)


def test_a_stem_takes_the_place_of_the_usual_names(tmp_path: Path):
    expected = arrays(1)
    save_file(arrays(), tmp_path / "model.safetensors")
    save_file(expected, tmp_path / "vision_tower.safetensors")
    assert_reads(read_weights(tmp_path, ["tower", "vision_tower"]), expected)


def refused(folder: Path) -> str:
    """The line with which a folder is refused."""
    with pytest.raises(InputError) as error:
        read_weights(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_no_weights(tmp_path: Path):
    assert refused(tmp_path) == (
        f"{tmp_path}: found no weights, expected model.safetensors or pytorch_model.safetensors or "
        "model.bin or pytorch_model.bin, or their .index.json; check the path, or download the "
        "missing files"
    )


HUGE = (1 << 62).to_bytes(8, "little")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: data[:100],
        lambda data: data + b"\0",
        lambda data: b"",
        lambda data: b"\x80\x02}q\x00.",
        lambda data: b"<html>not found</html>",
        lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n",
        lambda data: HUGE + data[8:],
        lambda data: data[:8] + b"[" + data[9:],
    ],
    ids=["last byte", "half", "header", "more", "none", "pickle", "page", "LFS", "length", "JSON"],
)
def test_not_a_whole_safetensors_file(tmp_path: Path, damage: Callable[[bytes], bytes]):
    file = tmp_path / "model.safetensors"
    save_file(arrays(), file)
    file.write_bytes(damage(file.read_bytes()))
    line = refused(tmp_path)
    assert line.startswith(f"{file}: found {file.stat().st_size} bytes that are no safetensors")
    assert line.endswith("expected a whole safetensors file; download it again")


def test_a_file_cut_after_it_was_opened(tmp_path: Path):
    file = tmp_path / "model.safetensors"
    save_file({"a": np.ones((8, 8), np.float32)}, file)
    tensor = read_weights(tmp_path)["a"]
    os.truncate(file, file.stat().st_size - 4)
    assert tensor[0:7].sum() == 56
    with pytest.raises(InputError, match=r"model\.safetensors: found 324 bytes, expected 328"):
        tensor[...]


@pytest.mark.parametrize(
    ("places", "line"),
    [
        ({"a": "2.safetensors"}, "2.safetensors: found no file, expected a shard of"),
        ({"a": "../1.safetensors"}, "found shard '../1.safetensors' outside the folder"),
        ({"a": "sub/1.safetensors"}, "found shard 'sub/1.safetensors' outside the folder"),
        ({"a": "{folder}/../1.safetensors"}, "1.safetensors' outside the folder"),
        ({"a": ".."}, "found no file"),
        ({"a": "1.safetensors", "b": "1.safetensors"}, "found 'b' only in the index"),
        ({"a": 1}, "found no weight_map"),
        (["a"], "found no weight_map"),
    ],
)
def test_an_index_that_is_wrong(tmp_path: Path, places: dict | list, line: str):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    for place in (folder, folder / "sub", tmp_path):
        save_file({"a": np.ones(2, np.float32)}, place / "1.safetensors")
    text = json.dumps({"weight_map": places}).replace("{folder}", str(folder))
    (folder / "model.safetensors.index.json").write_text(text)
    assert line in refused(folder)


def test_an_adapter_outside_its_folder(tmp_path: Path):
    (tmp_path / "adapter").mkdir()
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "1.safetensors")
    index = {"weight_map": {"a": "../1.safetensors"}}
    write_json(tmp_path / "adapter" / "adapter_model.safetensors.index.json", index)
    with pytest.raises(InputError, match="found shard '../1.safetensors' outside the folder"):
        read_weights(tmp_path / "adapter", ("adapter_model",))


def test_a_shard_with_more_than_its_index_lists(tmp_path: Path):
    save_file({n: np.ones(2, np.float32) for n in "ab"}, tmp_path / "1.safetensors")
    index = {"weight_map": {"a": "1.safetensors"}}
    write_json(tmp_path / "model.safetensors.index.json", index)
    assert "1.safetensors: found 'b' only in the shard" in refused(tmp_path)


def test_a_dtype_without_a_numpy_type(tmp_path: Path):
    file = tmp_path / "model.safetensors"
    save_file({"a": np.zeros(4, np.uint8)}, file)
    file.write_bytes(file.read_bytes().replace(b'"U8"', b'"F4"').replace(b"[4]", b"[8]"))
    assert f"{file}: a: found dtype F4, expected float64, " in refused(tmp_path)


def test_sides_beyond_an_array(tmp_path: Path):
    """The library takes any sides of a tensor without elements."""
    file = tmp_path / "model.safetensors"
    header = {"a": {"dtype": "F32", "shape": [0, 1 << 62], "data_offsets": [0, 0]}}
    data = json.dumps(header).encode()
    file.write_bytes(len(data).to_bytes(8, "little") + data)
    assert f"{file}: a: found shape (0, {1 << 62}), expected sides" in refused(tmp_path)


@pytest.mark.parametrize(
    ("tensor", "found"),
    [
        (torch.eye(3).to_sparse(), "a sparse tensor"),
        (torch.ones(2, device="meta"), "one without values"),
        (torch.ones(2, dtype=torch.complex64), "dtype complex64"),
    ],
)
def test_a_bin_of_other_tensors(tmp_path: Path, tensor: torch.Tensor, found: str):
    torch.save({"a": tensor}, tmp_path / "pytorch_model.bin")
    assert f"pytorch_model.bin: a: found {found}, expected " in refused(tmp_path)


class Trap:
    """Leaves a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("how", ["zip", "before zip", "plain pickle"])
def test_code_in_a_bin_is_not_run(tmp_path: Path, how: str):
    file, mark = tmp_path / "pytorch_model.bin", tmp_path / "mark"
    content = {"a": torch.ones(2), "b": Trap(mark)}
    if how == "plain pickle":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=how == "zip")
    line = refused(tmp_path)
    assert line.startswith(f"{file}: found a file that torch refuses (")
    assert line.endswith(
        "expected a pickle of tensors only; download it again; if it holds code, do not use it"
    )
    assert not mark.exists()


@pytest.mark.parametrize("content", [b"", b"abc", None])
def test_not_a_whole_bin(tmp_path: Path, content: bytes | None):
    file = tmp_path / "pytorch_model.bin"
    torch.save(state(), file)
    file.write_bytes(file.read_bytes()[:-100] if content is None else content)
    assert refused(tmp_path).startswith(f"{file}: found a file that torch refuses (")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ({"model": {"a": torch.ones(2)}}, "bin: model: found dict, expected a tensor"),
        ({"state_dict": {"a": 1}}, "bin: a: found int, expected a tensor"),
        ([torch.ones(2)], "found list, expected a tensor"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "bin: a: found dtype complex64, expected"),
    ],
)
def test_a_bin_of_something_else(tmp_path: Path, content: object, line: str):
    torch.save(content, tmp_path / "pytorch_model.bin")
    assert line in refused(tmp_path)


def test_bin_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    torch.save(state(), tmp_path / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)  # what makes an import fail
    assert refused(tmp_path) == (
        f"{tmp_path}/pytorch_model.bin: found no torch to read it with, expected torch; "
        "pip install 'vfjax[torch]', or convert the file to safetensors"
    )


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (None, "no file"),
        (b"", "no readable JSON"),
        (b"{'a': 1}", "no readable JSON"),
        (b"\xff\xfe", "no readable JSON"),
        (b"[1]", "list"),
    ],
)
def test_json_that_is_none(tmp_path: Path, content: bytes | None, found: str):
    file = tmp_path / "config.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_json(file)
    assert str(error.value).startswith(f"{file}: found {found}")
    assert "\n" not in str(error.value)
