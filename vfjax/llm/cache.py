"""The key-value cache of a decoder, passed in and out of every call."""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens read so far.

    All rows write to the same slots; rows of unequal length differ in `mask` and `length`, so left
    and right padding, and mixtures, decode alike.

    Attributes:
        k: one [b, s, g, h] array of keys a layer.
        v: one [b, s, g, h] array of values a layer.
        mask: bool[b, s], True at slots that hold a real token.
        index: int32[], the next free slot.
        length: int32[b], the next token's position: real tokens so far, unless positions are given.
        new: that nothing was read into it, known to the compiler: what is read first attends to
            itself alone, in place of all slots.
    """

    k: tuple[Array, ...]
    v: tuple[Array, ...]
    mask: Array
    index: Array
    length: Array
    new: bool = dataclasses.field(metadata={"static": True})

    @classmethod
    def empty(cls, b: int, size: int, layers: int, heads: int, dim: int, dtype: jnp.dtype) -> Self:
        """A cache of `size` slots for `b` rows, with `heads` key heads of `dim` in each layer."""
        k, v = (
            tuple(jnp.zeros((b, size, heads, dim), dtype) for _ in range(layers)) for _ in range(2)
        )
        return cls(k, v, jnp.zeros((b, size), bool), jnp.int32(0), jnp.zeros(b, jnp.int32), True)

    def extend(self, mask: Array, positions: Array | None = None) -> tuple[Self, Array, Array]:
        """Makes room for t more tokens a row.

        Args:
            mask: bool[b, t], True at real tokens.
            positions: int32[b, t] of the new tokens; None counts on. The next token's is one after
                the last of them.

        Returns:
            The cache with the new slots counted in (keys and values not yet written), the
            positions int32[b, t] of the new tokens, and what each may look at, bool[b, t, s]; of a
            new cache bool[b, t, t], the first slots.
        """
        t, s = mask.shape[1], self.mask.shape[1]
        if positions is None:
            positions = self.length[:, None] + jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
            length = self.length + mask.sum(axis=1, dtype=jnp.int32)
        else:
            length = jnp.maximum(self.length, jnp.where(mask, positions + 1, 0).max(axis=1))
        seen = jax.lax.dynamic_update_slice(self.mask, mask, (0, self.index))
        first = t if self.new else s
        causal = jnp.arange(first)[None] <= self.index + jnp.arange(t)[:, None]
        cache = dataclasses.replace(
            self, mask=seen, index=self.index + t, length=length.astype(jnp.int32), new=False
        )
        return cache, positions.astype(jnp.int32), seen[:, None, :first] & causal[None]

    def write(self, layer: int, k: Array, v: Array) -> tuple[Array, Array]:
        """The layer's whole keys and values with [b, t, g, h] new ones in the slots last made."""
        at = (0, self.index - k.shape[1], 0, 0)
        return (
            jax.lax.dynamic_update_slice(self.k[layer], k.astype(self.k[layer].dtype), at),
            jax.lax.dynamic_update_slice(self.v[layer], v.astype(self.v[layer].dtype), at),
        )
