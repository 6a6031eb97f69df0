"""A look at an LLM's attention while it computes what it always does."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from vfjax.llm.cache import Rows, wide
from vfjax.llm.llama import Attention, Llama, Step

Array = jax.Array
Show = Callable[[Attention, Array, Array, Step], object]
"""Called with an attention, its input [b, t, d], its keys [b, g, h, s], rotated, and the step."""


class _Watched:
    """Stands in a block for its attention."""

    def __init__(self, inner: Attention, show: Show):
        self.inner, self.show = inner, show

    def __call__(self, x: Array, layer: int, step: Step) -> tuple[Array, tuple[Rows, Rows]]:
        out, kept = self.inner(x, layer, step)
        self.show(self.inner, x, wide(kept[0], x.dtype), step)
        return out, kept


def watched(llm: Llama, show: Show, depth: int | None = None) -> Llama:
    """Another LLM of the same arrays that shows each layer's attention.

    Args:
        llm: whose.
        show: see `Show`; under `jax.jit` once, while it traces.
        depth: it has the first layers alone, as many as this at most; None: all.
    """
    other: Any = jax.tree.map(lambda x: x, llm)
    other.blocks = nnx.List(list(other.blocks)[:depth])
    for block in other.blocks:
        block.attn = _Watched(block.attn, show)
    return other


def weights(attn: Attention, x: Array, k: Array, step: Step) -> Array:
    """Attention weights float32[b, n, t, s], which `vfjax.nn.layers.attend` keeps to itself.

    Args:
        attn: a block's attention.
        x: [b, t, d] its input.
        k: [b, g, h, s] its keys, rotated.
        step: of the call; with cosines, sines and `see` of x's tokens.
    """
    q = attn.heads(x, step)[0].astype(jnp.float32)
    keys = jnp.repeat(k.astype(jnp.float32), q.shape[2] // k.shape[1], axis=1)
    scores = jnp.einsum("btnh,bnhs->bnts", q, keys) * attn.config.head_dim**-0.5
    return jax.nn.softmax(jnp.where(step.see[:, None], scores, -jnp.inf), axis=-1)
