"""Where visual tokens lie in the photograph: attention painted there.

Boxes are those of `vfjax.architectures.boxes`; nothing is painted on padding.
"""

import numpy as np
from PIL import Image

from vfjax.architectures.boxes import Box
from vfjax.model import BranchConfig


def regions(branch: BranchConfig, picture: Image.Image) -> np.ndarray:
    """The box of each visual token of a picture, in the order in which the LLM reads them.

    Args:
        branch: whose tokens.
        picture: RGB.

    Returns:
        float64[k, 4]; see `vfjax.architectures.Architecture.regions`.
    """
    return branch.architecture.regions(picture.size)


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
