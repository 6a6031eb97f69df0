"""What tensors are called in a folder that is written like another."""

from pathlib import Path

import pytest

from converters import open_source
from converters.files.reader import read_weights
from converters.tensor_names import TensorNames, by_folder, named, spare_names
from tests.checkpoints import hf_llava_folder, upstream_llava_folder


@pytest.mark.parametrize("make", [hf_llava_folder, upstream_llava_folder])
def test_every_tensor_has_the_name_in_its_file(tmp_path: Path, make):
    """A tower beside an authors' folder stands in one of its own."""
    make(tmp_path / "model")
    source = open_source(tmp_path / "model")
    names = TensorNames(source, spare_names(source))
    found, _ = named(names, source, source.parts)
    every = by_folder({name: x for tensors in found.values() for name, x in tensors.items()})
    assert every.pop("").keys() == read_weights(source.path).keys()
    assert list(every) == ["vision_tower"] * len(source.towers)
    for tower in source.towers.values():
        assert every["vision_tower"].keys() == read_weights(tower.path).keys()
