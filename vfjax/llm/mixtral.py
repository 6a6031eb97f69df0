"""Mixtral decoders (arXiv 2401.04088, transformers MixtralForCausalLM): Llama's with experts."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from vfjax.layers import ACTIVATIONS, linear, param
from vfjax.llm.llama import Block, LlamaConfig

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class MixtralConfig(LlamaConfig):
    """Sizes; each token goes through `chosen` of `experts` feed-forwards."""

    experts: int = 8
    chosen: int = 2

    def block(self, *, rngs: nnx.Rngs) -> Block:
        return Block(self, mlp=Experts, rngs=rngs)


class Experts(nnx.Module):
    """Gated feed-forwards, of which a router chooses a few for each token.

    Exact whatever the router chooses: tokens are sorted by expert, none is dropped.
    """

    def __init__(self, config: MixtralConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        rise, fall = (c.experts, c.width, c.mlp), (c.experts, c.mlp, c.width)
        self.router = linear(c.width, c.experts, ("embed", None), bias=False, rngs=rngs)
        self.gate = param(rise, (None, "embed", "mlp"), rngs=rngs)
        self.up = param(rise, (None, "embed", "mlp"), rngs=rngs)
        self.down = param(fall, (None, "mlp", "embed"), rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """[b, t, d] -> [b, t, d]."""
        c, tokens = self.config, x.reshape(-1, x.shape[-1])
        shares = jax.nn.softmax(self.router(tokens).astype(jnp.float32), axis=-1)
        weights, experts = jax.lax.top_k(shares, c.chosen)
        weights = weights / weights.sum(axis=-1, keepdims=True)
        order = jnp.argsort(experts.reshape(-1))
        counts = jnp.bincount(experts.reshape(-1), length=c.experts).astype(jnp.int32)
        rows = tokens[order // c.chosen]
        gate, up = (jax.lax.ragged_dot(rows, w[...], counts) for w in (self.gate, self.up))
        y = jax.lax.ragged_dot(ACTIVATIONS[c.act](gate) * up, self.down[...], counts)
        y = y[jnp.argsort(order)].reshape(-1, c.chosen, x.shape[-1])
        return (weights[..., None] * y).sum(axis=1).astype(x.dtype).reshape(x.shape)
