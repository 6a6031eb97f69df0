"""The key-value cache of a decoder, passed in and out of every call."""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from vfjax.nn.layers import quantize

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Rows:
    """Keys or values as int8, a scale for each token and head; a little over half of bfloat16.

    The largest of a head's features becomes 127.

    Attributes:
        rows: int8[b, g, h, s] of keys, int8[b, g, s, h] of values.
        scale: float32, 1 in place of h.
    """

    rows: Array
    scale: Array

    @classmethod
    def of(cls, x: Array, axis: int) -> Self:
        """Keys or values whose features are along an axis, quantised."""
        return cls(*quantize(x, axis))

    def wide(self, dtype: DTypeLike) -> Array:
        """Keys or values in a dtype."""
        return (self.rows * self.scale).astype(dtype)


Rows = Array | Int8Rows
KEY_FEATURES, VALUE_FEATURES = 2, 3
"""Axes."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens read so far.

    All rows write to the same slots; rows of unequal length differ in `mask` and `length`, so left
    and right padding, and mixtures, decode alike. Keys and values lie as the products read them: no
    step turns them, and a TPU keeps its own layout from call to call.

    Attributes:
        k: one [b, g, h, s] of keys a layer.
        v: one [b, g, s, h] of values a layer.
        mask: bool[b, s], True at slots that hold a real token.
        index: int32[], the next free slot.
        length: int32[b], the next token's position: real tokens so far, unless positions are given.
        new: that nothing was read into it, known to the compiler: what is read first attends to
            itself alone, in place of all slots.
    """

    k: tuple[Rows, ...]
    v: tuple[Rows, ...]
    mask: Array
    index: Array
    length: Array
    new: bool = dataclasses.field(metadata={"static": True})

    @classmethod
    def empty(
        cls,
        b: int,
        size: int,
        layers: int,
        heads: int,
        dim: int,
        dtype: DTypeLike,
        *,
        int8: bool = False,
    ) -> Self:
        """A cache of `size` slots for `b` rows, with `heads` key heads of `dim` in each layer.

        Args:
            b: rows.
            size: slots.
            layers: of the decoder.
            heads: of keys.
            dim: of a head.
            dtype: of keys and values.
            int8: keeps them as `Int8Rows`.
        """

        def none(shape: tuple[int, int], axis: int) -> Rows:
            zeros = jnp.zeros((b, heads, *shape), dtype)
            return Int8Rows.of(zeros, axis) if int8 else zeros

        k = tuple(none((dim, size), KEY_FEATURES) for _ in range(layers))
        v = tuple(none((size, dim), VALUE_FEATURES) for _ in range(layers))
        return cls(k, v, jnp.zeros((b, size), bool), jnp.int32(0), jnp.zeros(b, jnp.int32), True)

    def extend(self, mask: Array, positions: Array | None = None) -> tuple[Self, Array, Array]:
        """Makes room for t more tokens a row.

        Args:
            mask: bool[b, t], True at real tokens.
            positions: int32[p, b, t] of the new tokens; None counts on. The next token's is one
                after the last of them.

        Returns:
            The cache with the new slots counted in (keys and values not yet written), the
            positions int32[p, b, t] of the new tokens, and what each may look at, bool[b, t, s];
            of a new cache bool[b, t, t], the first slots.
        """
        t, s = mask.shape[1], self.mask.shape[1]
        if positions is None:
            counted = self.length[:, None] + jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
            positions = counted[None]
            length = self.length + mask.sum(axis=1, dtype=jnp.int32)
        else:
            length = jnp.maximum(self.length, jnp.where(mask, positions + 1, 0).max(axis=(0, 2)))
        seen = jax.lax.dynamic_update_slice(self.mask, mask, (0, self.index))
        first = t if self.new else s
        causal = jnp.arange(first)[None] <= self.index + jnp.arange(t)[:, None]
        cache = dataclasses.replace(
            self, mask=seen, index=self.index + t, length=length.astype(jnp.int32), new=False
        )
        return cache, positions.astype(jnp.int32), seen[:, None, :first] & causal[None]

    def write(
        self, layer: int, k: Array, v: Array, seen: int
    ) -> tuple[tuple[Rows, Rows], tuple[Array, Array]]:
        """Puts new keys and values into the slots last made.

        Args:
            layer: whose.
            k: [b, g, h, t] new keys.
            v: [b, g, t, h] new values.
            seen: slots that the new tokens may look at, from the first; t of a cache that was new.

        Returns:
            The layer's whole keys and values, to be kept; and those of the slots seen, in k's
            dtype: of a cache that was new the very k and v.
        """
        at = self.index - v.shape[2]
        kept = (
            _put(self.k[layer], k, (0, 0, 0, at), KEY_FEATURES),
            _put(self.v[layer], v, (0, 0, at, 0), VALUE_FEATURES),
        )
        if seen == v.shape[2]:
            return kept, (k, v)
        return kept, (wide(kept[0], k.dtype), wide(kept[1], v.dtype))


def wide(rows: Rows, dtype: DTypeLike) -> Array:
    """Keys or values in a dtype."""
    return rows.wide(dtype) if isinstance(rows, Int8Rows) else rows.astype(dtype)


def _put(old: Rows, new: Array, at: tuple[ArrayLike, ...], features: int) -> Rows:
    if isinstance(old, Int8Rows):
        narrow = Int8Rows.of(new, features)
        return Int8Rows(_update(old.rows, narrow.rows, at), _update(old.scale, narrow.scale, at))
    return _update(old, new, at)


def _update(old: Array, new: Array, at: tuple[ArrayLike, ...]) -> Array:
    return jax.lax.dynamic_update_slice(old, new.astype(old.dtype), at)
