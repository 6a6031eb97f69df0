"""ConvNeXt (arXiv 2201.03545) as OpenCLIP trains it: the stages of timm's `convnext_*` models."""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from vfjax.nn.layers import MLP, layer_norm, param
from vfjax.vision.encoders.vit import patch_conv, resolve_taps

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class ConvNeXtConfig:
    """Sizes of a ConvNeXt; the defaults are ConvNeXt-L.

    `depths` and `widths` are the blocks and channels of each stage. `image_size` is the side of the
    pictures that are fed; the weights fit any.
    """

    depths: tuple[int, ...] = (3, 3, 27, 3)
    widths: tuple[int, ...] = (192, 384, 768, 1536)
    image_size: int = 320
    act: str = "gelu"
    eps: float = 1e-6

    @property
    def layers(self) -> int:
        """The last stage that can be tapped; they count from 0."""
        return len(self.depths) - 1

    @property
    def width(self) -> int:
        """Channels of all stages."""
        return sum(self.widths)

    def build(self, *, rngs: nnx.Rngs) -> "ConvNeXt":
        return ConvNeXt(self, rngs=rngs)


class ConvNeXt(nnx.Module):
    """Pixels -> feature maps of the stages. The norm and head after them are not part of it."""

    def __init__(self, config: ConvNeXtConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        self.stem = patch_conv(c.widths[0], 4, bias=True, rngs=rngs)
        self.stem_norm = layer_norm(c.widths[0], c.eps, rngs=rngs)
        self.stages = nnx.List(Stage(c, i, rngs=rngs) for i in range(len(c.depths)))

    def __call__(self, pixels: Array, taps: Sequence[int]) -> list[Array]:
        """Feature maps float[n, h // 4 // 2**k, w // 4 // 2**k, widths[k]] of the stages k.

        Args:
            pixels: float[n, h, w, 3], normalised; rows and columns beyond the strides are cut.
            taps: stages 0, 1, ..., in any order; negative counts from the end. Nothing is computed
                past the last one.

        Raises:
            InputError: no tap, or one outside the stages.
        """
        wanted = resolve_taps(taps, self.config.layers)
        x = self.stem_norm(self.stem(pixels.astype(self.stem.kernel.dtype)))
        maps = {}
        for k in range(max(wanted) + 1):
            x = maps[k] = self.stages[k](x)
        return [maps[k] for k in wanted]


class Stage(nnx.Module):
    """Halves the map, except in stage 0, then its blocks; [n, h, w, d] -> [n, h', w', d']."""

    def __init__(self, config: ConvNeXtConfig, index: int, *, rngs: nnx.Rngs):
        c, width = config, config.widths[index]
        self.halves = index > 0
        if self.halves:
            self.norm = layer_norm(c.widths[index - 1], c.eps, rngs=rngs)
            self.halve = nnx.Conv(
                c.widths[index - 1],
                width,
                (2, 2),
                strides=2,
                padding="VALID",
                kernel_metadata={"axes": (None, None, None, "embed")},
                bias_metadata={"axes": ("embed",)},
                rngs=rngs,
            )
        self.blocks = nnx.List(
            Block(width, c.act, c.eps, rngs=rngs) for _ in range(c.depths[index])
        )

    def __call__(self, x: Array) -> Array:
        if self.halves:
            x = self.halve(self.norm(x))
        for block in self.blocks:
            x = block(x)
        return x


class Block(nnx.Module):
    """x + gamma * mlp(norm(conv(x))), the convolution of each channel by itself; [n, h, w, d]."""

    def __init__(self, width: int, act: str, eps: float, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(
            width,
            width,
            (7, 7),
            padding=3,
            feature_group_count=width,
            kernel_metadata={"axes": (None, None, None, "embed")},
            bias_metadata={"axes": ("embed",)},
            rngs=rngs,
        )
        self.norm = layer_norm(width, eps, rngs=rngs)
        self.mlp = MLP(width, 4 * width, act, rngs=rngs)
        self.gamma = param((width,), (None,), rngs=rngs)

    def __call__(self, x: Array) -> Array:
        kernel, bias = self.conv.kernel[...], self.conv.bias
        assert bias is not None
        y = depthwise(x.astype(kernel.dtype), kernel) + bias[...]
        return x + self.gamma[...] * self.mlp(self.norm(y))


def depthwise(x: Array, kernel: Array) -> Array:
    """Each channel's convolution with its own kernel, of the same size, zeros around the map.

    On CPU as a sum of shifted maps: XLA's own is ten to twenty times slower there (jax 0.10).

    Args:
        x: [n, h, w, d].
        kernel: [k, k, 1, d], k odd.

    Returns:
        [n, h, w, d] in x's dtype.
    """
    return jax.lax.platform_dependent(x, kernel, cpu=_shifted, default=convolved)


def convolved(x: Array, kernel: Array) -> Array:
    """What `depthwise` computes, by XLA's grouped convolution."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        "SAME",
        feature_group_count=x.shape[-1],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _shifted(x: Array, kernel: Array) -> Array:
    (height, width), side = x.shape[1:3], kernel.shape[0]
    edge = (side // 2, side // 2)
    around = jnp.pad(x.astype(jnp.float32), ((0, 0), edge, edge, (0, 0)))
    out = jnp.zeros(x.shape, jnp.float32)
    for i, j in itertools.product(range(side), repeat=2):
        out += around[:, i : i + height, j : j + width] * kernel[i, j, 0]
    return out.astype(x.dtype)
