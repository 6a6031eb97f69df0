"""Qwen2-VL's and Qwen2.5-VL's branch in torch, against transformers' features."""

from pathlib import Path

import pytest
import torch

from converters.hf.qwen_vl import bounds, patches
from tests import qwen_vl
from tests.qwen_vl import picture
from tests.torch_branch import assert_close, assert_usable, show
from vfjax import Video


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
def test_pictures_and_a_video(kind: str, tmp_path: Path) -> None:
    """Of other sizes side by side, in windows and whole; what only pads is not computed."""
    theirs = qwen_vl.make(kind)
    qwen_vl.write(tmp_path, theirs)
    images, frames = [picture(61, 47), picture(120, 90)], [picture(32, 24)] * 3
    shown = show(tmp_path, [*images, Video(frames, duration=1.5)])
    own = theirs.model
    expected = [
        *own.get_image_features(**qwen_vl.image_processor()(images, return_tensors="pt"))[1],
        *own.get_video_features(
            **{
                key: value
                for key, value in qwen_vl.film(qwen_vl.Given(frames, 1.5)).items()
                if key != "second_per_grid_ts"
            }
        )[1],
    ]
    assert_close(shown.values, torch.cat(expected))
    assert_usable(shown)


def test_segments() -> None:
    """Frames of four and two patches, and padding, which is alone unless a token is a patch."""
    back = torch.tensor([0, -1, -2, -3, 0, -1, 0, 0])
    assert patches(back, 2) == 6 and patches(back, 1) == 8
    assert bounds(back[:6]).tolist() == [0, 4, 6]
