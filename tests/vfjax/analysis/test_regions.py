"""Tokens' places: what a token sees bright is where its box is."""

import numpy as np
import pytest
from PIL import Image

from vfjax import analysis as look
from vfjax.architectures import (
    Architecture,
    Combine,
    Llava,
    LlavaNext,
    MiniGemini,
    MiningConfig,
    MLPConfig,
    ProjectorConfig,
    Slime,
    SliMEConfig,
)
from vfjax.model import BranchConfig
from vfjax.vision.encoders import CLIPConfig, ConvNeXtConfig
from vfjax.vision.images import ImageSpec

STATS = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "resample": 2}


def spec(size: int, resize: str, aspect: str, edge: int | None = None) -> ImageSpec:
    return ImageSpec(size, edge or size, resize, aspect, **STATS)


PINS = ((96, 48), (48, 96), (96, 96))
TILE = spec(48, "shortest", "crop")
CLIP = CLIPConfig(128, 1, 1, 16, patch=8, image_size=48)
PLAIN = ProjectorConfig(MLPConfig(128, 8))
SLIME = SliMEConfig(MLPConfig(128, 8), 128, grid=6, queries=36)
MINING = MiningConfig(MLPConfig(128, 8), 128, 16, grid=2, whole=True)
PATHS = {
    "pad": Llava(CLIP, PLAIN, spec(48, "shortest", "pad")),
    "pad, then crop": Llava(CLIP, PLAIN, spec(48, "shortest", "pad", 56)),
    "crop": Llava(CLIP, PLAIN, spec(48, "shortest", "crop", 54)),
    "squash": Llava(CLIP, PLAIN, spec(48, "squash", "crop")),
    "anyres": LlavaNext(CLIP, PLAIN, TILE, pinpoints=PINS, merge="spatial_unpad"),
    "anyres, flat": LlavaNext(CLIP, PLAIN, TILE, pinpoints=PINS, merge="flat"),
    "mini-gemini": MiniGemini(
        CLIP, MINING, spec(96, "shortest", "pad"), ConvNeXtConfig(image_size=96), size=48
    ),
    "slime": Slime(CLIP, SLIME, TILE),
}
SIZES = [(90, 60), (50, 120), (72, 72)]


def brightness(path: Architecture, picture: Image.Image, side: int = 6) -> np.ndarray:
    """Mean brightness of each token's own patch, in the order in which tokens are read."""
    ready = path.prepare([[picture]])
    pixels = ready.inputs.pixels.mean(axis=-1)
    step = pixels.shape[1] // side
    cells = pixels.reshape(len(pixels), side, step, side, step).mean(axis=(2, 4))
    if isinstance(path, MiniGemini):  # its connector reads the whole view, the last one, first
        cells = np.roll(cells, 1, axis=0)
    cells = cells.reshape(-1)
    if isinstance(path, Slime):
        tiles = cells[36:][ready.inputs.raster[0]]
        cells = np.concatenate([cells[:36], [0], tiles])
    cells = np.append(cells, 0)
    return cells[np.minimum(ready.runs[0].indices[:, 0], len(cells) - 1)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PATHS)
def test_bright_tokens_lie_on_the_bright_spot(name: str, size: tuple[int, int]) -> None:
    path = PATHS[name]
    branch = BranchConfig("x", path)
    rng = np.random.default_rng(0)
    patch, off = max(size) / 6, []  # of the coarsest view
    for _ in range(12):
        share = rng.uniform(0.3, 0.7, 2)
        pixels = np.zeros((size[1], size[0], 3), np.uint8)
        x, y = (int(a * b) for a, b in zip(share, size, strict=True))
        pixels[y - 3 : y + 3, x - 3 : x + 3] = 255
        picture = Image.fromarray(pixels)
        boxes, seen = look.regions(branch, picture), brightness(path, picture)
        assert len(boxes) == len(seen)
        heat = look.paint(seen, boxes, size)
        rows, cols = np.indices(heat.shape)
        middle = (heat * cols).sum() / heat.sum() + 0.5, (heat * rows).sum() / heat.sum() + 0.5
        off.append(np.array(middle) - (x, y))
    assert np.abs(off).max() < patch / 2 + 1  # a spot may lie at its patch's edge
    assert np.abs(np.mean(off, axis=0)).max() < patch / 5


def test_padding_is_undone() -> None:
    branch = BranchConfig("x", PATHS["pad"])
    boxes = look.regions(branch, Image.new("RGB", (60, 30)))  # padded above and below
    heat = look.paint(np.full(36, 1 / 36), boxes, (60, 30))
    np.testing.assert_allclose(heat, 1 / 3600, rtol=1e-9)  # half of it lay on the picture
    one = np.zeros(36)
    one[2 * 6 + 1] = 1  # its row and column of patches: 20 to 30 of 60 down, 10 to 20 across
    heat = look.paint(one, boxes, (60, 30))
    assert heat[5:15, 10:20].sum() == pytest.approx(1) and heat.sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("combine", "tokens", "first", "placed"),
    [
        (Combine(drop=0), 37, 1, 36),
        (Combine(((-1,), (0,), (1,)), axis="tokens", pool=8), 44, 0, 36),
        (Combine(drop=2), 35, 0, 0),
    ],
)
def test_tokens_without_a_place_are_left_out(
    combine: Combine, tokens: int, first: int, placed: int
) -> None:
    connector = ProjectorConfig(MLPConfig(128, 8), combine)
    path = Llava(CLIP, connector, spec(48, "shortest", "pad"))
    boxes = look.regions(BranchConfig("x", path), Image.new("RGB", (48, 48)))
    known = ~np.isnan(boxes).any(axis=1)
    assert known.tolist() == [first <= i < first + placed for i in range(tokens)]


def test_pointing() -> None:
    heat = np.full((6, 6), 0.01)
    heat[0:2, 4:6] = 0.1
    hit, share = look.inside(heat, (2 / 3, 0, 1, 1 / 3))
    assert hit and share == pytest.approx(0.4 / (0.4 + 0.32))
    hit, share = look.inside(heat, (0, 0, 1 / 3, 1 / 3))
    assert not hit and share == pytest.approx(0.04 / 0.72)
