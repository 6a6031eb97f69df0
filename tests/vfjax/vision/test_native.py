"""Sizes, pixels and patches of native-resolution pictures, against transformers and torch."""

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from vfjax import InputError
from vfjax.vision import native
from vfjax.vision.images import ImageSpec

ZERO, ONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


def spec(unit: int, least: int, most: int, **options) -> ImageSpec:
    return ImageSpec(unit, unit, "native", "crop", ZERO, ONE, pixels=(least, most), **options)


@settings(max_examples=200)
@given(
    st.tuples(st.integers(1, 3000), st.integers(1, 3000)).filter(lambda s: max(s) <= 200 * min(s)),
    st.sampled_from([(28, 3136, 1003520), (28, 3136, 12845056), (8, 256, 640), (32, 65536, 65536)]),
)
def test_sizes_are_transformers(size, limits):
    unit, least, most = limits
    made = spec(unit, least, most)
    high, wide = smart_resize(size[1], size[0], unit, least, most)
    assert native.fit(size, made) == (wide, high)
    assert wide * high <= native.most_units(made) * unit**2


def test_a_strip_is_refused():
    with pytest.raises(InputError, match="a strip of 9x1801 pixels, expected sides of at most 200"):
        native.fit((9, 1801), spec(28, 3136, 1003520))


@pytest.mark.parametrize(("resample", "mode"), [(1, "lanczos"), (3, "bicubic")])
@pytest.mark.parametrize("size", [(56, 28), (644, 476), (84, 56), (112, 140), (504, 280)])
def test_frames_are_resized_as_torch_resizes_bytes(size, resample, mode):
    """Torchvision's resize of a uint8 tensor, antialiased, is this call of torch."""
    rng = np.random.default_rng(size)
    pixels = rng.integers(0, 256, (240, 330, 3), dtype=np.uint8)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()
    expected = torch.nn.functional.interpolate(tensor, size[::-1], mode=mode, antialias=True)
    how = spec(28, 1, 1, rescale=1.0, resample=resample)
    found = native.frame(Image.fromarray(pixels), size, how)
    np.testing.assert_array_equal(found, expected[0].permute(1, 2, 0).numpy())


def test_patches_are_transformers():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (50, 33, 3), dtype=np.uint8))
    theirs = transformers.Qwen2VLImageProcessorPil(
        patch_size=4, size={"shortest_edge": 256, "longest_edge": 2048}
    )
    mean, std = tuple(theirs.image_mean), tuple(theirs.image_std)
    made = ImageSpec(8, 8, "native", "crop", mean, std, pixels=(256, 2048))
    values = native.picture(image, made)
    found = native.patches(np.stack([values] * 2), 4, 2, 2)
    expected = theirs(image, return_tensors="np").pixel_values
    np.testing.assert_allclose(found.reshape(expected.shape), expected, atol=1e-6)
