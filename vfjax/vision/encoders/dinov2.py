"""DINOv2's vision transformer (arXiv 2304.07193), with and without registers (arXiv 2309.16588).

As transformers' Dinov2Model and Dinov2WithRegistersModel compute it.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from vfjax.nn.layers import layer_norm, param
from vfjax.vision.encoders.vit import MLP, Block, SwiGLU, patch_conv, run
from vfjax.vision.resize import bicubic

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class DINOv2Config:
    """Sizes of a DINOv2 tower; the defaults are ViT-L/14 without registers.

    `image_size` is what the position table was trained for, `input_size` what is fed.
    """

    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp: int = 4096
    patch: int = 14
    image_size: int = 518
    input_size: int = 224
    act: str = "gelu"
    swiglu: bool = False
    registers: int = 0
    qkv_bias: bool = True
    mask_token: bool = True
    eps: float = 1e-6

    @property
    def prefix(self) -> int:
        """Class and register tokens before the patches."""
        return 1 + self.registers

    @property
    def tokens(self) -> int:
        """Patch tokens of one picture of `input_size`."""
        return (self.input_size // self.patch) ** 2

    def build(self, *, rngs: nnx.Rngs) -> "DINOv2":
        return DINOv2(self, rngs=rngs)


class DINOv2(nnx.Module):
    """Pixels of any size -> hidden states; the position table is interpolated to the grid."""

    def __init__(self, config: DINOv2Config, *, rngs: nnx.Rngs):
        c = self.config = config
        self.patch = patch_conv(c.width, c.patch, bias=True, rngs=rngs)
        self.cls = param((1, 1, c.width), (None, None, None), rngs=rngs)
        if c.mask_token:
            self.mask = param((1, c.width), (None, None), rngs=rngs)  # for masked training only
        if c.registers:
            self.registers = param((1, c.registers, c.width), (None, None, None), rngs=rngs)
        trained = (c.image_size // c.patch) ** 2
        self.pos = param((1, trained + 1, c.width), (None, None, None), rngs=rngs)
        self.blocks = nnx.List(
            Block(
                c.width,
                c.heads,
                self._mlp(rngs),
                c.eps,
                layer_scale=True,
                qkv_bias=c.qkv_bias,
                rngs=rngs,
            )
            for _ in range(c.layers)
        )
        self.norm = layer_norm(c.width, c.eps, rngs=rngs)

    def _mlp(self, rngs: nnx.Rngs) -> nnx.Module:
        c = self.config
        if c.swiglu:
            return SwiGLU(c.width, c.mlp, rngs=rngs)
        return MLP(c.width, c.mlp, c.act, rngs=rngs)

    def __call__(self, pixels: Array, taps: Sequence[int], *, norm: bool = False) -> list[Array]:
        """Hidden states float[n, 1 + registers + patches, width] at the taps.

        Args:
            pixels: float[n, h, w, 3], normalised; h and w are cut to multiples of the patch.
            taps: see `vfjax.vision.encoders.vit.run`.
            norm: apply the final norm (transformers' `last_hidden_state` is tap -1 with it).

        Raises:
            InputError: a tap outside the hidden states.
        """
        patches = self.patch(pixels.astype(self.patch.kernel.dtype))
        n, h, w, d = patches.shape
        x = jnp.concatenate([self._expand(self.cls, n), patches.reshape(n, -1, d)], axis=1)
        x = x + self.positions(h, w)
        if self.config.registers:  # after the positions: registers have none
            x = jnp.concatenate([x[:, :1], self._expand(self.registers, n), x[:, 1:]], axis=1)
        states = run(self.blocks, x, taps)
        return [self.norm(s) for s in states] if norm else states

    def _expand(self, token: nnx.Param, n: int) -> Array:
        return jnp.broadcast_to(token[...], (n, *token.shape[1:]))

    def positions(self, h: int, w: int) -> Array:
        """The position table float[1, 1 + h * w, width] for a grid of h x w patches."""
        table = self.pos[...]
        side = self.config.image_size // self.config.patch
        if (h, w) == (side, side):
            return table
        rows, cols = (
            jnp.asarray(bicubic(side, k, antialias=self.config.registers > 0), jnp.float32)
            for k in (h, w)
        )
        grid = table[0, 1:].reshape(side, side, -1).astype(jnp.float32)
        grid = jnp.einsum("yi,xj,ijd->yxd", rows, cols, grid, precision="highest")
        grid = grid.reshape(1, h * w, -1).astype(table.dtype)
        return jnp.concatenate([table[:, :1], grid], axis=1)
