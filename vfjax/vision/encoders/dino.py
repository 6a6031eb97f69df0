"""DINO's vision transformer (arXiv 2104.14294), as transformers' ViTModel computes it."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from vfjax.nn.layers import layer_norm, param
from vfjax.vision.encoders.vit import MLP, Block, patch_conv, run
from vfjax.vision.resize import bicubic

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class DINOConfig:
    """Sizes of a DINO tower; the defaults are ViT-B/16.

    `image_size` is what the position table was trained for, `input_size` what is fed.
    """

    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp: int = 3072
    patch: int = 16
    image_size: int = 224
    input_size: int = 224
    act: str = "gelu"
    eps: float = 1e-12
    qkv_bias: bool = True

    prefix = 1  # the class token stands before the patches

    @property
    def tokens(self) -> int:
        """Patch tokens of one picture of `input_size`."""
        return (self.input_size // self.patch) ** 2

    def build(self, *, rngs: nnx.Rngs) -> "DINO":
        return DINO(self, rngs=rngs)


class DINO(nnx.Module):
    """Pixels of any size -> hidden states; the position table is interpolated to the grid."""

    def __init__(self, config: DINOConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        self.patch = patch_conv(c.width, c.patch, bias=True, rngs=rngs)
        self.cls = param((1, 1, c.width), (None, None, None), rngs=rngs)
        trained = (c.image_size // c.patch) ** 2
        self.pos = param((1, trained + 1, c.width), (None, None, None), rngs=rngs)
        self.blocks = nnx.List(
            Block(
                c.width,
                c.heads,
                MLP(c.width, c.mlp, c.act, rngs=rngs),
                c.eps,
                qkv_bias=c.qkv_bias,
                rngs=rngs,
            )
            for _ in range(c.layers)
        )
        self.norm = layer_norm(c.width, c.eps, rngs=rngs)

    def __call__(self, pixels: Array, taps: Sequence[int], *, norm: bool = False) -> list[Array]:
        """Hidden states float[n, 1 + patches, width] at the taps, class token first.

        Args:
            pixels: float[n, h, w, 3], normalised; h and w are cut to multiples of the patch.
            taps: see `vfjax.vision.encoders.vit.run`.
            norm: apply the final norm (transformers' `last_hidden_state` is tap -1 with it).

        Raises:
            InputError: a tap outside the hidden states.
        """
        patches = self.patch(pixels.astype(self.patch.kernel.dtype))
        n, h, w, d = patches.shape
        cls = jnp.broadcast_to(self.cls[...], (n, 1, d))
        x = jnp.concatenate([cls, patches.reshape(n, -1, d)], axis=1) + self.positions(h, w)
        states = run(self.blocks, x, taps)
        return [self.norm(s) for s in states] if norm else states

    def positions(self, h: int, w: int) -> Array:
        """The position table float[1, 1 + h * w, width] for a grid of h x w patches.

        Interpolated as ViTModel does with `interpolate_pos_encoding=True`.
        """
        table = self.pos[...]
        side = self.config.image_size // self.config.patch
        if (h, w) == (side, side):
            return table
        rows, cols = (jnp.asarray(bicubic(side, k, antialias=False), jnp.float32) for k in (h, w))
        grid = table[0, 1:].reshape(side, side, -1).astype(jnp.float32)
        grid = jnp.einsum("yi,xj,ijd->yxd", rows, cols, grid, precision="highest")
        grid = grid.reshape(1, h * w, -1).astype(table.dtype)
        return jnp.concatenate([table[:, :1], grid], axis=1)
