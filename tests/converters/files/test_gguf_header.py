"""GGUF models in several files: read as one by any part; missing and odd ones are refused."""

import shutil
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

import converters
from converters.files.gguf_header import parts
from tests.gguf import make, write
from vfjax import InputError

COUNT = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model in one file, and in three, as gguf's own writer splits it."""
    place = tmp_path_factory.mktemp("gguf")
    write(place / "whole.gguf", make("llama"), "llama")
    reader = gguf.GGUFReader(place / "whole.gguf")
    most = -(-len(reader.tensors) // COUNT)
    writer = gguf.GGUFWriter(place / "m.gguf", "llama", split_max_tensors=most)
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        inner = field.types[1] if field.types[1:] else None
        writer.add_key_value(key, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return place


def named(folder: Path, number: int) -> Path:
    return folder / f"m-{number:05d}-of-{COUNT:05d}.gguf"


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """The parts, to be spoilt."""
    for number in range(1, COUNT + 1):
        shutil.copy(named(folder, number), tmp_path)
    return tmp_path


@pytest.mark.parametrize("number", range(1, COUNT + 1))
def test_any_part_stands_for_the_whole(folder: Path, number: int):
    whole = converters.open_source(folder / "whole.gguf")
    found = converters.open_source(named(folder, number))
    assert found.llm == whole.llm
    assert found.parts["llm"].keys() == whole.parts["llm"].keys()
    for name, tensor in whole.parts["llm"].items():
        np.testing.assert_array_equal(found.parts["llm"][name][...], tensor[...], err_msg=name)


def test_parts_in_the_hub_s_cache(folder: Path, tmp_path: Path):
    """There their names are links to files whose names are sums."""
    (tmp_path / "blobs").mkdir()
    for number in range(1, COUNT + 1):
        shutil.copy(named(folder, number), tmp_path / "blobs" / f"{number:x}")
        named(tmp_path, number).symlink_to(tmp_path / "blobs" / f"{number:x}")
    assert converters.open_source(named(tmp_path, 1)).parts["llm"]


def test_files_that_are_not_split(folder: Path):
    assert parts(folder / "whole.gguf") == [folder / "whole.gguf"]


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        converters.open_source(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_parts_are_named(copied: Path):
    named(copied, 2).unlink()
    assert "no m-00002-of-00003.gguf" in refusal(named(copied, 1))
    named(copied, 1).unlink()
    assert "no m-00001-of-00003.gguf nor 1 more" in refusal(named(copied, 3))


def test_a_part_with_another_name(copied: Path):
    other = named(copied, 1).rename(copied / "other.gguf")
    assert "NAME-00001-of-00003.gguf" in refusal(other)


def test_parts_in_another_order(copied: Path):
    shutil.copy(named(copied, 3), named(copied, 2))
    assert "split.no" in refusal(named(copied, 1))


def test_a_tensor_in_two_parts(copied: Path):
    """The last part is the second's tensors again, with its own number."""
    data = bytearray(named(copied, 2).read_bytes())
    at = data.index(b"split.no") + len(b"split.no") + 4
    size = 2  # it is a uint16
    assert struct.unpack_from("<H", data, at)[0] == 1
    data[at : at + size] = struct.pack("<H", 2)
    named(copied, 3).write_bytes(data)
    assert "a tensor that another part has, too" in refusal(named(copied, 1))


def test_too_few_tensors(copied: Path):
    data = bytearray(named(copied, 1).read_bytes())
    key = b"split.tensors.count"
    at = data.index(key) + len(key) + 4
    data[at : at + 4] = struct.pack("<i", 1000)
    named(copied, 1).write_bytes(data)
    assert "split.tensors.count: found 1000" in refusal(named(copied, 2))
