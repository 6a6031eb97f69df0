"""AIMv2 (arXiv 2411.14402) as Ovis2 has it: RMS norms and gated MLPs, of one size of pictures.

As transformers' Ovis2VisionTransformer computes it.
"""

import dataclasses
from collections.abc import Sequence

import jax
from flax import nnx

from vfjax.nn.layers import GatedMLP, RMSNorm, param
from vfjax.vision.encoders.vit import Block, patch_conv, run

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class AIMv2Config:
    """Sizes of a tower; the defaults are Ovis2VisionConfig's."""

    width: int = 1024
    layers: int = 24
    heads: int = 8
    mlp: int = 2816
    patch: int = 14
    image_size: int = 224
    act: str = "silu"
    eps: float = 1e-5
    qkv_bias: bool = False
    mlp_bias: bool = False

    prefix = 0  # patches only

    @property
    def tokens(self) -> int:
        """Patch tokens of one picture."""
        return (self.image_size // self.patch) ** 2

    def build(self, *, rngs: nnx.Rngs) -> "AIMv2":
        return AIMv2(self, rngs=rngs)


class AIMv2(nnx.Module):
    """Pixels -> hidden states. Hidden state 0 is what the first block reads."""

    def __init__(self, config: AIMv2Config, *, rngs: nnx.Rngs):
        c = self.config = config
        self.patch = patch_conv(c.width, c.patch, bias=True, rngs=rngs)
        self.patch_norm = RMSNorm(c.width, c.eps, rngs=rngs)
        self.pos = param((c.tokens, c.width), (None, None), rngs=rngs)
        self.blocks = nnx.List(
            Block(
                c.width,
                c.heads,
                GatedMLP(c.width, c.mlp, c.act, bias=c.mlp_bias, rngs=rngs),
                c.eps,
                qkv_bias=c.qkv_bias,
                out_bias=c.qkv_bias,
                rms_norm=True,
                rngs=rngs,
            )
            for _ in range(c.layers)
        )
        self.norm = RMSNorm(c.width, c.eps, rngs=rngs)

    def __call__(self, pixels: Array, taps: Sequence[int], *, norm: bool = False) -> list[Array]:
        """Hidden states float[n, patches, width] at the taps.

        Args:
            pixels: float[n, image_size, image_size, 3], normalised.
            taps: see `vfjax.vision.encoders.vit.run`.
            norm: apply the final norm; transformers' `last_hidden_state` is tap -1 with it.

        Raises:
            InputError: a tap outside the hidden states.
        """
        patches = self.patch(pixels.astype(self.patch.kernel.dtype))
        x = self.patch_norm(patches.reshape(len(patches), -1, patches.shape[-1]))
        states = run(self.blocks, x + self.pos[...], taps)
        return [self.norm(s) for s in states] if norm else states
