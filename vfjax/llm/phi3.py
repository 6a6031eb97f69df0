"""Phi-3 decoders (transformers Phi3ForCausalLM): Llama's with fused projections, and LongRoPE."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vfjax.llm.llama import Attention, Block, LlamaConfig, powers
from vfjax.nn.layers import ACTIVATIONS, linear

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Phi3Config(LlamaConfig):
    """Sizes, and LongRoPE (arXiv 2402.13753) within the original context.

    Attributes:
        stretch: factor of each wavelength, r / 2 for the r rotated features of a head; empty
            without LongRoPE.
        scale: factor of the rotated part of queries and keys.
    """

    stretch: tuple[float, ...] = ()
    scale: float = 1.0

    def block(self, *, rngs: nnx.Rngs) -> Block:
        return Block(self, attn=FusedAttention, mlp=FusedMLP, rngs=rngs)

    def rope(self, positions: Array) -> tuple[Array, Array]:
        """As transformers' `longrope` for sequences of the original context at most."""
        if not self.stretch:
            return super().rope(positions)
        frequencies = 1 / (np.asarray(self.stretch, np.float32) * powers(self))
        angles = positions[..., None].astype(jnp.float32) * frequencies
        return self.scale * jnp.cos(angles), self.scale * jnp.sin(angles)


class FusedAttention(Attention):
    """Llama's attention with queries, keys and values from one product."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        q, kv = self.sizes = c.heads * c.head_dim, c.kv_heads * c.head_dim
        self.qkv = linear(c.width, q + 2 * kv, ("embed", "heads"), bias=False, rngs=rngs)
        self.out = linear(q, c.width, ("heads", "embed"), bias=False, rngs=rngs)

    def project(self, x: Array) -> tuple[Array, Array, Array]:
        q, kv = self.sizes
        queries, keys, values = jnp.split(self.qkv(x), (q, q + kv), axis=-1)
        return queries, keys, values


class FusedMLP(nnx.Module):
    """Llama's feed-forward with gate and up from one product."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        c = config
        self.act = c.act
        self.gate_up = linear(c.width, 2 * c.mlp, ("embed", "mlp"), bias=False, rngs=rngs)
        self.down = linear(c.mlp, c.width, ("mlp", "embed"), bias=False, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
        return self.down(ACTIVATIONS[self.act](gate) * up)
