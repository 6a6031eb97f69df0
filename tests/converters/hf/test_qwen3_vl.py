"""Qwen3-VL's branch in torch, against transformers' features."""

from pathlib import Path

import torch

from tests import qwen3_vl, qwen_vl
from tests.qwen_vl import picture
from tests.torch_branch import assert_close, assert_learns, show


def test_pictures(tmp_path: Path) -> None:
    """Of two sizes, and what is added to their tokens in the LLM."""
    theirs = qwen3_vl.make()
    qwen3_vl.write(tmp_path, theirs)
    images = [picture(61, 47), picture(120, 90)]
    shown = show(tmp_path, images)
    given = qwen_vl.image_processor()(images, return_tensors="pt")
    expected = theirs.model.get_image_features(**given)
    assert_close(shown.values, torch.cat(list(expected.pooler_output)))
    assert shown.deep is not None
    assert_close(
        shown.deep, torch.stack([torch.cat(list(each)) for each in expected.deepstack_features])
    )
    assert_learns(shown)
