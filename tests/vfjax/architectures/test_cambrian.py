"""Where Cambrian's tokens stand; what they are is compared in tests/converters/formats."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from vfjax import InputError, Processor, Video
from vfjax.architectures import Cambrian, SVAConfig, TowerConfig
from vfjax.llm import LlamaConfig
from vfjax.model import BranchConfig, ModelConfig
from vfjax.vision.encoders import CLIPConfig
from vfjax.vision.images import ImageSpec

HALF = (0.5, 0.5, 0.5)
CLIP = CLIPConfig(16, 1, 1, 8, patch=2, image_size=12)
SVA = SVAConfig((TowerConfig(16, 12, (-2,), drop=1),), 32, 16, 6, (6,), 1, (0,))
SEEN = Cambrian(CLIP, SVA, ImageSpec(12, 12, "squash", "pad", HALF, HALF))


@pytest.fixture(scope="module")
def processor() -> Processor:
    llm = LlamaConfig(96, 32, 1, 2, 2, 16, 16, 256)
    return Processor(ModelConfig((BranchConfig("cambrian", SEEN),), llm))


@pytest.mark.parametrize(
    "size", [(9, 50), (50, 10), (40, 30), (30, 40), (33, 33), (1200, 900), (36, 6)]
)
def test_tokens_of_a_picture(processor: Processor, size: tuple[int, int]):
    """Those that show it, by the authors' unpad_image; a row has an end, which has no place."""
    long, short = max(size), min(size)
    padding = (6 - int(short * (6 / long))) // 2
    kept = 6 - 2 * padding
    rows, cols = (kept, 6) if size[0] > size[1] else (6, kept)
    batch = processor([Image.new("RGB", size)], input_ids=[[1, -200, 7]])
    assert batch.mask.sum() == 2 + rows * (cols + 1)
    boxes = SEEN.regions(size)
    assert len(boxes) == rows * (cols + 1)
    ends = np.isnan(boxes[:, 0]).reshape(rows, cols + 1)
    assert ends[:, -1].all() and not ends[:, :-1].any()


def test_masks_show_the_picture(processor: Processor):
    """By unmask_attention_mask: 40 x 30 is 9 of 12 rows, one row of padding is cut at both ends."""
    batch = processor([Image.new("RGB", (40, 30))], input_ids=[[1, -200, 7]])
    (mask,) = batch.images["cambrian"].given.masks.values()
    assert mask[0].all(axis=1).tolist() == [False, *[True] * 10, False]


def test_a_picture_thinner_than_a_token(processor: Processor):
    with pytest.raises(InputError, match="image: found a picture of 5x50 pixels"):
        processor([Image.new("RGB", (5, 50))], input_ids=[[1, -200, 7]])


def test_videos(processor: Processor):
    """Of frames all tokens are read, without ends of rows; none is made of others."""
    frames = (Image.new("RGB", (40, 30)),) * 2
    with pytest.raises(InputError, match="video: found visual tokens that are pooled"):
        processor([Video(frames)], input_ids=[[1, -200, 7]])
    batch = processor([Video(frames, pool=1)], input_ids=[[1, -200, 7]])
    assert batch.mask.sum() == 2 + 2 * 36
    alone = dataclasses.replace(SEEN, connector=dataclasses.replace(SVA, layers=()))
    assert len(alone.prepare([[Video(frames)]]).runs[0]) == 36
