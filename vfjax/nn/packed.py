"""Attention within the segments of one long sequence, which holds pictures of many sizes."""

import jax
import jax.numpy as jnp

from vfjax.nn.layers import attention

Array = jax.Array

ROWS = 256
"""Queries that are computed at once, where there are more: their scores alone are held."""


def packed(q: Array, k: Array, v: Array, starts: Array, reach: int) -> Array:
    """Attention of tokens to those of their own segment.

    Args:
        q: [n, heads, h] queries; `ROWS` divides n, or n is less than twice that.
        k: [n, heads, h] keys.
        v: [n, heads, h] values.
        starts: int32[n], the number of the first token of each one's segment, which is in one
            piece.
        reach: tokens from the first that any `ROWS` queries in a row see to the last, at most.

    Returns:
        [n, heads, h] in q's dtype; softmax in float32.
    """
    n = len(q)
    if n < 2 * ROWS:
        see = starts[:, None] == starts[None]
        return attention(q[None], k[None], v[None], see[None])[0]
    reach = min(reach, n)

    @jax.checkpoint
    def some(at: Array) -> Array:
        mine = jax.lax.dynamic_slice_in_dim(starts, at, ROWS)
        first = jnp.minimum(mine[0], n - reach)
        keys, values, theirs = (
            jax.lax.dynamic_slice_in_dim(x, first, reach) for x in (k, v, starts)
        )
        queries = jax.lax.dynamic_slice_in_dim(q, at, ROWS)
        see = mine[:, None] == theirs[None]
        return attention(queries[None], keys[None], values[None], see[None])[0]

    return jax.lax.map(some, jnp.arange(0, n, ROWS)).reshape(q.shape)
