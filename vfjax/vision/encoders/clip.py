"""CLIP's vision transformer (arXiv 2103.00020), as transformers' CLIPVisionModel computes it."""

import dataclasses

from flax import nnx

from vfjax.vision.encoders.vit import ViT


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

    def build(self, *, rngs: nnx.Rngs) -> ViT:
        return ViT(
            self,
            patch_bias=False,
            batch_axis=False,
            interpolate=False,
            pre_norm=True,
            rngs=rngs,
        )
