"""torch's resizes, by weights along each axis; `jax.image.resize` has other borders and kernels."""

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def resized(x: Array, rows: np.ndarray, cols: np.ndarray, *, precision: str | None = None) -> Array:
    """[n, h, w, c] -> [n, H, W, c] in x's dtype, by weights [H, h] and [W, w], in float32."""
    down, across = (jnp.asarray(weights, jnp.float32) for weights in (rows, cols))
    y = jnp.einsum("yh,nhwc->nywc", down, x.astype(jnp.float32), precision=precision)
    y = jnp.einsum("xw,nywc->nyxc", across, y, precision=precision)
    return y.astype(x.dtype)


def bilinear(source: int, target: int) -> np.ndarray:
    """Weights float64[target, source] of torch's bilinear resize along one axis.

    `interpolate(mode="bilinear", align_corners=False)`: half-pixel centres, no antialiasing.
    """
    centre = ((np.arange(target) + 0.5) * source / target - 0.5).clip(0, source - 1)
    low = np.floor(centre).astype(int)
    weights = np.zeros((target, source))
    rows = np.arange(target)
    np.add.at(weights, (rows, low), 1 - (centre - low))
    np.add.at(weights, (rows, (low + 1).clip(max=source - 1)), centre - low)
    return weights


def bicubic(
    source: int, target: int, *, antialias: bool = False, offset: float = 0.0
) -> np.ndarray:
    """Weights float64[target, source] of torch's bicubic resize along one axis.

    torch's `interpolate(mode="bicubic", align_corners=False)` uses a = -0.75 with clamped borders;
    with `antialias=True` a = -0.5, a support widened when shrinking, and weights renormalised at
    the borders. `jax.image.resize` has only the latter kind. With a `scale_factor` of
    (target + offset) / source torch steps by that, not by the sizes.
    """
    scale = source / (target + offset)
    stretch = max(scale, 1.0) if antialias else 1.0
    a = -0.5 if antialias else -0.75
    centre = (np.arange(target) + 0.5) * scale - 0.5
    reach = int(np.ceil(2 * stretch))
    taps = np.floor(centre)[:, None].astype(int) + np.arange(-reach, reach + 2)[None]
    x = np.abs((taps - centre[:, None]) / stretch)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    kernel = np.where(x <= 1, near, np.where(x < 2, far, 0.0))
    if antialias:
        kernel = np.where((taps >= 0) & (taps < source), kernel, 0.0)
        kernel /= kernel.sum(axis=1, keepdims=True)
    weights = np.zeros((target, source))
    np.add.at(weights, (np.arange(target)[:, None], taps.clip(0, source - 1)), kernel)
    return weights


def lanczos(source: int, target: int) -> np.ndarray:
    """Weights float64[target, source] of torch's antialiased Lanczos resize along one axis."""
    scale = source / target
    stretch = max(scale, 1.0)
    at = (np.arange(source) - ((np.arange(target) + 0.5) * scale - 0.5)[:, None]) / stretch
    weights = np.where(np.abs(at) < 3, np.sinc(at) * np.sinc(at / 3), 0.0)
    return weights / weights.sum(axis=1, keepdims=True)
