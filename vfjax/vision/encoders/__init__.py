"""Vision encoders: pixels -> hidden states of the layers asked for.

An encoder's config is a frozen dataclass with `prefix` (tokens before the patches), `tokens` (patch
tokens of one picture) and `build(rngs=)`; the encoder is called with `(pixels, taps)`. ConvNeXt has
maps in place of tokens, so its config has neither `prefix` nor `tokens`.
"""

from vfjax.vision.encoders.clip import CLIP, CLIPConfig
from vfjax.vision.encoders.convnext import ConvNeXt, ConvNeXtConfig
from vfjax.vision.encoders.dino import DINO, DINOConfig
from vfjax.vision.encoders.dinov2 import DINOv2, DINOv2Config
from vfjax.vision.encoders.dinov3 import DINOv3, DINOv3Config
from vfjax.vision.encoders.siglip import SigLIP, SigLIPConfig

__all__ = [
    "CLIP",
    "CLIPConfig",
    "ConvNeXt",
    "ConvNeXtConfig",
    "DINO",
    "DINOConfig",
    "DINOv2",
    "DINOv2Config",
    "DINOv3",
    "DINOv3Config",
    "SigLIP",
    "SigLIPConfig",
]
