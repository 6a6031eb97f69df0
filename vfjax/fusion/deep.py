"""What visual tokens are given within the LLM, behind some of its layers."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vfjax.architectures.base import Branch, VisualTokens

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Asking:
    """A branch whose tokens ask for more of the picture within the LLM (Cambrian's samplers).

    Attributes:
        branch: whose `Branch.within` answers.
        seen: what it reads, see `VisualTokens.seen`.
        at: int32[b, t] which of these tokens stands here, -1: none of them.
    """

    branch: Branch
    seen: tuple[Array, ...]
    at: Array

    def __call__(self, layer: int, x: Array) -> Array:
        """Hidden states [b, t, d] after a layer, those of the branch's tokens moved on."""
        if layer not in self.branch.layers:
            return x
        flat = self.at.reshape(-1)
        count = len(self.seen[0])
        place = jnp.zeros(count, jnp.int32)  # of a token that the LLM does not read: any
        place = place.at[jnp.where(flat < 0, count, flat)].set(jnp.arange(flat.size), mode="drop")
        found = self.branch.within(layer, x.reshape(-1, x.shape[-1])[place], self.seen)
        return x + jnp.where((self.at >= 0)[..., None], found[self.at], 0).astype(x.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Deep:
    """What all visual tokens of a batch are given within the LLM.

    Attributes:
        added: [k, b, t, d], added to what the first k layers give (DeepStack, arXiv 2406.04334);
            None: nothing.
        asking: the branches whose tokens ask.
    """

    added: Array | None = None
    asking: tuple[Asking, ...] = ()

    def __call__(self, layer: int, x: Array) -> Array:
        """Hidden states [b, t, d] after a layer, with what the tokens are given there."""
        if self.added is not None and layer < len(self.added):
            x = x + self.added[layer].astype(x.dtype)
        for asking in self.asking:
            x = asking(layer, x)
        return x

    def ordered(self, order: Array, mask: Array) -> "Deep":
        """Of the tokens int32[b, s] `order` alone, in their order; bool[b, s] `mask`: are read."""
        added = self.added
        if added is not None:
            added = jnp.take_along_axis(added, order[None, ..., None], axis=2)
        moved = [
            jnp.where(mask, jnp.take_along_axis(each.at, order, axis=1), -1) for each in self.asking
        ]
        asking = zip(self.asking, moved, strict=True)
        return Deep(added, tuple(dataclasses.replace(each, at=at) for each, at in asking))


def deep(
    visual: Array,
    mask: Array,
    memories: Sequence[VisualTokens],
    branches: Sequence[Any],  # a family's own module
) -> Deep | None:
    """What a batch's visual tokens are given within the LLM; None: nothing.

    Args:
        visual: int32[b, t] of the batch.
        mask: bool[b, t], where something is read.
        memories: one a branch.
        branches: theirs.
    """
    layers = max((0 if m.deep is None else len(m.deep) for m in memories), default=0)
    added, asking, first = None, [], 0
    if layers:
        every = jnp.concatenate([_padded(memory, layers) for memory in memories], axis=1)
        seen = (mask & (visual >= 0))[..., None]
        added = jnp.where(seen, every[:, jnp.maximum(visual, 0)], 0)
    for memory, branch in zip(memories, branches, strict=True):
        if memory.seen is not None:
            own = visual - first
            count = len(memory.seen[0])
            at = jnp.where(mask & (own >= 0) & (own < count), own, -1)
            asking.append(Asking(branch, memory.seen, at))
        first += len(memory.values)
    return Deep(added, tuple(asking)) if layers or asking else None


def _padded(memory: VisualTokens, layers: int) -> Array:
    """[layers, m, d]; what others add to more layers is zero in these."""
    zeros = jnp.zeros((layers, *memory.values.shape), memory.values.dtype)
    return zeros if memory.deep is None else zeros.at[: len(memory.deep)].set(memory.deep)
