"""Boxes of visual tokens in a picture: preprocessing undone, on the host.

Boxes are (left, top, right, bottom) in shares of the picture's width and height. What reaches
beyond 0 to 1 is padding.
"""

import math

import numpy as np

from vfjax.vision.images import ImageSpec

Box = tuple[float, float, float, float]
Size = tuple[int, int]

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
NOWHERE = np.full((1, 4), np.nan)
"""The box of a token without a place of its own."""


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


def canvas(size: tuple[int, int], grid: tuple[int, int], tile: int) -> Box:
    """A grid's canvas around a picture that is scaled to fit and centred (`tiling.resize_pad`)."""
    outer = grid[0] * tile, grid[1] * tile
    scale = min(outer[0] / size[0], outer[1] / size[1])
    inner = [min(math.ceil(x * scale), c) for x, c in zip(size, outer, strict=True)]
    left, top = ((c - x) // 2 for c, x in zip(outer, inner, strict=True))
    right, bottom = outer[0] - left, outer[1] - top
    return -left / inner[0], -top / inner[1], right / inner[0], bottom / inner[1]


def within(outer: Box, inner: Box) -> Box:
    """The box that is `inner` in shares of `outer`."""
    left, top, right, bottom = outer
    wide, high = right - left, bottom - top
    return (
        left + inner[0] * wide,
        top + inner[1] * high,
        left + inner[2] * wide,
        top + inner[3] * high,
    )


def cut(box: Box, grid: tuple[int, int]) -> list[Box]:
    """A box cut into (columns, rows), row by row."""
    cols, rows = grid
    parts = [(c / cols, r / rows) for r in range(rows) for c in range(cols)]
    return [within(box, (x, y, x + 1 / cols, y + 1 / rows)) for x, y in parts]


def cells(box: Box, count: int, plain: int | None = None) -> np.ndarray:
    """A box's tokens [count, 4]; if `count` is no square, the first `plain` of them, if that is."""
    out = np.full((count, 4), np.nan)
    for known in (count, plain or 0):
        side = math.isqrt(known)
        if known and side * side == known and known <= count:
            out[:known] = cut(box, (side, side))
            break
    return out
