"""InternVL's tiles and their places in the picture."""

import numpy as np
import pytest
from PIL import Image

from vfjax import Video
from vfjax.architectures import Combine, InternVL, MLPConfig, PixelShuffleConfig
from vfjax.vision.encoders import InternViTConfig
from vfjax.vision.images import ImageSpec

ENCODER = InternViTConfig(8, 1, 2, 8, patch=2, image_size=8, input_size=8)


def internvl(*, transposed: bool = False, **options) -> InternVL:
    """Tiles of 8 x 8 pixels, 2 x 2 tokens; pixels of 0 to 1."""
    connector = PixelShuffleConfig(MLPConfig(32, 16), Combine(((-1,),)), transposed=transposed)
    images = ImageSpec(8, 8, "squash", "crop", (0.0,) * 3, (1.0,) * 3)
    return InternVL(ENCODER, connector, images, **options)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("thumbnail", [False, True])
def test_boxes_are_what_tokens_saw(transposed: bool, thumbnail: bool):
    """On a picture that grows brighter to the right and downwards; marks have no place."""
    path = internvl(transposed=transposed, thumbnail=thumbnail, most=6)
    x, y = np.meshgrid(np.arange(240), np.arange(160))
    image = Image.fromarray(np.stack([x, y, 0 * x], axis=-1).astype(np.uint8))
    ready, boxes = path.prepare([[image]]), path.regions(image.size)
    (run,) = ready.runs
    assert run.words == ("<img>", "</img>") and run.text[[0, -1]].tolist() == [-2, -3]
    assert len(boxes) == len(run) == 4 * (6 + thumbnail) + 2 <= path.tokens
    assert np.isnan(boxes[[0, -1]]).all()
    cells = ready.inputs.pixels.reshape(-1, 2, 4, 2, 4, 3).mean(axis=(2, 4))
    if transposed:
        cells = cells.swapaxes(1, 2)
    seen = cells.reshape(-1, 3)[run.indices[1:-1, 0]]
    middle = (boxes[1:-1, :2] + boxes[1:-1, 2:]) / 2
    np.testing.assert_allclose(seen[:, :2] * 255, middle * [240, 160], atol=3)


def test_words_of_a_video():
    """Between frames in one piece, as the tokenizer of the processor sees them."""
    film = Video(tuple(Image.new("RGB", (9, 9)) for _ in range(2)))
    (first, run) = internvl().prepare([[Image.new("RGB", (8, 8)), film]]).runs
    assert len(first) == 6
    assert run.words == ("Frame1: <img>", "</img>\nFrame2: <img>", "</img>")
    assert run.text.tolist() == [-2, *[-1] * 4, -3, *[-1] * 4, -4]
    assert run.indices[run.text == -1, 0].tolist() == list(range(4, 12))


def test_room_for_other_processes():
    ready = internvl(most=4).prepare([[Image.new("RGB", (8, 8))]], slots=2)
    assert len(ready.inputs.pixels) == 2 * 5 and ready.size == 4 * 10
