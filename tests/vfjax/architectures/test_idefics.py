"""Idefics3's tiles: where their tokens stand in a picture, and how patches are joined."""

import sys

import numpy as np
import pytest
from PIL import Image

from vfjax import InputError, Video
from vfjax.architectures import Combine, Film, Idefics, Marks, MLPConfig, PixelShuffleConfig
from vfjax.architectures.idefics import largest_grid, resized
from vfjax.vision.encoders import IdeficsConfig
from vfjax.vision.images import ImageSpec

HALF = (0.5, 0.5, 0.5)
MARKS = Marks((1,), tuple((2, k) for k in range(9)), (3,), (4, 4), (5,))


def path(split: bool = True, film: Film | None = None) -> Idefics:
    return Idefics(
        IdeficsConfig(8, 1, 1, 8, patch=4, image_size=48, input_size=48),
        PixelShuffleConfig(
            MLPConfig(32, 8, 1, bias=False), Combine(((-1,),), drop=0), normed=False
        ),
        ImageSpec(48, 48, "squash", "crop", HALF, HALF, resample=1),
        longest=144,
        split=split,
        marks=MARKS,
        film=film,
    )


@pytest.mark.parametrize("size", [(90, 60), (40, 140), (72, 72)])
def test_bright_tokens_lie_on_the_bright_spot(size: tuple[int, int]):
    """Of tiles and of the whole; marks have no place."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    x, y = size[0] // 3, size[1] // 2
    pixels[y - 4 : y + 4, x - 4 : x + 4] = 255
    ready, boxes = path().prepare([[Image.fromarray(pixels)]]), path().regions(size)
    (run,) = ready.runs
    cols, rows = path().grid(size)
    assert len(run) == len(boxes) == (rows * cols + 1) * 36 + rows * cols * 3 + rows + 1 + 3
    shown = np.asarray(ready.inputs.pixels).mean(axis=-1)
    bright = shown.reshape(len(shown), 6, 8, 6, 8).mean(axis=(2, 4)).reshape(-1) + 1
    assert (np.isnan(boxes).any(axis=1) == (run.text >= 0)).all()
    seen = run.text < 0
    number = run.indices[seen, 0]
    middle = (boxes[seen, :2] + boxes[seen, 2:]) / 2 * size
    for part in (number < rows * cols * 36, number >= rows * cols * 36):
        share = bright[number][part] / bright[number][part].sum()
        spot = (share[:, None] * middle[part]).sum(axis=0)
        np.testing.assert_allclose(spot, (x, y), atol=max(size) / 9)


def test_whole_pictures_and_frames():
    """Not tiled: one view; a model without videos is shown frames so, too."""
    image = Image.new("RGB", (90, 60))
    lone = path(split=False)
    ready = lone.prepare([[image, Video((image, image))]])
    assert [len(run) for run in ready.runs] == [39, 78] and ready.size == 4 * 36
    assert lone.tokens == 39 and len(lone.regions((90, 60))) == 39
    with pytest.raises(InputError, match="found a model whose code reads none"):
        lone.choose(30, 1.0)
    slots = path().prepare([[image]], slots=2)
    assert len(slots.inputs.pixels) == 2 * 10 and path().tokens == 10 * 36 + 9 * 3 + 3 + 1 + 3


def test_edges():
    assert resized((300, 200), 145) == (145, 96) and resized((100, 101), 101) == (100, 101)
    assert resized((5000, 1), 364) == (364, 1) and resized((1, 9000), 9000) == (1, 4096)
    edges = ((364, 364), (365, 365), (1456, 364), (9999, 512))
    assert [largest_grid(*each) for each in edges] == [0, 2, 4, 8]


def test_videos_that_cannot_be_read(monkeypatch):
    frame = Image.new("RGB", (90, 60))
    with pytest.raises(InputError, match="found frames of 24 pixels, by the folder's video proc"):
        path(film=Film(96, 24)).prepare([[Video((frame,))]])
    with pytest.raises(InputError, match="found a video processor without num_frames and fps"):
        path(film=Film(96, 48)).choose(30, 1.0)
    monkeypatch.setitem(sys.modules, "num2words", None)
    with pytest.raises(InputError, match="no num2words"):
        path(film=Film(96, 48)).prepare([[Video((frame,))]])


def test_few_shapes_of_many_sizes():
    """Fifty pictures of mixed sizes fill as many views as there are buckets."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 400, (50, 2)).tolist()
    shapes = {path().prepare([[Image.new("RGB", (w, h))]]).inputs.pixels.shape[0] for w, h in sizes}
    assert shapes <= {4, 8, 16}
