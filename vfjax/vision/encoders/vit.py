"""The pre-norm vision transformer that CLIP, SigLIP and DINOv2 share."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from vfjax.errors import InputError
from vfjax.nn.layers import ACTIVATIONS, attention, layer_norm, linear, param

Array = jax.Array


class Attention(nnx.Module):
    """Multi-head self-attention, [n, s, width] -> [n, s, width]."""

    def __init__(self, width: int, heads: int, *, qkv_bias: bool = True, rngs: nnx.Rngs):
        self.heads = heads
        self.q, self.k, self.v = (
            linear(width, width, ("embed", "heads"), bias=qkv_bias, rngs=rngs) for _ in range(3)
        )
        self.out = linear(width, width, ("heads", "embed"), rngs=rngs)

    def __call__(self, x: Array) -> Array:
        split = (*x.shape[:-1], self.heads, -1)
        q, k, v = (f(x).reshape(split) for f in (self.q, self.k, self.v))
        return self.out(attention(q, k, v).reshape(x.shape))


class MLP(nnx.Module):
    """Two dense layers around an activation, [n, s, width] -> [n, s, width]."""

    def __init__(self, width: int, hidden: int, act: str, *, rngs: nnx.Rngs):
        self.act = act
        self.fc1 = linear(width, hidden, ("embed", "mlp"), rngs=rngs)
        self.fc2 = linear(hidden, width, ("mlp", "embed"), rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.fc2(ACTIVATIONS[self.act](self.fc1(x)))


class SwiGLU(nnx.Module):
    """Gated MLP of DINOv2-giant, [n, s, width] -> [n, s, width] (Dinov2SwiGLUFFN)."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        self.gated = linear(width, 2 * hidden, ("embed", "mlp"), rngs=rngs)
        self.out = linear(hidden, width, ("mlp", "embed"), rngs=rngs)

    def __call__(self, x: Array) -> Array:
        gate, up = jnp.split(self.gated(x), 2, axis=-1)
        return self.out(jax.nn.silu(gate) * up)


class Block(nnx.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)); each branch scaled if `layer_scale`."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp: nnx.Module,
        eps: float,
        *,
        layer_scale: bool = False,
        qkv_bias: bool = True,
        rngs: nnx.Rngs,
    ):
        self.norm1 = layer_norm(width, eps, rngs=rngs)
        self.attn = Attention(width, heads, qkv_bias=qkv_bias, rngs=rngs)
        self.norm2 = layer_norm(width, eps, rngs=rngs)
        self.mlp = mlp
        self.layer_scale = layer_scale
        if layer_scale:
            self.scale1 = param((width,), (None,), rngs=rngs)
            self.scale2 = param((width,), (None,), rngs=rngs)

    def __call__(self, x: Array) -> Array:
        y = self.attn(self.norm1(x))
        x = x + (y * self.scale1[...] if self.layer_scale else y)
        y = self.mlp(self.norm2(x))
        return x + (y * self.scale2[...] if self.layer_scale else y)


def patch_conv(width: int, patch: int, *, bias: bool, rngs: nnx.Rngs) -> nnx.Conv:
    """The patch embedding, float32[n, h, w, 3] -> [n, h // patch, w // patch, width]."""
    return nnx.Conv(
        3,
        width,
        (patch, patch),
        strides=patch,
        padding="VALID",
        use_bias=bias,
        kernel_metadata={"axes": (None, None, None, "embed")},
        bias_metadata={"axes": ("embed",)},
        rngs=rngs,
    )


def run(blocks: Sequence[nnx.Module], x: Array, taps: Sequence[int]) -> list[Array]:
    """Hidden states of the layers asked for, and nothing computed past the last one.

    Args:
        blocks: the transformer blocks, in order.
        x: [n, s, d] embedding output, which is hidden state 0.
        taps: indices into the len(blocks) + 1 hidden states; k is the output of block k, negative
            counts from the end, as in transformers' `hidden_states`.

    Returns:
        One [n, s, d] array a tap, in the order asked for.

    Raises:
        InputError: no tap, or one outside the hidden states.
    """
    wanted = resolve_taps(taps, len(blocks))
    states = {0: x}
    for k in range(1, max(wanted) + 1):
        x = blocks[k - 1](x)
        if k in wanted:
            states[k] = x
    return [states[k] for k in wanted]


def resolve_taps(taps: Sequence[int], layers: int, where: str = "taps") -> list[int]:
    """Taps as indices 0..layers of the hidden states; see `run`. `where` is for the error."""
    size = layers + 1
    if not taps or any(not -size <= t < size for t in taps):
        raise InputError(
            where,
            found=list(taps),
            expected=f"at least one index within -{size}..{layers}",
            fix="choose layers that the encoder has",
        )
    return [t % size for t in taps]
