"""Where visual tokens lie in the photograph: preprocessing undone, attention painted there.

Boxes are (left, top, right, bottom) in shares of the picture's width and height. What reaches
beyond 0 to 1 is padding, where nothing is painted.
"""

import math
from typing import Any

import numpy as np
from PIL import Image

from vfjax.model import BranchConfig
from vfjax.views import Anyres, Sliced, TwoScales
from vfjax.vision import tiling
from vfjax.vision.images import ImageSpec

Box = tuple[float, float, float, float]

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


def regions(branch: BranchConfig, picture: Image.Image) -> np.ndarray:
    """The box of each visual token of a picture, in the order in which the LLM reads them.

    Args:
        branch: whose tokens.
        picture: RGB.

    Returns:
        float64[k, 4]; NaN for tokens without a place of their own: newlines, separators, Dense
        Connector's pooled ones, all of a view whose tokens are no square.
    """
    memory = _memory(branch, picture.size)
    (order,) = branch.views([picture]).indices
    known = np.full((int(order.max()) + 1, 4), np.nan)
    known[: len(memory)] = memory[: len(known)]
    return known[order]


def _memory(branch: BranchConfig, size: tuple[int, int]) -> np.ndarray:
    """Boxes of a picture's tokens as the branch stores them."""
    views: Any = branch.views
    if isinstance(views, Anyres):
        tile = views.images.size
        grid = tiling.anyres_grid(size, views.pinpoints, tile)
        inner = frame(views.images, (tile, tile))
        shown = [WHOLE, *_cut(_canvas(size, grid, tile), grid)]
        return np.concatenate([_cells(_within(box, inner), views.side**2) for box in shown])
    if isinstance(views, Sliced):
        tile = views.images.size
        grid = tiling.adaptive_grid(size, tile)
        inner = frame(views.images, (tile, tile))
        tiles = _cut(_canvas(size, grid, tile), (grid[0] * views.side, grid[1] * views.side))
        whole = _cells(_within(WHOLE, inner), views.tokens)
        return np.concatenate([whole, np.full((1, 4), np.nan), tiles])
    if isinstance(views, TwoScales):
        seen = frame(views.images, size)
        shown = [*_cut(seen, (views.grid, views.grid)), *([seen] if views.whole else [])]
        return np.concatenate([_cells(box, views.tokens) for box in shown])
    seen, plain = frame(views.images, size), getattr(branch.encoder, "tokens", views.tokens)
    prefix = getattr(branch.encoder, "prefix", 0)
    if views.tokens == prefix + plain:  # the class token and registers are read too
        return np.concatenate([np.full((prefix, 4), np.nan), _cells(seen, plain)])
    return _cells(seen, views.tokens, plain)


def frame(images: ImageSpec, size: tuple[int, int]) -> Box:
    """The part of a picture that the encoder's square input shows, as `preprocess` cuts it.

    Args:
        images: how the picture is prepared.
        size: its width and height.
    """
    width, height = size
    if images.aspect == "pad":
        side = max(size)
        scale, border = side / images.edge, (images.edge - images.size) // 2
        left, top = (border * scale - (side - x) // 2 for x in size)
        right, bottom = (x + images.size * scale for x in (left, top))
        return left / width, top / height, right / width, bottom / height
    short = min(size)
    if images.resize == "squash":
        across = down = images.edge
    else:
        across, down = (images.edge if x == short else int(images.edge * x / short) for x in size)
    left, top = ((x - images.size) // 2 for x in (across, down))
    right, bottom = left + images.size, top + images.size
    return left / across, top / down, right / across, bottom / down


def _canvas(size: tuple[int, int], grid: tuple[int, int], tile: int) -> Box:
    """A grid's canvas around a picture that is scaled to fit and centred (`tiling.resize_pad`)."""
    canvas = grid[0] * tile, grid[1] * tile
    scale = min(canvas[0] / size[0], canvas[1] / size[1])
    inner = [min(math.ceil(x * scale), c) for x, c in zip(size, canvas, strict=True)]
    left, top = ((c - x) // 2 for c, x in zip(canvas, inner, strict=True))
    right, bottom = canvas[0] - left, canvas[1] - top
    return -left / inner[0], -top / inner[1], right / inner[0], bottom / inner[1]


def _within(outer: Box, inner: Box) -> Box:
    """The box that is `inner` in shares of `outer`."""
    left, top, right, bottom = outer
    wide, high = right - left, bottom - top
    return (
        left + inner[0] * wide,
        top + inner[1] * high,
        left + inner[2] * wide,
        top + inner[3] * high,
    )


def _cut(box: Box, grid: tuple[int, int]) -> list[Box]:
    """A box cut into (columns, rows), row by row."""
    cols, rows = grid
    parts = [(c / cols, r / rows) for r in range(rows) for c in range(cols)]
    return [_within(box, (x, y, x + 1 / cols, y + 1 / rows)) for x, y in parts]


def _cells(box: Box, count: int, plain: int | None = None) -> np.ndarray:
    """A box's tokens [count, 4]; if `count` is no square, the first `plain` of them, if that is."""
    out = np.full((count, 4), np.nan)
    for known in (count, plain or 0):
        side = math.isqrt(known)
        if known and side * side == known and known <= count:
            out[:known] = _cut(box, (side, side))
            break
    return out


def paint(weights: np.ndarray, boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Each token's weight spread evenly over its box.

    Args:
        weights: float[k].
        boxes: float[k, 4] of `regions`.
        size: width and height of the map in pixels.

    Returns:
        float64[h, w]; its sum is that of the weights, without what lies on padding and without
        tokens that have no place.
    """
    placed = ~np.isnan(boxes[:, 0])
    boxes, weights = boxes[placed], np.asarray(weights, np.float64)[placed]
    across = _covered(boxes[:, 0], boxes[:, 2], size[0])
    down = _covered(boxes[:, 1], boxes[:, 3], size[1])
    return (down * weights[:, None]).T @ across


def _covered(start: np.ndarray, stop: np.ndarray, count: int) -> np.ndarray:
    """Share of each interval [k] that lies in each of `count` pixels, [k, count]."""
    edges = np.arange(count + 1) / count
    low = np.maximum(start[:, None], edges[:-1])
    high = np.minimum(stop[:, None], edges[1:])
    return np.maximum(high - low, 0) / (stop - start)[:, None]


def inside(heat: np.ndarray, box: Box) -> tuple[bool, float]:
    """Whether a map points into a box, and which share of it lies there.

    The pointing game (arXiv 1608.00507), and its variant by energy (arXiv 1910.01279).

    Args:
        heat: float[h, w], not negative.
        box: in shares of the picture.
    """
    height, width = heat.shape
    left, top, right, bottom = box
    rows = slice(round(top * height), round(bottom * height))
    cols = slice(round(left * width), round(right * width))
    mask = np.zeros(heat.shape, bool)
    mask[rows, cols] = True
    peak = np.isclose(heat, heat.max(), rtol=1e-9)  # all pixels of the token
    return bool((peak & mask).sum() * 2 > peak.sum()), float(heat[mask].sum() / heat.sum())
