"""Pixel shuffle: blocks of patches become tokens, joined on channels and projected.

InternVL's `pixel_shuffle` (arXiv 2404.16821) with a norm, Idefics3's connector (arXiv 2408.12637)
without.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
from flax import nnx

from vfjax.architectures.base import VisualTokens, all_of
from vfjax.architectures.combine import Combine
from vfjax.architectures.mlp import MLPConfig, Projecting
from vfjax.nn.layers import layer_norm

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class PixelShuffleConfig(Projecting):
    """Each block of `factor` x `factor` patches becomes a token, which is projected.

    Attributes:
        projector: reads the channels of a block.
        combine: the hidden state that is read, and whether its class token is dropped.
        factor: patches a side of a block.
        normed: whether tokens are normed before they are projected.
        transposed: rows and columns of tokens are exchanged, as by InternVL's `ps_version` "v1".
    """

    projector: MLPConfig
    combine: Combine = Combine(((-1,),))
    factor: int = 2
    normed: bool = True
    transposed: bool = False

    @property
    def channels(self) -> dict[str, tuple[int, int]]:
        """See `Connector`; channels of one patch."""
        return {"encoder": (1, self.projector.din // self.factor**2)}

    def build(self, *, rngs: nnx.Rngs) -> "PixelShuffle":
        return PixelShuffle(self, rngs=rngs)


class PixelShuffle(nnx.Module):
    """Hidden states -> visual tokens."""

    def __init__(self, config: PixelShuffleConfig, *, rngs: nnx.Rngs):
        self.config = config
        if config.normed:
            self.norm = layer_norm(config.projector.din, 1e-5, rngs=rngs)
        self.projector = config.projector.build(rngs=rngs)

    def __call__(self, states: Mapping[str, Sequence[Array]]) -> VisualTokens:
        """The memory.

        Args:
            states: "encoder": one hidden state [n, s, d], perhaps with a class token before it.

        Returns:
            Tokens [n * s', D], s' = s / factor^2; stages vision_features [n, s, d],
            connector_features [n, s', d * factor^2], image_features [n, s', D].
        """
        c = self.config
        plain, _ = c.combine(states["encoder"])
        blocks = joined_patches(plain, c.factor)
        if c.transposed:
            n, tokens, d = blocks.shape
            side = math.isqrt(tokens)
            blocks = blocks.reshape(n, side, side, d).swapaxes(1, 2).reshape(n, tokens, d)
        stages = {"vision_features": plain, "connector_features": blocks}
        return all_of(self.projector(self.norm(blocks) if c.normed else blocks), stages)


def joined_patches(x: Array, factor: int) -> Array:
    """Channels of each factor x factor patches, row by row: [n, s, d] -> [n, s', d * factor^2].

    Of JAX, numpy or torch.
    """
    n, tokens, d = x.shape
    side = math.isqrt(tokens) // factor
    y = x.reshape(n, side, factor, side, factor, d).swapaxes(2, 3)
    return y.reshape(n, side * side, factor * factor * d)
