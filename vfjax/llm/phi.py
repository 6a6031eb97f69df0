"""Phi-1.5 and Phi-2 decoders (transformers PhiForCausalLM): parallel blocks, partial rotation."""

import dataclasses

import jax
from flax import nnx

from vfjax.llm.cache import Rows
from vfjax.llm.llama import Attention, LlamaConfig, Step
from vfjax.nn.layers import MLP, layer_norm

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class PhiConfig(LlamaConfig):
    """Sizes; biases everywhere, norms with means."""

    qkv_bias: bool = True
    out_bias: bool = True
    head_bias: bool = True

    def norm(self, *, rngs: nnx.Rngs) -> nnx.LayerNorm:
        return layer_norm(self.width, self.eps, rngs=rngs)

    def block(self, *, rngs: nnx.Rngs) -> "PhiBlock":
        return PhiBlock(self, rngs=rngs)


class PhiBlock(nnx.Module):
    """Attention and feed-forward of the same normed input, added to the stream together."""

    def __init__(self, config: PhiConfig, *, rngs: nnx.Rngs):
        self.norm = config.norm(rngs=rngs)
        self.attn = Attention(config, rngs=rngs)
        self.mlp = MLP(config.width, config.mlp, config.act, rngs=rngs)

    def __call__(self, x: Array, layer: int, step: Step) -> tuple[Array, tuple[Rows, Rows]]:
        """[b, t, d] -> [b, t, d], and `Attention`'s keys and values."""
        normed = self.norm(x)
        y, kv = self.attn(normed, layer, step)
        return y + self.mlp(normed) + x, kv
