"""InternLM2's attention against Llama's with the same products."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from vfjax.llm import InternLM2Config, LlamaConfig

SIZES = {"vocab": 16, "width": 16, "layers": 1, "heads": 4, "kv_heads": 2, "head_dim": 4}


def test_groups_are_llamas_heads():
    """A group's row holds its two queries, its key and its value."""
    own = InternLM2Config(**SIZES, mlp=8, context=32, qkv_bias=True)
    llama = LlamaConfig(**SIZES, mlp=8, context=32, qkv_bias=True)
    ours = own.block(rngs=nnx.Rngs(0)).attn
    theirs = llama.block(rngs=nnx.Rngs(1)).attn
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(16, 2, 4, 4))  # in, group, of it, features
    bias = rng.normal(size=(2, 4, 4))
    ours.qkv.kernel[...] = jnp.asarray(kernel.reshape(16, 32))
    ours.qkv.bias[...] = jnp.asarray(bias.reshape(32))
    for layer, rows in ((theirs.q, slice(0, 2)), (theirs.k, 2), (theirs.v, 3)):
        layer.kernel[...] = jnp.asarray(kernel[:, :, rows].reshape(16, -1))
        layer.bias[...] = jnp.asarray(bias[:, rows].reshape(-1))
    x = jnp.asarray(rng.normal(size=(2, 3, 16)), jnp.float32)
    for mine, other in zip(ours.project(x), theirs.project(x), strict=True):
        np.testing.assert_allclose(mine.reshape(other.shape), other, rtol=0, atol=1e-5)
