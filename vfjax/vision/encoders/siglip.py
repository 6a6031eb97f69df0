"""SigLIP's vision transformer (arXiv 2303.15343), as in transformers' SiglipVisionModel."""

import dataclasses

from flax import nnx

from vfjax.vision.encoders.vit import ViT


@dataclasses.dataclass(frozen=True)
class SigLIPConfig:
    """Sizes of a SigLIP tower; the defaults are SO400M/14 at 384 pixels.

    `batch_axis`: the position table has a first axis of 1, as in timm's checkpoints.
    """

    width: int = 1152
    layers: int = 27
    heads: int = 16
    mlp: int = 4304
    patch: int = 14
    image_size: int = 384
    act: str = "gelu_pytorch_tanh"
    eps: float = 1e-6
    batch_axis: bool = False

    prefix = 0  # patches only

    @property
    def tokens(self) -> int:
        """Patch tokens of one picture."""
        return (self.image_size // self.patch) ** 2

    def build(self, *, rngs: nnx.Rngs) -> ViT:
        return ViT(
            self, class_token=False, batch_axis=self.batch_axis, interpolate=False, rngs=rngs
        )
