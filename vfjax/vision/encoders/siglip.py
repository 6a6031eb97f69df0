"""SigLIP's vision transformer (arXiv 2303.15343), as in transformers' SiglipVisionModel."""

import dataclasses
from collections.abc import Sequence

import jax
from flax import nnx

from vfjax.nn.layers import layer_norm, param
from vfjax.vision.encoders.vit import MLP, Block, patch_conv, run

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class SigLIPConfig:
    """Sizes of a SigLIP tower; the defaults are SO400M/14 at 384 pixels."""

    width: int = 1152
    layers: int = 27
    heads: int = 16
    mlp: int = 4304
    patch: int = 14
    image_size: int = 384
    act: str = "gelu_pytorch_tanh"
    eps: float = 1e-6

    prefix = 0  # patches only

    @property
    def tokens(self) -> int:
        """Patch tokens of one picture."""
        return (self.image_size // self.patch) ** 2

    def build(self, *, rngs: nnx.Rngs) -> "SigLIP":
        return SigLIP(self, rngs=rngs)


class SigLIP(nnx.Module):
    """Pixels -> hidden states. The pooling head is not part of it: no MLLM reads it."""

    def __init__(self, config: SigLIPConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        self.patch = patch_conv(c.width, c.patch, bias=True, rngs=rngs)
        self.pos = param((c.tokens, c.width), (None, None), rngs=rngs)
        self.blocks = nnx.List(
            Block(c.width, c.heads, MLP(c.width, c.mlp, c.act, rngs=rngs), c.eps, rngs=rngs)
            for _ in range(c.layers)
        )
        self.norm = layer_norm(c.width, c.eps, rngs=rngs)

    def __call__(self, pixels: Array, taps: Sequence[int], *, norm: bool = False) -> list[Array]:
        """Hidden states float[n, tokens, width] at the taps.

        Args:
            pixels: float[n, image_size, image_size, 3], normalised.
            taps: see `vfjax.vision.encoders.vit.run`.
            norm: apply the final norm (transformers' `last_hidden_state` is tap -1 with it).

        Raises:
            InputError: a tap outside the hidden states.
        """
        x = (
            self.patch(pixels.astype(self.patch.kernel.dtype)).reshape(
                len(pixels), -1, self.config.width
            )
            + self.pos[...]
        )
        states = run(self.blocks, x, taps)
        return [self.norm(s) for s in states] if norm else states
