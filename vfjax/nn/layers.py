"""Building blocks shared by encoders, connectors and LLMs.

Every parameter names its logical axes in the metadata key `axes`; `vfjax.sharding` maps them to
mesh axes. Kernels are stored (in, out). Computation follows the dtype of the inputs and weights;
norms and softmax are reduced in float32.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from vfjax.nn.flash import flash, kernel_for

Array = jax.Array
Axes = tuple[str | None, ...]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "silu": jax.nn.silu,
}
"""Activations under the names that Hugging Face configs give them (`hidden_act`)."""


def linear(din: int, dout: int, axes: Axes, *, bias: bool = True, rngs: nnx.Rngs) -> nnx.Linear:
    """A dense layer, kernel float32[din, dout], with the logical `axes` (in, out) of its kernel."""
    return nnx.Linear(
        din,
        dout,
        use_bias=bias,
        kernel_metadata={"axes": axes},
        bias_metadata={"axes": axes[1:]},
        rngs=rngs,
    )


def redraw(module: nnx.Module, rngs: nnx.Rngs) -> None:
    """Draws a new module's weights as torch draws them, in place.

    Of torch.nn.Linear, kernel and bias are uniform within 1 / sqrt(fan-in), where flax has LeCun's
    normal distribution, of about twice the deviation, and zeros. A module with a method `redraw` of
    its own, for what it has besides, is asked for it.
    """
    for _, layer in nnx.iter_modules(module):
        if isinstance(layer, nnx.Linear):
            bound = layer.kernel.shape[0] ** -0.5
            for p in (layer.kernel, layer.bias):
                if p is not None:
                    p[...] = jax.random.uniform(rngs.params(), p.shape, minval=-bound, maxval=bound)
    for _, own in nnx.iter_modules(module):
        if hasattr(own, "redraw"):
            own.redraw(rngs)


def layer_norm(width: int, eps: float, *, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Layer normalisation over the last axis, biased variance, reduced in float32."""
    return nnx.LayerNorm(
        width,
        epsilon=eps,
        use_fast_variance=False,  # E[x^2] - E[x]^2 loses the digits that parity needs
        scale_metadata={"axes": (None,)},
        bias_metadata={"axes": (None,)},
        rngs=rngs,
    )


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation over the last axis, reduced in float32 (arXiv 1910.07467).

    As transformers rounds it: Llama's multiplies by the scale in the input's dtype; Gemma's, whose
    stored scale is an `offset` from one, in float32.
    """

    def __init__(self, width: int, eps: float, *, offset: bool = False, rngs: nnx.Rngs):
        self.eps, self.offset = eps, offset
        self.scale = nnx.Param(jnp.full(width, 0.0 if offset else 1.0), axes=(None,))

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        if self.offset:
            return (y * (1 + self.scale[...].astype(jnp.float32))).astype(x.dtype)
        return self.scale[...] * y.astype(x.dtype)


BLOCK = 32 * 2**20
"""Bytes of scores that causal attention has at once, about: more fall out of a CPU's caches."""


