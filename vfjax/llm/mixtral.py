"""Mixtral decoders (arXiv 2401.04088, transformers MixtralForCausalLM): Llama's with experts."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from vfjax.llm.llama import Block, LlamaConfig
from vfjax.nn.layers import ACTIVATIONS, linear, param
from vfjax.sharding import rows_over

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
        """[b, t, d] -> [b, t, d]; on a mesh each device sorts the tokens of its own rows."""
        args = x, self.router(x), self.gate[...], self.up[...], self.down[...]
        mesh = jax.typeof(x).sharding.mesh
        if mesh.empty or set(mesh.axis_types) - {AxisType.Auto}:
            return self._routed(*args)
        model = "model" if mesh.shape.get("model", 1) > 1 else None
        rows = PartitionSpec(rows_over(mesh, len(x)))
        rise, fall = PartitionSpec(None, None, model), PartitionSpec(None, model)

        def run(*args: Array) -> Array:
            y = self._routed(*args)
            return y if model is None else jax.lax.psum(y, model)

        specs = rows, rows, rise, rise, fall
        run = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)
        return run(*args)

    def _routed(self, x: Array, scores: Array, gate: Array, up: Array, down: Array) -> Array:
        """[b, t, d] of x [b, t, d] and its router's [b, t, experts]."""
        c, tokens = self.config, x.reshape(-1, x.shape[-1])
        shares = jax.nn.softmax(scores.reshape(-1, c.experts).astype(jnp.float32), axis=-1)
        weights, experts = jax.lax.top_k(shares, c.chosen)
        weights = weights / weights.sum(axis=-1, keepdims=True)
        order = jnp.argsort(experts.reshape(-1))
        counts = jnp.bincount(experts.reshape(-1), length=c.experts).astype(jnp.int32)
        rows = tokens[order // c.chosen]
        rise, lift = (jax.lax.ragged_dot(rows, w, counts) for w in (gate, up))
        y = jax.lax.ragged_dot(ACTIVATIONS[c.act](rise) * lift, down, counts)
        y = y[jnp.argsort(order)].reshape(-1, c.chosen, x.shape[-1])
        return (weights[..., None] * y).sum(axis=1).astype(x.dtype).reshape(x.shape)
