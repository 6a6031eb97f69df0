"""Idefics3's and SmolVLM's vision transformer: SigLIP's on a grid of any size.

As transformers' Idefics3VisionTransformer and SmolVLMVisionTransformer, which are the same; after
NaViT (arXiv 2307.06304).
"""

import dataclasses

import jax
import numpy as np
from flax import nnx

from vfjax.vision.encoders.vit import ViT

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class IdeficsConfig:
    """Sizes of a tower; the defaults are transformers'.

    `image_size` is what the position table was trained for, `input_size` what is fed.
    """

    width: int = 1152
    layers: int = 12
    heads: int = 16
    mlp: int = 3072
    patch: int = 32
    image_size: int = 224
    input_size: int = 224
    act: str = "gelu_pytorch_tanh"
    eps: float = 1e-6

    prefix = 0  # patches only

    @property
    def tokens(self) -> int:
        """Patch tokens of one picture."""
        return (self.input_size // self.patch) ** 2

    def build(self, *, rngs: nnx.Rngs) -> "IdeficsViT":
        return IdeficsViT(self, class_token=False, batch_axis=False, rngs=rngs)


class IdeficsViT(ViT):
    """A ViT whose patches have the table's positions at their share of a picture's sides."""

    def positions(self, h: int, w: int) -> Array:
        """float[h * w, width] for a grid of h x w patches."""
        side = self.config.image_size // self.config.patch
        rows, cols = (shares(side, k) for k in (h, w))
        return self.pos[...][(rows[:, None] * side + cols).reshape(-1)]


def shares(side: int, patches: int) -> np.ndarray:
    """Rows of a table of `side` rows for so many patches, int64[patches].

    Patch i has the row in which i / patches of the whole lies. Both are rounded as torch rounds
    them (of `arange` eight values at a time, to float32), so that of some sizes, as 25 of 25, a row
    is left out and the one before it stands twice.
    """
    number = np.arange(int(np.ceil((1 - 1 / side) / (1 / side))))
    edges = (1 / side + number * (1 / side)).astype(np.float32)
    first = (1 / side + number // 8 * 8 * (1 / side)).astype(np.float32).astype(np.float64)
    whole = len(number) // 16 * 16
    edges[:whole] = (first + number % 8 * (1 / side)).astype(np.float32)[:whole]
    at = np.arange(patches, dtype=np.float32) * (np.float32(1) / np.float32(patches))
    return np.searchsorted(edges, np.minimum(at, np.float32(1 - 1e-6)), side="right")
