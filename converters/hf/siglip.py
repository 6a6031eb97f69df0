"""SigLIP (arXiv 2303.15343): transformers' own, and one under timm's names for OpenCLIP's towers.

They compute the same; timm has queries, keys and values in one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import SiglipVisionConfig, SiglipVisionModel

from converters.hf import encoders
from converters.hf.convnext import MLP
from vfjax.vision.encoders import SigLIPConfig


class SigLIP(nn.Module):
    """Pixels -> hidden states; twin of `vfjax.vision.encoders.siglip`."""

    def __init__(self, config: SigLIPConfig):
        super().__init__()
        side = config.patch
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, config.width, side, side)})
        self.pos_embed = nn.Parameter(torch.zeros(1, config.tokens, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, config.eps)

    def forward(self, pixels: Tensor, taps: Sequence[int]) -> list[Tensor]:
        """Hidden states [n, s, width] at the taps, of pixels float[n, h, w, 3]."""
        pixels = pixels.movedim(-1, 1).to(self.pos_embed.dtype)
        x = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2) + self.pos_embed
        states = [x]
        for block in self.blocks[: max(range(len(self.blocks) + 1)[tap] for tap in taps)]:
            states.append(block(states[-1]))
        return [states[range(len(self.blocks) + 1)[tap]] for tap in taps]


class Block(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(self, config: SigLIPConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, config.eps)
        self.attn = Attention(config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width, config.eps)
        self.mlp = MLP(config.width, config.mlp, config.act)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    """Self-attention, [n, s, width] -> [n, s, width]."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def build(config: SigLIPConfig) -> nn.Module:
    """The module of the checkpoint's names; timm's table of positions has an axis more."""
    if config.batch_axis:
        return SigLIP(config)
    keys = {**encoders.vit(config), "intermediate_size": config.mlp, "vision_use_head": False}
    return SiglipVisionModel(SiglipVisionConfig(**keys))


def tap(module: nn.Module, pixels: Tensor, taps: Sequence[int]) -> list[Tensor]:
    """See `encoders.Tap`."""
    return (
        module(pixels, taps)
        if isinstance(module, SigLIP)
        else encoders.hidden(module, pixels, taps)
    )


encoders.register(SigLIPConfig, encoders.Kind(build, tap))
