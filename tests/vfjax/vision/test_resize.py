"""Resizes told apart: Pillow's for pictures, torch's for maps and tables, and JAX's for neither."""

import jax
import numpy as np
import pytest
import torch
from PIL import Image

from vfjax.vision.resize import bicubic, bilinear

SIZES = [(24, 12), (27, 12), (12, 24), (16, 37), (37, 16), (7, 7), (5, 1)]


def torch_resize(x: np.ndarray, size: int, mode: str, *, antialias: bool = False) -> np.ndarray:
    maps = torch.from_numpy(x)[None, None]
    return torch.nn.functional.interpolate(
        maps, (size, size), mode=mode, align_corners=False, antialias=antialias
    )[0, 0].numpy()


def grid(size: int) -> np.ndarray:
    return np.random.default_rng(size).normal(size=(size, size))


@pytest.mark.parametrize(("source", "target"), SIZES)
def test_bilinear_is_torchs(source: int, target: int):
    x, weights = grid(source), bilinear(source, target)
    np.testing.assert_allclose(weights @ x @ weights.T, torch_resize(x, target, "bilinear"))


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(("source", "target"), SIZES)
def test_bicubic_is_torchs(source: int, target: int, antialias: bool):
    x, weights = grid(source), bicubic(source, target, antialias=antialias)
    expected = torch_resize(x, target, "bicubic", antialias=antialias)
    np.testing.assert_allclose(weights @ x @ weights.T, expected, atol=1e-12)


def test_jaxs_bilinear_is_another_when_it_shrinks():
    """It widens the kernel unless told not to; then it is torch's."""
    x = grid(27).astype(np.float32)
    expected = torch_resize(x, 12, "bilinear")
    found = np.asarray(jax.image.resize(x, (12, 12), "linear"))
    assert np.abs(found - expected).max() > 0.1
    plain = np.asarray(jax.image.resize(x, (12, 12), "linear", antialias=False))
    np.testing.assert_allclose(plain, expected, atol=1e-5)


def test_jaxs_bicubic_is_another():
    """It has a = -0.5 and renormalised weights at borders; torch has a = -0.75 and clamps."""
    x = grid(16).astype(np.float32)
    found = np.asarray(jax.image.resize(x, (37, 37), "cubic"))
    assert np.abs(found - torch_resize(x, 37, "bicubic")).max() > 0.05


def test_pillows_bicubic_is_another():
    """Pillow widens the kernel and rounds to 8 bits twice; torch without antialiasing does not."""
    x = np.random.default_rng(0).integers(0, 256, (60, 60), np.uint8)
    pillow = np.asarray(Image.fromarray(x).resize((24, 24), Image.Resampling.BICUBIC), np.float64)
    torchs = torch_resize(x.astype(np.float64), 24, "bicubic")
    assert np.abs(pillow - torchs).max() > 20
    smooth = torch_resize(x.astype(np.float64), 24, "bicubic", antialias=True)
    assert 0.25 < np.abs(pillow - smooth).max() < 2
