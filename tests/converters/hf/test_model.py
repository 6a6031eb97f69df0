"""Fused folders in transformers against vfjax on the same folder."""

from pathlib import Path

import pytest

import converters
from tests.torch_fused import assert_same, open_in_torch, picture, toy_folder

ROWS = [[1, 40, -200, 60, 61, 62, 63], [1, -200, 70]]
PICTURES = [picture(40, 30), picture(25, 50, 1)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP and DINOv2 on one Llama."""
    return toy_folder(tmp_path_factory.mktemp("pair") / "pair")


def test_fused_pair(pair: Path) -> None:
    assert_same(converters.load(pair), open_in_torch(pair), PICTURES, ROWS, sides=("left",))
