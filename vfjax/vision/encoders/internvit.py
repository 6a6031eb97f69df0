"""InternViT (arXiv 2312.14238).

As its authors' InternVisionModel and transformers' InternVLVisionModel compute it.
"""

import dataclasses
from collections.abc import Sequence

import jax
from flax import nnx

from vfjax.vision.encoders.vit import ViT

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class InternViTConfig:
    """Sizes of an InternViT; the defaults are InternViT-300M-448px.

    `image_size` is what the position table was trained for, `input_size` what is fed. `qk_norm` is
    the epsilon of the norms of queries and keys, None without. `final_norm`: the last hidden state
    is normed where it is tapped as -1, the port's `last_hidden_state`; not by its number.
    """

    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp: int = 4096
    patch: int = 14
    image_size: int = 448
    input_size: int = 448
    act: str = "gelu"
    eps: float = 1e-6
    qkv_bias: bool = True
    qk_norm: float | None = None
    rms_norm: bool = False
    final_norm: bool = False

    prefix = 1  # the class token

    @property
    def tokens(self) -> int:
        """Patch tokens of one picture of `input_size`."""
        return (self.input_size // self.patch) ** 2

    def build(self, *, rngs: nnx.Rngs) -> "InternViT":
        return InternViT(
            self,
            layer_scale=True,
            qkv_bias=self.qkv_bias,
            qk_norm=self.qk_norm,
            rms_norm=self.rms_norm,
            final_norm=self.final_norm,
            rngs=rngs,
        )


class InternViT(ViT):
    """Pixels -> hidden states; the class token stands first."""

    config: InternViTConfig

    def __call__(self, pixels: Array, taps: Sequence[int], *, norm: bool = False) -> list[Array]:
        """See `ViT.__call__`; with `final_norm` tap -1 is always normed."""
        states = super().__call__(pixels, taps, norm=norm and self.config.final_norm)
        if norm or not self.config.final_norm:
            return states
        return [self.norm(s) if tap == -1 else s for tap, s in zip(taps, states, strict=True)]
