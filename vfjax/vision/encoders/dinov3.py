"""DINOv3's vision transformer (arXiv 2508.10104), as transformers' DINOv3ViTModel computes it."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vfjax.nn.layers import ACTIVATIONS, attention, layer_norm, linear, param, rotate
from vfjax.vision.encoders.vit import patch_conv, resolve_taps

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class DINOv3Config:
    """Sizes of a DINOv3 tower; the defaults are ViT-L/16.

    `image_size` is the side of the pictures that are fed; positions are rotations, so the weights
    fit any. `gated` chooses the MLP of the largest towers.
    """

    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp: int = 4096
    patch: int = 16
    image_size: int = 224
    act: str = "gelu"
    gated: bool = False
    registers: int = 4
    q_bias: bool = True
    k_bias: bool = False
    v_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    rope_theta: float = 100.0
    eps: float = 1e-5

    @property
    def prefix(self) -> int:
        """Class and register tokens before the patches."""
        return 1 + self.registers

    @property
    def tokens(self) -> int:
        """Patch tokens of one picture."""
        return (self.image_size // self.patch) ** 2

    def build(self, *, rngs: nnx.Rngs) -> "DINOv3":
        return DINOv3(self, rngs=rngs)


class DINOv3(nnx.Module):
    """Pixels of any size -> hidden states."""

    def __init__(self, config: DINOv3Config, *, rngs: nnx.Rngs):
        c = self.config = config
        axes = (None, None, None)
        self.patch = patch_conv(c.width, c.patch, bias=True, rngs=rngs)
        self.cls = param((1, 1, c.width), axes, rngs=rngs)
        self.mask = param((1, 1, c.width), axes, rngs=rngs)  # for masked training only
        self.registers = param((1, c.registers, c.width), axes, rngs=rngs)
        self.blocks = nnx.List(Block(c, rngs=rngs) for _ in range(c.layers))
        self.norm = layer_norm(c.width, c.eps, rngs=rngs)

    def __call__(self, pixels: Array, taps: Sequence[int], *, norm: bool = False) -> list[Array]:
        """Hidden states float[n, 1 + registers + patches, width] at the taps.

        Args:
            pixels: float[n, h, w, 3], normalised; h and w are cut to multiples of the patch.
            taps: indices into the hidden states, see `vfjax.vision.encoders.vit.run`.
            norm: apply the final norm (transformers' `last_hidden_state` is tap -1 with it).

        Raises:
            InputError: a tap outside the hidden states.
        """
        wanted = resolve_taps(taps, len(self.blocks))
        patches = self.patch(pixels.astype(self.patch.kernel.dtype))
        n, h, w, d = patches.shape
        prefix = jnp.concatenate([self.cls[...], self.registers[...]], axis=1)
        prefix = jnp.broadcast_to(prefix, (n, *prefix.shape[1:]))
        x = jnp.concatenate([prefix, patches.reshape(n, -1, d)], axis=1)
        angles = jnp.asarray(rotations(self.config, h, w))
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        states = {0: x}
        for k in range(1, max(wanted) + 1):
            x = states[k] = self.blocks[k - 1](x, cos, sin)
        return [self.norm(states[k]) if norm else states[k] for k in wanted]


def rotations(config: DINOv3Config, h: int, w: int) -> np.ndarray:
    """Rotary angles float32[1, prefix + h * w, head_dim / 2] for a grid of h x w patches.

    The first half turns with the row, the second with the column, both from -1 to 1 over the
    picture whatever its size. The class token and registers have no place: zero.
    """
    head = config.width // config.heads
    freq = 2 * np.pi * config.rope_theta ** -(np.arange(head // 4) * 4 / head)
    rows, cols = ((2 * np.arange(k) + 1) / k - 1 for k in (h, w))
    places = np.stack(np.meshgrid(rows, cols, indexing="ij"), axis=-1).reshape(h * w, 2, 1)
    patches = (places * freq).reshape(h * w, head // 2)
    prefix = np.zeros((config.prefix, head // 2))
    return np.concatenate([prefix, patches])[None].astype(np.float32)


class Block(nnx.Module):
    """x + scale1 * attention(norm1(x)), then x + scale2 * mlp(norm2(x)); [n, s, width]."""

    def __init__(self, config: DINOv3Config, *, rngs: nnx.Rngs):
        c = config
        self.norm1 = layer_norm(c.width, c.eps, rngs=rngs)
        self.attn = Attention(c, rngs=rngs)
        self.scale1 = param((c.width,), (None,), rngs=rngs)
        self.norm2 = layer_norm(c.width, c.eps, rngs=rngs)
        self.mlp = MLP(c, rngs=rngs)
        self.scale2 = param((c.width,), (None,), rngs=rngs)

    def __call__(self, x: Array, cos: Array, sin: Array) -> Array:
        x = x + self.scale1[...] * self.attn(self.norm1(x), cos, sin)
        return x + self.scale2[...] * self.mlp(self.norm2(x))


class Attention(nnx.Module):
    """Multi-head self-attention, queries and keys rotated; [n, s, width] -> [n, s, width]."""

    def __init__(self, config: DINOv3Config, *, rngs: nnx.Rngs):
        c = config
        self.heads = c.heads
        self.q, self.k, self.v = (
            linear(c.width, c.width, ("embed", "heads"), bias=bias, rngs=rngs)
            for bias in (c.q_bias, c.k_bias, c.v_bias)
        )
        self.out = linear(c.width, c.width, ("heads", "embed"), bias=c.out_bias, rngs=rngs)

    def __call__(self, x: Array, cos: Array, sin: Array) -> Array:
        split = (*x.shape[:-1], self.heads, -1)
        q, k, v = (f(x).reshape(split) for f in (self.q, self.k, self.v))
        y = attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.out(y.reshape(x.shape))


class MLP(nnx.Module):
    """down(act(up(x))), or down(act(gate(x)) * up(x)); [n, s, width] -> [n, s, width]."""

    def __init__(self, config: DINOv3Config, *, rngs: nnx.Rngs):
        c = config
        self.act, self.gated = c.act, c.gated
        if c.gated:
            self.gate = linear(c.width, c.mlp, ("embed", "mlp"), bias=c.mlp_bias, rngs=rngs)
        self.up = linear(c.width, c.mlp, ("embed", "mlp"), bias=c.mlp_bias, rngs=rngs)
        self.down = linear(c.mlp, c.width, ("mlp", "embed"), bias=c.mlp_bias, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        act, up = ACTIVATIONS[self.act], self.up(x)
        return self.down(act(self.gate(x)) * up if self.gated else act(up))
