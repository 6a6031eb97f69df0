"""Qwen3-VL's branch in torch, against transformers' features."""

from pathlib import Path

import numpy as np
import torch

import converters
from tests import qwen3_vl, qwen_vl
from tests.pairs import AFTER, BEFORE, fuse_pair
from tests.qwen_vl import picture
from tests.torch_branch import assert_close, assert_usable, show
from tests.torch_fused import greedy, logits_of, open_in_torch
from vfjax.model import forward


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
    assert_usable(shown)


def test_beside_a_member_with_one_position(tmp_path: Path) -> None:
    """InternVL3.5 and Qwen3-VL on one Qwen3: what is generated is the likeliest in vfjax, too.

    Two pictures, rows of other lengths, padded on either side; new text behind the longest branch.
    """
    fuse_pair("internvl3_5", tmp_path)
    how = {"positions": "parallel", "mask": "block"}
    model, processor = converters.load(tmp_path / "out", **how)
    processor.lengths = (256,)  # one compilation
    theirs = open_in_torch(tmp_path / "out", **how)
    image = picture(61, 47)
    media = [[image, picture(120, 90)], [image], []]
    rows = [[*BEFORE, *[-200] * count, *AFTER] for count in (2, 1, 0)]
    made = {}
    for side in ("right", "left"):
        made[side] = greedy(theirs, processor(media, input_ids=rows, padding=side), 30)
    assert made["right"] == made["left"]
    batch = processor(media, input_ids=rows, padding="left")
    static = greedy(theirs, batch, 8, cache_implementation="static")
    assert static == [row[:8] for row in made["left"]]
    whole = [row + new for row, new in zip(rows, made["left"], strict=True)]
    batch = processor(media, input_ids=whole, padding="left")
    expected = np.asarray(forward(model, batch))
    found = logits_of(theirs, batch)
    mask = np.asarray(batch.mask)
    assert np.abs(found - expected[mask]).max() <= 1e-4 * np.abs(expected[mask]).max()
    assert expected[:, -31:-1].argmax(-1).tolist() == made["left"]
