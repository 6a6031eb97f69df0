"""LLaVA-OneVision's rules of tokens, against transformers' processor; their boxes."""

from types import SimpleNamespace

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vfjax.architectures import MLPConfig, OneVision, ProjectorConfig, Run
from vfjax.architectures.combine import Combine
from vfjax.architectures.onevision import resized
from vfjax.vision.encoders import SigLIPConfig
from vfjax.vision.images import ImageSpec
from vfjax.vision.video import Video

HALF = (0.5, 0.5, 0.5)
CONNECTOR = ProjectorConfig(MLPConfig(1152, 8), Combine(((-1,),), drop=0), newline=True)


def path(side: int, patch: int, tiles: int, most: int) -> OneVision:
    return OneVision(
        SigLIPConfig(image_size=side, patch=patch),
        CONNECTOR,
        ImageSpec(side, side, "squash", "crop", HALF, HALF),
        pinpoints=tuple(
            (side * cols, side * rows)
            for rows in range(1, tiles + 1)
            for cols in range(1, tiles + 1)
        ),
        decimals=7,
        most=most,
    )


PUBLISHED = path(384, 14, 6, 9)
PROCESSOR = transformers.LlavaOnevisionProcessor
THEIRS = SimpleNamespace(
    num_image_tokens=729,
    vision_aspect_ratio="anyres_max_9",
    image_processor=transformers.LlavaOnevisionImageProcessorPil(),
    _get_unpadded_features=lambda *args: PROCESSOR._get_unpadded_features(THEIRS, *args),
)
SIDES = st.integers(1, 4000)


@settings(max_examples=200, deadline=None)
@given(width=SIDES, height=SIDES)
def test_as_many_tokens_as_transformers_counts(width: int, height: int):
    """At the published sizes; each is a weighted mean of tokens that there are."""
    run = PUBLISHED.lone((width, height))
    expected = PROCESSOR._get_number_of_features(THEIRS, height, width, 384, 384)
    assert len(run) == expected <= PUBLISHED.tokens
    if run.weights is not None:
        np.testing.assert_allclose(run.weights.sum(axis=1), 1, atol=1e-9)
    assert run.indices.max() < 37 * 729


def test_a_raster_is_resized_as_torch_does():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    values = rng.normal(size=(7, 10)).astype(np.float32)
    run: Run = resized(np.arange(70).reshape(7, 10), (4, 6))
    assert run.weights is not None
    found = (values.reshape(-1)[run.indices] * run.weights).sum(axis=1)
    theirs = torch.nn.functional.interpolate(
        torch.tensor(values)[None, None], (4, 6), mode="bilinear"
    )
    np.testing.assert_allclose(found, theirs.numpy().ravel(), atol=1e-6)


@pytest.mark.parametrize("size", [(90, 60), (50, 140), (72, 72)])
def test_bright_tokens_lie_on_the_bright_spot(size: tuple[int, int]):
    """Whole view and tiles, shrunk where the limit says so; newlines have no place."""
    toy = path(48, 8, 3, 2)
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    x, y = size[0] // 3, size[1] // 2
    pixels[y - 4 : y + 4, x - 4 : x + 4] = 255
    picture = Image.fromarray(pixels)
    ready, boxes = toy.prepare([[picture]]), toy.regions(size)
    (run,) = ready.runs
    assert len(run) == len(boxes)
    shown = np.asarray(ready.inputs.pixels).mean(axis=-1)
    cells = shown.reshape(len(shown), 6, 8, 6, 8).mean(axis=(2, 4)).reshape(-1)
    cells = np.append(cells, cells.min())
    weights = np.ones_like(run.indices) if run.weights is None else run.weights
    bright = (cells[run.indices] * weights).sum(axis=1) - cells.min()
    placed = ~np.isnan(boxes).any(axis=1)
    rows = (~placed).sum()
    assert rows and (np.flatnonzero(~placed) >= 36).all()
    middle = (boxes[placed, :2] + boxes[placed, 2:]) / 2 * size
    tiles = placed.nonzero()[0] >= 36
    for part in (tiles, ~tiles):
        share = bright[placed][part] / bright[placed][part].sum()
        spot = (share[:, None] * middle[part]).sum(axis=0)
        np.testing.assert_allclose(spot, (x, y), atol=max(size) / 9)


def test_videos_and_several_pictures():
    toy = path(48, 8, 2, 4)
    frames = tuple(Image.new("RGB", (30, 20), (k, 0, 0)) for k in range(2))
    images = [Image.new("RGB", (30, 20)), Image.new("RGB", (20, 40))]
    ready = toy.prepare([[Video(frames)], images, []])
    assert [len(run) for run in ready.runs] == [2 * 9 + 1, 36 + 1, 36 + 1]
    assert len(ready.inputs.pixels) == 4
    newline = ready.size - 1
    assert all(run.indices[-1, 0] == newline for run in ready.runs)
    shared = toy.prepare([images], slots=2)
    assert shared.room == (2 * 4 * 36, 4) and len(shared.inputs.pixels) == 2 * 5
