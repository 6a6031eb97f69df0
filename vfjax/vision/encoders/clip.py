"""CLIP's vision transformer (arXiv 2103.00020), as transformers' CLIPVisionModel computes it."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from vfjax.nn.layers import layer_norm, param
from vfjax.vision.encoders.vit import MLP, Block, patch_conv, run

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Sizes of a CLIP tower; the defaults are ViT-L/14 at 336 pixels."""

    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp: int = 4096
    patch: int = 14
    image_size: int = 336
    act: str = "quick_gelu"
    eps: float = 1e-5

    prefix = 1  # the class token stands before the patches

    @property
    def tokens(self) -> int:
        """Patch tokens of one picture."""
        return (self.image_size // self.patch) ** 2

    def build(self, *, rngs: nnx.Rngs) -> "CLIP":
        return CLIP(self, rngs=rngs)


class CLIP(nnx.Module):
    """Pixels -> hidden states. Hidden state 0 is the output of the norm before the blocks."""

    def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        self.patch = patch_conv(c.width, c.patch, bias=False, rngs=rngs)
        self.cls = param((c.width,), (None,), rngs=rngs)
        self.pos = param((c.tokens + 1, c.width), (None, None), rngs=rngs)
        self.pre_norm = layer_norm(c.width, c.eps, rngs=rngs)
        self.blocks = nnx.List(
            Block(c.width, c.heads, MLP(c.width, c.mlp, c.act, rngs=rngs), c.eps, rngs=rngs)
            for _ in range(c.layers)
        )
        self.norm = layer_norm(c.width, c.eps, rngs=rngs)

    def __call__(self, pixels: Array, taps: Sequence[int], *, norm: bool = False) -> list[Array]:
        """Hidden states float[n, 1 + tokens, width] at the taps, class token first.

        Args:
            pixels: float[n, image_size, image_size, 3], normalised.
            taps: see `vfjax.vision.encoders.vit.run`.
            norm: apply the final norm (which transformers applies to the class token alone).

        Raises:
            InputError: a tap outside the hidden states.
        """
        x = self.patch(pixels.astype(self.patch.kernel.dtype)).reshape(
            len(pixels), -1, self.config.width
        )
        cls = jnp.broadcast_to(self.cls[...], (len(x), 1, x.shape[-1]))
        x = self.pre_norm(jnp.concatenate([cls, x], axis=1) + self.pos[...])
        states = run(self.blocks, x, taps)
        return [self.norm(s) for s in states] if norm else states
