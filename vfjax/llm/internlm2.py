"""InternLM2 (arXiv 2403.17297): Llama, but for queries, keys and values from one product.

InternVL internvl_chat/internvl/model/internlm2/modeling_internlm2.py.
"""

import dataclasses

import jax
from flax import nnx

from vfjax.llm.llama import Attention, Block, LlamaConfig
from vfjax.nn.layers import linear

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class InternLM2Config(LlamaConfig):
    """Sizes and options of an InternLM2."""

    def block(self, *, rngs: nnx.Rngs) -> Block:
        return Block(self, attn=GroupedAttention, rngs=rngs)


class GroupedAttention(Attention):
    """Llama's attention; each group of heads has its queries, its key and its value in a row."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        heads = c.heads + 2 * c.kv_heads
        self.qkv = linear(
            c.width, heads * c.head_dim, ("embed", "heads"), bias=c.qkv_bias, rngs=rngs
        )
        self.out = linear(
            c.heads * c.head_dim, c.width, ("heads", "embed"), bias=c.out_bias, rngs=rngs
        )

    def project(self, x: Array) -> tuple[Array, Array, Array]:
        c = self.config
        y = self.qkv(x).reshape(*x.shape[:-1], c.kv_heads, -1, c.head_dim)
        return y[..., :-2, :], y[..., -2, :], y[..., -1, :]
