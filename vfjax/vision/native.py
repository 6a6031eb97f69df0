"""Pictures and videos about their own size, in patches: what Qwen-VL's processors show.

transformers models/qwen2_vl: image_processing_qwen2_vl.py (smart_resize), image_processing_pil_,
video_processing_qwen2_vl.py. Pictures are resized by Pillow; videos, which transformers resizes by
torch alone, as torch resizes bytes.
"""

import functools
import math

import numpy as np
from PIL import Image

from vfjax.errors import InputError
from vfjax.vision.images import ImageSpec, normalised, preprocess
from vfjax.vision.resize import bicubic, lanczos

THINNEST = 200
"""A side may be so many times the other one."""


def fit(size: tuple[int, int], spec: ImageSpec) -> tuple[int, int]:
    """Width and height that a picture is resized to.

    Both are multiples of `spec.size`, the shape is about the same, and pixels are within
    `spec.pixels`, but for very thin pictures.

    Args:
        size: its width and height.
        spec: how it is prepared, "native".

    Raises:
        InputError: a picture thinner than `THINNEST` allows.
    """
    check_shape(size)
    unit, (least, most) = spec.size, spec.pixels
    near = [round(side / unit) * unit for side in size]
    area = math.prod(size)
    if math.prod(near) > most:
        shrink = math.sqrt(area / most)
        near = [max(unit, math.floor(side / shrink / unit) * unit) for side in size]
    elif math.prod(near) < least:
        grow = math.sqrt(least / area)
        near = [math.ceil(side * grow / unit) * unit for side in size]
    return near[0], near[1]


def check_shape(size: tuple[int, int]) -> None:
    """Raises InputError for a picture of a width and height thinner than `THINNEST` allows."""
    if max(size) > THINNEST * min(size):
        raise InputError(
            "image",
            found=f"a strip of {size[0]}x{size[1]} pixels",
            expected=f"sides of at most {THINNEST} to 1",
            fix="cut it, or pad it",
        )


def most_units(spec: ImageSpec) -> int:
    """Squares of `spec.size` that a picture has at most once it is resized."""
    least, most = (count / spec.size**2 for count in spec.pixels)
    grown = least + math.sqrt(least) * (math.sqrt(THINNEST) + 1) + 1  # both sides rounded up
    return math.floor(max(most, math.sqrt(THINNEST * most), grown))


def picture(image: Image.Image, spec: ImageSpec) -> np.ndarray:
    """A picture's values, float32[h, w, 3]; errors as of `fit`."""
    size = fit(image.size, spec)
    return normalised(np.asarray(image.resize(size, Image.Resampling(spec.resample))), spec)


def frame(image: Image.Image, size: tuple[int, int], spec: ImageSpec) -> np.ndarray:
    """A video frame's values, float32[h, w, 3], resized to `size`; see `resized`."""
    return normalised(resized(np.asarray(image), size, spec.resample), spec)


def view(image: Image.Image, spec: ImageSpec) -> np.ndarray:
    """A video frame's values, float32[s, s, 3], where each frame is one view of a fixed size.

    transformers resizes frames by torch alone; authors, whose way to convert is "drop", by Pillow.
    """
    if spec.convert == "drop":
        return preprocess(image, spec)
    return frame(image, (spec.size, spec.size), spec)


def resized(pixels: np.ndarray, size: tuple[int, int], resample: int) -> np.ndarray:
    """uint8[h, w, 3] to `size`, width and height, antialiased, as torch computes it on bytes.

    Args:
        pixels: uint8[h, w, 3].
        size: width and height.
        resample: 1 Lanczos, 3 bicubic.
    """
    assert resample in (1, 3)
    weights = lanczos if resample == 1 else functools.partial(bicubic, antialias=True)
    for axis, target in ((1, size[0]), (0, size[1])):
        if pixels.shape[axis] != target:
            pixels = _weighted(pixels, axis, weights(pixels.shape[axis], target))
    return pixels


def _weighted(pixels: np.ndarray, axis: int, weights: np.ndarray) -> np.ndarray:
    """Weighted sums of bytes along an axis.

    Weights are whole multiples of the least power of two with which they fit 16 bits
    (aten/src/ATen/native/cpu/UpSampleKernel.cpp, _compute_index_ranges_int16_weights). The sums
    are exact in float64, whose product is a fast one.
    """
    bits = 0
    while bits < 22 and int(0.5 + weights.max() * (1 << (bits + 1))) < 1 << 15:
        bits += 1
    scaled = weights * (1 << bits)
    whole = np.trunc(scaled + np.copysign(0.5, scaled))
    sums = np.tensordot(whole, pixels.astype(np.float64), axes=(1, axis))
    out = np.floor((sums + (1 << bits >> 1)) / (1 << bits)).clip(0, 255).astype(np.uint8)
    return np.moveaxis(out, 0, axis)


def patches(frames: np.ndarray, patch: int, time: int, merge: int) -> np.ndarray:
    """Patches of frames, those that are merged into one token one after another.

    Args:
        frames: float32[f, h, w, 3]; `time` divides f, `patch * merge` h and w.
        patch: side of one.
        time: frames of one.
        merge: patches a side of a token.

    Returns:
        float32[f / time, tokens, merge * merge, 3 * time * patch * patch], tokens row by row.
    """
    f, h, w, c = frames.shape
    rows, cols = h // (patch * merge), w // (patch * merge)
    x = frames.reshape(f // time, time, rows, merge, patch, cols, merge, patch, c)
    x = x.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
    return x.reshape(f // time, rows * cols, merge * merge, c * time * patch * patch)
