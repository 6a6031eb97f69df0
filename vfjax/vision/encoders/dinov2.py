"""DINOv2's vision transformer (arXiv 2304.07193), with and without registers (arXiv 2309.16588).

As transformers' Dinov2Model and Dinov2WithRegistersModel compute it.
"""

import dataclasses

from flax import nnx

from vfjax.vision.encoders.vit import ViT


@dataclasses.dataclass(frozen=True)
class DINOv2Config:
    """Sizes of a DINOv2 tower; the defaults are ViT-L/14 without registers.

    `image_size` is what the position table was trained for, `input_size` what is fed. `offset` is
    that of the table's interpolation: 0.1 in DINO's own code and in transformers before 4.46.
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
    offset: float = 0.0

    @property
    def prefix(self) -> int:
        """Class and register tokens before the patches."""
        return 1 + self.registers

    @property
    def tokens(self) -> int:
        """Patch tokens of one picture of `input_size`."""
        return (self.input_size // self.patch) ** 2

    def build(self, *, rngs: nnx.Rngs) -> ViT:
        return ViT(
            self,
            mask_token=self.mask_token,
            registers=self.registers,
            antialias=self.registers > 0,
            offset=self.offset,
            layer_scale=True,
            qkv_bias=self.qkv_bias,
            swiglu=self.swiglu,
            rngs=rngs,
        )
