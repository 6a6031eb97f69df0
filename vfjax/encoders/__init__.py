"""Vision encoders: pixels -> hidden states of the layers asked for.

An encoder's config is a frozen dataclass with `prefix` (tokens before the patches), `tokens` (patch
tokens of one picture) and `build(rngs=)`; the encoder is called with `(pixels, taps)`.
"""

from vfjax.encoders.clip import CLIP, CLIPConfig
from vfjax.encoders.dinov2 import DINOv2, DINOv2Config
from vfjax.encoders.siglip import SigLIP, SigLIPConfig

__all__ = ["CLIP", "CLIPConfig", "DINOv2", "DINOv2Config", "SigLIP", "SigLIPConfig"]
