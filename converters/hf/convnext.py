"""ConvNeXt (arXiv 2201.03545) under timm's names, as OpenCLIP's towers have them.

transformers' own computes the same under other names, and its `TimmBackbone` needs timm.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from converters.hf import encoders
from vfjax.vision.encoders import ConvNeXtConfig


class ConvNeXt(nn.Module):
    """Pixels -> feature maps of the stages; twin of `vfjax.vision.encoders.ConvNeXt`."""

    def __init__(self, config: ConvNeXtConfig):
        super().__init__()
        width = config.widths[0]
        self.stem = nn.Sequential(nn.Conv2d(3, width, 4, 4), ChannelNorm(width, config.eps))
        self.stages = nn.ModuleList(Stage(config, i) for i in range(len(config.depths)))

    def forward(self, pixels: Tensor, taps: Sequence[int]) -> list[Tensor]:
        """Maps [n, h', w', widths[k]] of the stages k in `taps`, of pixels float[n, h, w, 3]."""
        wanted = [tap % len(self.stages) for tap in taps]
        x = self.stem(pixels.movedim(-1, 1).to(self.stem[0].weight.dtype))
        maps = {}
        for k, stage in enumerate(self.stages[: max(wanted) + 1]):
            x = maps[k] = stage(x)
        return [maps[k].movedim(1, -1) for k in wanted]


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of maps [n, d, h, w]."""

    def __init__(self, width: int, eps: float):
        super().__init__(width, eps)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Stage(nn.Module):
    """Halves the map, except in stage 0, then its blocks; [n, d, h, w] -> [n, d', h', w']."""

    def __init__(self, config: ConvNeXtConfig, index: int):
        super().__init__()
        width = config.widths[index]
        self.downsample = nn.Sequential()
        if index:
            before = config.widths[index - 1]
            self.downsample.extend(
                [ChannelNorm(before, config.eps), nn.Conv2d(before, width, 2, 2)]
            )
        self.blocks = nn.Sequential(*(Block(config, width) for _ in range(config.depths[index])))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


class Block(nn.Module):
    """x + gamma * mlp(norm(conv_dw(x))), [n, d, h, w]."""

    def __init__(self, config: ConvNeXtConfig, width: int):
        super().__init__()
        self.conv_dw = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, config.eps)
        self.mlp = MLP(width, 4 * width, config.act)
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(self.norm(self.conv_dw(x).movedim(1, -1)))
        return x + (self.gamma * y).movedim(-1, 1)


class MLP(nn.Module):
    """Two dense layers around an activation, [..., width] -> [..., width]."""

    def __init__(self, width: int, hidden: int, act: str):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.act = ACT2FN[act]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


encoders.register(ConvNeXtConfig, encoders.Kind(ConvNeXt, ConvNeXt.__call__))
