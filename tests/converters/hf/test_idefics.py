"""Idefics3's and SmolVLM's branch in torch, against transformers' features."""

from pathlib import Path

import pytest
import torch

from tests.idefics import make_folder, make_processor
from tests.internvl import picture
from tests.torch_branch import assert_close, assert_usable, show


@pytest.mark.parametrize("family", ["idefics3", "smolvlm"])
def test_tiles(family: str, tmp_path: Path) -> None:
    """And the whole, of two pictures."""
    theirs = make_folder(tmp_path, family)
    images = [picture(84, 61), picture(20, 20)]
    shown = show(tmp_path, images)
    given = make_processor()(text="<image><image>", images=images, return_tensors="pt")
    pixels = given["pixel_values"], given["pixel_attention_mask"]
    expected = theirs.model.get_image_features(*pixels).pooler_output
    assert_close(shown.values, torch.cat(list(expected)).reshape(-1, 32))
    assert_usable(shown)
