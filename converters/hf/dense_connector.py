"""Dense Connector (arXiv 2405.13800): which hidden states are read, and how they are joined.

The twin of `vfjax.architectures.combine`; what is joined goes on as LLaVA's or LLaVA-NeXT's.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, interpolate

from vfjax.architectures import Combine


def combine(config: Combine, states: Sequence[Tensor]) -> Tensor:
    """The joined features [n, s', d'] of the hidden states at `config.taps`."""
    by_tap = {tap: s[:, config.drop :] for tap, s in zip(config.taps, states, strict=True)}
    groups = ([by_tap[tap] for tap in group] for group in config.groups)
    first, *others = (group[0] if len(group) == 1 else sum(group) / len(group) for group in groups)
    if config.axis == "channels":
        joined = torch.cat([first, *others], dim=-1)
        return regridded(joined, config.side) if config.side else joined
    pooled = (avg_pool1d(x.transpose(1, 2), config.pool).transpose(1, 2) for x in others)
    return torch.cat([first, *pooled], dim=1)


def regridded(x: Tensor, side: int) -> Tensor:
    """Tokens [n, side * side, d] of [n, s * s, d], bilinearly, without antialiasing."""
    grid = math.isqrt(x.shape[1])
    maps = x.transpose(1, 2).unflatten(2, (grid, grid))
    made = interpolate(maps.float(), (side, side), mode="bilinear", align_corners=False)
    return made.flatten(2).transpose(1, 2).to(x.dtype)
