"""DINO's vision transformer (arXiv 2104.14294), as transformers' ViTModel computes it."""

import dataclasses

from flax import nnx

from vfjax.vision.encoders.vit import ViT


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

    def build(self, *, rngs: nnx.Rngs) -> ViT:
        return ViT(self, qkv_bias=self.qkv_bias, rngs=rngs)