class MLP(nnx.Module):
    """Two dense layers around an activation, [n, s, width] -> [n, s, width]."""

    def __init__(self, width: int, hidden: int, act: str, *, rngs: nnx.Rngs):
        self.act = act
        self.fc1 = linear(width, hidden, ("embed", "mlp"), rngs=rngs)
        self.fc2 = linear(hidden, width, ("mlp", "embed"), rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.fc2(ACTIVATIONS[self.act](self.fc1(x)))


class GatedMLP(nnx.Module):
    """down(act(gate(x)) * up(x)), [..., width] -> [..., width] (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int, act: str, *, bias: bool = True, rngs: nnx.Rngs):
        self.act = act
        self.gate = linear(width, hidden, ("embed", "mlp"), bias=bias, rngs=rngs)
        self.up = linear(width, hidden, ("embed", "mlp"), bias=bias, rngs=rngs)
        self.down = linear(hidden, width, ("mlp", "embed"), bias=bias, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.down(ACTIVATIONS[self.act](self.gate(x)) * self.up(x))


def attention(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    """Scaled dot-product attention with grouped keys and values; see `attend`.

    Args:
        q: [b, t, n, h] queries.
        k: [b, s, g, h] keys; g divides n, query head i reads group i // (n // g).
        v: [b, s, g, h] values.
        mask: bool, broadcastable to [b, t, s]; True where a query may look. None: everywhere.
    """
    return attend(q, k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3), mask)


def attend(
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None = None,
    *,
    causal: bool = False,
    real: Array | None = None,
    segments: Array | None = None,
) -> Array:
    """Scaled dot-product attention on keys and values as a cache keeps them.

    By `vfjax.nn.flash` where the mask allows it and the platform has it. Else written as plain
    batched products, heads before positions: on CPU three to four times faster than einsums over
    [b, t, n, h] on jax 0.10, which are five times faster than `jax.nn.dot_product_attention`.

    Args:
        q: [b, t, n, h] queries.
        k: [b, g, h, s] keys.
        v: [b, g, s, h] values.
        mask: bool, broadcastable to [b, t, s]; True where a query may look.
        causal: the mask, [b, t, t], lets no query look beyond its own place: many queries are read
            in up to four blocks, without the keys after each.
        real: bool[b, t], given where the mask hides padding, its False, what comes later, and what
            `segments` do, alone.
        segments: int32[b, t], see `vfjax.fusion.segments.block`; None: they hide nothing.

    Returns:
        [b, t, n, h] in q's dtype. Softmax in float32. A row with nothing to see is a mean of the v
        that its block reads.
    """
    b, t, n, _ = q.shape
    if real is not None and (kernel := kernel_for(q)):
        return flash(q, k, v, real, segments, kernel)
    size = max(BLOCK // (4 * b * n * t), -(-t // 4))
    size = -(-size // 64) * 64
    if not causal or mask is None or t <= size:
        return _attend(q, k, v, mask)
    stops = [*range(size, t, size), t]
    blocks = [
        _attend(q[:, i:j], k[..., :j], v[:, :, :j], mask[:, i:j, :j])
        for i, j in zip([0, *stops], stops, strict=False)
    ]
    return jnp.concatenate(blocks, axis=1)


def _attend(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """`attend` in one piece."""
    b, t, n, h = q.shape
    g, rows = k.shape[1], (n // k.shape[1]) * t
    grouped = (q * h**-0.5).reshape(b, t, g, n // g, h).transpose(0, 2, 3, 1, 4)
    scores = grouped.reshape(b, g, rows, h) @ k
    scores = scores.astype(jnp.float32).reshape(b, g, n // g, t, -1)
    if mask is not None:
        scores += jnp.where(mask, 0, jnp.finfo(jnp.float32).min)[:, None, None]
    weights = jax.nn.softmax(scores).reshape(b, g, rows, -1).astype(v.dtype)
    out = jnp.matmul(weights, v, preferred_element_type=jnp.float32)
    out = out.astype(q.dtype).reshape(b, g, n // g, t, h)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)


def quantize(x: Array, axis: int) -> tuple[Array, Array]:
    """Int8 of x, and float32 scales, 1 along the axis: the largest along it becomes 127."""
    wide = x.astype(jnp.float32)
    scale = jnp.abs(wide).max(axis=axis, keepdims=True) / 127
    scale = jnp.where(scale > 0, scale, 1)
    return jnp.round(wide / scale).astype(jnp.int8), scale


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotary position embedding in the half-split convention (arXiv 2104.09864).

    Args:
        x: [b, t, n, h] queries or keys.
        cos: float32[b, t, h / 2] cosines of the angles.
        sin: float32[b, t, h / 2] sines of the angles.

    Returns:
        [b, t, n, h] in x's dtype.
    """
    x1, x2 = jnp.split(x, 2, axis=-1)
    cos, sin = (a[:, :, None].astype(x.dtype) for a in (cos, sin))
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)


def param(shape: tuple[int, ...], axes: Axes, *, rngs: nnx.Rngs) -> nnx.Param:
    """A bare parameter, float32 `shape` drawn from normal(0.02), with its logical `axes`."""
    return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape), axes=axes)
