"""The vision transformer of Qwen2-VL (arXiv 2409.12191), Qwen2.5-VL (2502.13923), Qwen3-VL, RICE.

It reads pictures of any size, the patches of all in one sequence: positions are rotary, by row and
column, and a patch sees its own picture or frame alone; in most of Qwen2.5-VL's layers its own
window. Qwen3-VL (arXiv 2511.21631) adds learned positions, a square table that is stretched to each
picture. As transformers computes it (models/qwen2_vl, models/qwen2_5_vl, models/qwen3_vl). RICE
(arXiv 2507.20025), of LLaVA-OneVision-1.5, has a class token before each frame.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vfjax.nn.layers import MLP, GatedMLP, RMSNorm, layer_norm, linear, param, rotate
from vfjax.nn.packed import ROWS, packed
from vfjax.vision.encoders.vit import run

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class QwenViTConfig:
    """Sizes and options of a tower.

    Attributes:
        width: channels of a patch.
        layers: number of blocks.
        heads: of attention.
        mlp: channels inside a block's MLP.
        patch: its side in pixels.
        time: frames of a patch.
        merge: patches a side that become one visual token.
        act: of the MLPs, key of `ACTIVATIONS`.
        gated: blocks have RMS norms and gated MLPs (Qwen2.5-VL).
        window: visual tokens a side of a window; 0: patches see their whole frame.
        full: layers in which they do all the same.
        theta: base of the rotary positions.
        eps: what the norms add to a variance.
        side: of the table of learned positions; 0: there is none, nor a bias on patches.
        classes: a class token stands before each frame, turned by learned angles, and a norm before
            the first block (RICE); `time` is 1.
        pre_eps: what that norm adds to a variance.
    """

    width: int
    layers: int
    heads: int
    mlp: int
    patch: int = 14
    time: int = 2
    merge: int = 2
    act: str = "quick_gelu"
    gated: bool = False
    window: int = 0
    full: tuple[int, ...] = ()
    theta: float = 10000.0
    eps: float = 1e-6
    side: int = 0
    classes: bool = False
    pre_eps: float = 1e-5

    def build(self, *, rngs: nnx.Rngs) -> "QwenViT":
        return QwenViT(self, rngs=rngs)

    def norm(self, *, rngs: nnx.Rngs) -> RMSNorm | nnx.LayerNorm:
        """A norm of patches."""
        make = RMSNorm if self.gated else layer_norm
        return make(self.width, self.eps, rngs=rngs)


class QwenViT(nnx.Module):
    """Patches -> hidden states. Hidden state 0 is what the first block reads."""

    def __init__(self, config: QwenViTConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        shape = (3, *([] if c.classes else [c.time]), c.patch, c.patch, c.width)
        self.patch = param(shape, (*[None] * (len(shape) - 1), "embed"), rngs=rngs)
        if c.classes:
            self.cls = param((c.width,), ("embed",), rngs=rngs)
            self.angles = param((1, c.width // c.heads // 2), (None, None), rngs=rngs)
            self.pre_norm = layer_norm(c.width, c.pre_eps, rngs=rngs)
        if c.side:
            self.bias = param((c.width,), ("embed",), rngs=rngs)
            self.table = param((c.side**2, c.width), (None, "embed"), rngs=rngs)
        self.blocks = nnx.List(Block(c, rngs=rngs) for _ in range(c.layers))

    def __call__(
        self,
        pixels: Array,
        taps: Sequence[int],
        *,
        place: Array,
        frames: Array,
        windows: Array,
        reach: int,
        learned: tuple[Array, Array] | None = None,
        kept: Array | None = None,
    ) -> list[Array]:
        """Hidden states [1, n, width] at the taps; of class tokens none, see `kept`.

        Args:
            pixels: float32[n, 3 * time * patch * patch], the patches of all frames, in each frame
                window after window, those of one visual token one after another.
            taps: see `vfjax.vision.encoders.vit.run`.
            place: int32[n, 2], row and column in the frame.
            frames: int32[n], from each patch to the first of its frame, not positive: sequences
                put one behind another are one sequence.
            windows: int32[n], so to the first of its window.
            reach: see `vfjax.nn.packed.packed`, of frames.
            learned: int32[n, k] and float32[n, k], of which rows of the table each patch's learned
                position is the weighted sum.
            kept: int32[n], of towers with class tokens, whose inputs have slots for these: where
                each patch is among them; n where there is none.

        Raises:
            InputError: a tap outside the hidden states.
        """
        c, kernel = self.config, self.patch[...].reshape(-1, self.config.width)
        x = pixels.astype(kernel.dtype) @ kernel
        if learned is not None:
            x = x + self.bias[...]
            x = x + self.positions(*learned).astype(x.dtype)
        angles = self.rope(place)
        if kept is not None:
            cls = jnp.ones(len(x), bool).at[kept].set(False, mode="drop")[:, None]
            x = self.pre_norm(jnp.where(cls, self.cls[...], x))
            angles = jnp.where(cls, self.angles[...].astype(jnp.float32), angles)
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        number = jnp.arange(len(x))
        wide = number + frames, reach
        near = number + windows, ROWS + 2 * (c.window * c.merge) ** 2
        blocks = [
            functools.partial(block, cos=cos, sin=sin, starts=starts, reach=reach)
            for i, block in enumerate(self.blocks)
            for starts, reach in [wide if self.whole(i) else near]
        ]
        states = run(blocks, x, taps)
        return [x[None] if kept is None else x.at[kept].get(mode="clip")[None] for x in states]

    def positions(self, indices: Array, weights: Array) -> Array:
        """Learned positions float32[n, width]; arguments as `learned` of a call."""
        table, out = self.table[...], jnp.zeros((len(indices), self.config.width), jnp.float32)
        for k in range(indices.shape[1]):  # at once, [n, k, width] would be held
            out += weights[:, k, None] * table[indices[:, k]].astype(jnp.float32)
        return out

    def whole(self, layer: int) -> bool:
        """Whether patches see their whole frame in a layer."""
        return not self.config.window or layer in self.config.full

    def rope(self, place: Array) -> Array:
        """Angles float32[n, h / 2] of rows and columns int32[n, 2]."""
        size = self.config.width // self.config.heads // 2
        power = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
        frequencies = np.float32(1) / np.float32(self.config.theta ** power.astype(np.float64))
        angles = place[..., None].astype(jnp.float32) * frequencies
        return angles.reshape(len(place), -1)


class Block(nnx.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)), of patches [n, width]."""

    def __init__(self, config: QwenViTConfig, *, rngs: nnx.Rngs):
        c = config
        self.norm1 = c.norm(rngs=rngs)
        self.attn = Attention(c.width, c.heads, rngs=rngs)
        self.norm2 = c.norm(rngs=rngs)
        self.mlp = (GatedMLP if c.gated else MLP)(c.width, c.mlp, c.act, rngs=rngs)

    def __call__(self, x: Array, cos: Array, sin: Array, starts: Array, reach: int) -> Array:
        x = x + self.attn(self.norm1(x), cos, sin, starts, reach)
        return x + self.mlp(self.norm2(x))


class Attention(nnx.Module):
    """Self-attention within segments, queries and keys rotated in float32."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.heads = heads
        self.q, self.k, self.v = (
            linear(width, width, ("embed", "heads"), rngs=rngs) for _ in range(3)
        )
        self.out = linear(width, width, ("heads", "embed"), rngs=rngs)

    def __call__(self, x: Array, cos: Array, sin: Array, starts: Array, reach: int) -> Array:
        q, k, v = (f(x).reshape(len(x), self.heads, -1) for f in (self.q, self.k, self.v))
        q, k = (
            rotate(y.astype(jnp.float32)[None], cos[None], sin[None])[0].astype(x.dtype)
            for y in (q, k)
        )
        return self.out(packed(q, k, v, starts, reach).reshape(x.shape))
