"""Which hidden states a connector reads, and how it joins them.

One description serves LLaVA (one layer), Dense Connector's STI, SCI and DCI (arXiv 2405.13800,
section 3) and other multi-layer features: groups of layers, each averaged, joined on channels or on
tokens.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from vfjax.vision.resize import bilinear, resized

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Combine:
    """Groups of hidden states -> features.

    Attributes:
        groups: taps of each group; a group of several is averaged. The first is the plain feature.
        axis: what the groups are joined on.
        pool: tokens of all groups but the first that are averaged into one; a remainder is dropped
            (torch AvgPool1d). Only for joining on tokens.
        drop: leading tokens (class, registers) that are left out.
        side: tokens a side that the joined features are resized to, bilinearly, before they are
            projected (the paper's efficient variant: 12 for 24, 144 tokens); 0 keeps them. Only for
            joining on channels.
    """

    groups: tuple[tuple[int, ...], ...] = ((-2,),)
    axis: Literal["channels", "tokens"] = "channels"
    pool: int = 1
    drop: int = 1
    side: int = 0

    @property
    def taps(self) -> tuple[int, ...]:
        """All hidden states that are read, each once."""
        return tuple(dict.fromkeys(tap for group in self.groups for tap in group))

    def width(self, width: int) -> int:
        """Channels of the features of an encoder of `width`."""
        return width * (len(self.groups) if self.axis == "channels" else 1)

    def tokens(self, tokens: int) -> int:
        """Tokens of the features, of `tokens` in a hidden state after `drop`."""
        if self.side:
            return self.side**2
        more = (len(self.groups) - 1) * (tokens // self.pool) if self.axis == "tokens" else 0
        return tokens + more

    def __call__(self, states: Sequence[Array]) -> tuple[Array, Array]:
        """The plain feature [n, s, d] and the joined ones, of the hidden states at `taps`."""
        by_tap = {tap: s[:, self.drop :] for tap, s in zip(self.taps, states, strict=True)}
        first, *others = (mean([by_tap[t] for t in group]) for group in self.groups)
        if self.axis == "channels":
            joined = jnp.concatenate([first, *others], axis=-1)
            return first, regridded(joined, self.side) if self.side else joined
        return first, jnp.concatenate([first, *(pooled(x, self.pool) for x in others)], axis=1)


def mean(arrays: Sequence[Array]) -> Array:
    """Sum, then division, as upstream rounds it."""
    total = arrays[0]
    for x in arrays[1:]:
        total = total + x
    return total / len(arrays) if len(arrays) > 1 else total


def pooled(x: Array, k: int) -> Array:
    """Means [n, s // k, d] of every k tokens of [n, s, d]; a remainder is dropped."""
    n, s, d = x.shape
    return x[:, : s // k * k].reshape(n, s // k, k, d).mean(axis=2)


def regridded(x: Array, side: int) -> Array:
    """Tokens [n, side * side, d] of [n, s * s, d]; torch's bilinear, without antialiasing."""
    n, tokens, d = x.shape
    grid = math.isqrt(tokens)
    weights = bilinear(grid, side)
    maps = resized(x.reshape(n, grid, grid, d), weights, weights, precision="highest")
    return maps.reshape(n, side * side, d)
