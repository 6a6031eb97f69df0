"""Vision encoders: pixels -> hidden states of the layers asked for.

An encoder's config is a frozen dataclass with `prefix` (tokens before the patches), `tokens` (patch
tokens of one picture) and `build(rngs=)`; the encoder is called with `(pixels, taps)`. ConvNeXt has
maps in place of tokens, so its config has neither `prefix` nor `tokens`; nor has Qwen-VL's, which
reads pictures of any size.
"""

from vfjax.vision.encoders.aimv2 import AIMv2Config
from vfjax.vision.encoders.clip import CLIPConfig
from vfjax.vision.encoders.convnext import ConvNeXt, ConvNeXtConfig
from vfjax.vision.encoders.dino import DINOConfig
from vfjax.vision.encoders.dinov2 import DINOv2Config
from vfjax.vision.encoders.dinov3 import DINOv3, DINOv3Config
from vfjax.vision.encoders.idefics import IdeficsConfig
from vfjax.vision.encoders.internvit import InternViT, InternViTConfig
from vfjax.vision.encoders.qwen_vit import QwenViT, QwenViTConfig
from vfjax.vision.encoders.siglip import SigLIPConfig
from vfjax.vision.encoders.vit import ViT

__all__ = [
    "AIMv2Config",
    "CLIPConfig",
    "ConvNeXt",
    "ConvNeXtConfig",
    "DINOConfig",
    "DINOv2Config",
    "DINOv3",
    "DINOv3Config",
    "IdeficsConfig",
    "InternViT",
    "InternViTConfig",
    "QwenViT",
    "QwenViTConfig",
    "SigLIPConfig",
    "ViT",
]
