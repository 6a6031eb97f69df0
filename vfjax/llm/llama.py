"""Llama-family decoders (arXiv 2302.13971), as transformers computes them.

Llama, Vicuna, Yi, Mistral, Qwen2, Qwen3 and Gemma differ in a few switches. Others have blocks of
their own: a subclass of `LlamaConfig` names them, the rest of `Llama` serves all.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from vfjax.errors import InputError
from vfjax.fusion.segments import block as visible
from vfjax.llm.cache import Cache, Rows
from vfjax.nn.layers import GatedMLP, RMSNorm, attend, linear, param, rotate
from vfjax.sharding import by_row, divides

Array = jax.Array
Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama-3.1's frequency scaling (transformers modeling_rope_utils, rope_type `llama3`)."""

    factor: float
    low: float
    high: float
    original_context: int


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and options of a decoder.

    `kv_heads` below `heads` is grouped-query attention. Beyond Llama: `qk_norm` normalises queries
    and keys (Qwen3); `gemma` multiplies embeddings by sqrt(width) and keeps norms' scales as
    offsets from one; `rotary` is the share of a head that is rotated; `rope_axes` (M-RoPE) names
    for each frequency the position that turns it, 0 time, 1 row, 2 column. A tied head's kernel is
    the embedding; a `headless` decoder has hidden states and no logits.
    """

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    context: int
    act: str = "silu"
    eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tied: bool = False
    qk_norm: bool = False
    gemma: bool = False
    rotary: float = 1.0
    head_bias: bool = False
    headless: bool = False
    rope_axes: tuple[int, ...] = ()

    @property
    def axes(self) -> int:
        """Positions of a token that are read: 3 (time, row, column) with `rope_axes`, else 1."""
        return 3 if self.rope_axes else 1

    def build(self, *, rngs: nnx.Rngs) -> "Llama":
        return Llama(self, rngs=rngs)

    def norm(self, *, rngs: nnx.Rngs) -> "RMSNorm | nnx.LayerNorm":
        """A norm of the stream."""
        return RMSNorm(self.width, self.eps, offset=self.gemma, rngs=rngs)

    def block(self, *, rngs: nnx.Rngs) -> nnx.Module:
        """One layer: called as `Block` is."""
        return Block(self, rngs=rngs)

    def rope(self, positions: Array) -> tuple[Array, Array]:
        """Cosines and sines float32[..., r / 2] of int32[...] positions, r the rotated part."""
        angles = positions[..., None].astype(jnp.float32) * frequencies(self)
        return jnp.cos(angles), jnp.sin(angles)


def powers(config: LlamaConfig) -> np.ndarray:
    """theta^(2i / r), float32[r / 2] for the r features of a head that are rotated.

    Rounded step by step as transformers does: at position 4000 one rounding more moves an angle by
    2e-4.
    """
    size = int(config.head_dim * config.rotary)
    exponent = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    power = config.rope_theta ** exponent.astype(np.float64)  # torch's float32 power rounds once
    return power.astype(np.float32)


def frequencies(config: LlamaConfig) -> np.ndarray:
    """Rotary frequencies float32[r / 2], with Llama-3.1's scaling if the config has it."""
    freq = np.float32(1) / powers(config)
    if config.rope_scaling is None:
        return freq
    s = config.rope_scaling
    wavelength = np.float32(2 * np.pi) / freq
    slow = wavelength > s.original_context / s.low
    fast = wavelength < s.original_context / s.high
    smooth = (s.original_context / wavelength - s.low) / (s.high - s.low)
    blend = (1 - smooth) * freq / s.factor + smooth * freq
    return np.where(slow, freq / s.factor, np.where(fast, freq, blend)).astype(np.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Step:
    """What a call tells all blocks.

    Attributes:
        cos: cosines of the rotary angles, see `LlamaConfig.rope`.
        sin: their sines.
        see: bool[b, t, s], who sees whom; where s = t, nobody sees what comes later.
        real: bool[b, t], where that, padding and `segments` alone hide a token; None: the cache
            does, too.
        segments: int32[b, t], see `vfjax.fusion.segments.block`; None: they hide nothing.
        cache: of the call.
    """

    cos: Array
    sin: Array
    see: Array
    real: Array | None
    segments: Array | None
    cache: Cache | None


class Attention(nnx.Module):
    """Causal self-attention with rotary positions and grouped keys and values."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
        self.q = linear(c.width, q, ("embed", "heads"), bias=c.qkv_bias, rngs=rngs)
        self.k = linear(c.width, kv, ("embed", "heads"), bias=c.qkv_bias, rngs=rngs)
        self.v = linear(c.width, kv, ("embed", "heads"), bias=c.qkv_bias, rngs=rngs)
        self.out = linear(q, c.width, ("heads", "embed"), bias=c.out_bias, rngs=rngs)
        if c.qk_norm:
            self.q_norm = RMSNorm(c.head_dim, c.eps, rngs=rngs)
            self.k_norm = RMSNorm(c.head_dim, c.eps, rngs=rngs)

    def project(self, x: Array) -> tuple[Array, Array, Array]:
        """Queries [b, t, n * h], keys and values [b, t, g * h] of x [b, t, d]."""
        return self.q(x), self.k(x), self.v(x)

    def heads(self, x: Array, step: Step) -> tuple[Array, Array, Array]:
        """Queries [b, t, n, h], rotated, keys [b, t, g, h], rotated, and values of x [b, t, d]."""
        projected = apart(x.shape[1], self.project(x))
        q, k, v = (y.reshape(*x.shape[:2], -1, self.config.head_dim) for y in projected)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return _rotate_part(q, step.cos, step.sin), _rotate_part(k, step.cos, step.sin), v

    def __call__(self, x: Array, layer: int, step: Step) -> tuple[Array, tuple[Rows, Rows]]:
        """[b, t, d] -> [b, t, d], and all keys [b, g, h, s] and values [b, g, s, h]."""
        b, t, _ = x.shape
        q, k, v = self.heads(x, step)
        seen = step.see.shape[-1]
        read = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
        kept: tuple[Rows, Rows] = read
        if step.cache is not None:
            kept, read = step.cache.write(layer, *read, seen)
        causal = 1 < t == seen
        y = attend(q, *read, step.see, causal=causal, real=step.real, segments=step.segments)
        return self.out(y.reshape(b, t, -1)), kept


def apart(t: int, x: Tree) -> Tree:
    """`x`, which XLA does not fuse with what reads it where t, the tokens of a row, is one.

    Where a product's result is split into heads with an axis of one token, XLA for TPUs transposes
    the kernel, in memory, in each step of decoding; a norm before the head is computed again for
    each tile of the vocabulary (libtpu 0.0.42.1).
    """
    return jax.lax.optimization_barrier(x) if t == 1 else x


def _rotate_part(x: Array, cos: Array, sin: Array) -> Array:
    """`rotate` on the first features of each head, as many as there are angles for."""
    size = 2 * cos.shape[-1]
    if size == x.shape[-1]:
        return rotate(x, cos, sin)
    return jnp.concatenate([rotate(x[..., :size], cos, sin), x[..., size:]], axis=-1)


class MLP(GatedMLP):
    """The blocks' feed-forward."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        c = config
        super().__init__(c.width, c.mlp, c.act, bias=c.mlp_bias, rngs=rngs)


class Block(nnx.Module):
    """Pre-norm attention and feed-forward, each added to the stream."""

    def __init__(
        self,
        config: LlamaConfig,
        *,
        attn: type[Attention] = Attention,
        mlp: Callable[..., nnx.Module] = MLP,
        rngs: nnx.Rngs,
    ):
        self.norm1 = config.norm(rngs=rngs)
        self.attn = attn(config, rngs=rngs)
        self.norm2 = config.norm(rngs=rngs)
        self.mlp = mlp(config, rngs=rngs)

    def __call__(self, x: Array, layer: int, step: Step) -> tuple[Array, tuple[Rows, Rows]]:
        """[b, t, d] -> [b, t, d], and `Attention`'s keys and values."""
        y, kv = self.attn(self.norm1(x), layer, step)
        x = x + y
        return x + self.mlp(self.norm2(x)), kv


class Bias(nnx.Module):
    """What a tied head has of its own: y + bias, of the width of y."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.bias = param((width,), ("vocab",), rngs=rngs)

    def __call__(self, y: Array) -> Array:
        return y + self.bias[...]


class Llama(nnx.Module):
    """Token embeddings -> hidden states -> logits, with an explicit cache.

    `remat` computes each block again in the backward pass; for training, without a cache.
    `int8_cache` keeps keys and values as `vfjax.llm.cache.Int8Rows`. `stream` is how [b, t, d] lies
    between blocks (`vfjax.sharding.by_token`), where it divides them; None: `by_row`.
    """

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        self.remat = False
        self.int8_cache = False
        self.stream: NamedSharding | None = None
        self.embedding = param((c.vocab, c.width), ("vocab", "embed"), rngs=rngs)
        self.blocks = nnx.List(c.block(rngs=rngs) for _ in range(c.layers))
        self.norm = c.norm(rngs=rngs)
        self.head: nnx.Linear | Bias
        if not (c.tied or c.headless):
            self.head = linear(c.width, c.vocab, ("embed", "vocab"), bias=c.head_bias, rngs=rngs)
        elif c.head_bias and not c.headless:
            self.head = Bias(c.vocab, rngs=rngs)

    @property
    def scale(self) -> float:
        """Factor between the embedding table and what the blocks read: sqrt(width) in Gemma."""
        return self.config.width**0.5 if self.config.gemma else 1.0

    def scaled(self, x: Array) -> Array:
        """`x` times `scale`, rounded to the dtype of x as transformers rounds it."""
        return x if self.scale == 1.0 else x * jnp.asarray(self.scale, x.dtype)

    def lookup(self, ids: Array) -> Array:
        """Rows [..., d] of the embedding table, not scaled; ids outside it are undefined."""
        return self.embedding[...][ids]

    def embed(self, ids: Array) -> Array:
        """What the blocks read [..., d] of int32 ids; ids outside the vocabulary are undefined."""
        return self.scaled(self.lookup(ids))

    def new_cache(self, b: int, size: int) -> Cache:
        """An empty cache of `size` slots for `b` rows, in the embedding's dtype or int8."""
        c, dtype = self.config, self.embedding.dtype
        return Cache.empty(b, size, c.layers, c.kv_heads, c.head_dim, dtype, int8=self.int8_cache)

    def __call__(
        self,
        x: Array,
        mask: Array,
        cache: Cache | None = None,
        positions: Array | None = None,
        segments: Array | None = None,
        deep: Callable[[int, Array], Array] | None = None,
    ) -> tuple[Array, Cache | None]:
        """Runs all blocks and the final norm.

        Args:
            x: [b, t, d] token embeddings (from `embed`, or visual tokens among them, which are
                `scaled` where their branch says so).
            mask: bool[b, t], False at padding, wherever it stands.
            cache: what was read before; None reads x alone and keeps nothing.
            positions: int32[p, b, t], p 1, or 3 with M-RoPE; None counts real tokens.
            segments: int32[b, t]; tokens of two, neither of them 0, don't see each other
                (`vfjax.fusion.segments.block`). None: they do. With a cache, a new one only.
            deep: (number of a block, [b, t, d] that it gives) -> what the next one reads; see
                `vfjax.fusion.deep`. None: the same.

        Returns:
            [b, t, d] hidden states (undefined at padding) and the cache with x in it.
        """
        real: Array | None = mask
        if cache is None:
            if positions is None:
                positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)[None]
            before = mask[:, None] & jnp.tril(jnp.ones((x.shape[1],) * 2, bool))[None]
        else:
            new = cache.new
            cache, positions, before = cache.extend(mask, positions)
            real = cache.mask[:, : x.shape[1]] if new else None
        if segments is not None:
            before &= visible(segments)
        cos, sin = (self._by_axis(x) for x in self.config.rope(positions))
        step = Step(cos, sin, before, real, segments, cache)
        kept = []
        for i, block in enumerate(self.blocks):
            if self.stream is not None and divides(self.stream, x.shape):
                x = jax.lax.with_sharding_constraint(x, self.stream)
            elif x.shape[1] > 1:  # for one token reducing its features moves less
                x = by_row(x)
            if self.remat:
                x = jax.checkpoint(lambda x, block, step, i=i: block(x, i, step)[0])(x, block, step)
            else:
                x, kv = block(x, i, step)
                kept.append(kv)
            if deep is not None:
                given = functools.partial(deep, i)
                x = jax.checkpoint(given)(x) if self.remat else given(x)
        if cache is not None:
            keys, values = zip(*kept, strict=True)
            cache = dataclasses.replace(cache, k=keys, v=values)
        return apart(x.shape[1], self.norm(x)), cache

    def _by_axis(self, x: Array) -> Array:
        """Cosines or sines [p, b, t, f], of each frequency those of its own position: [b, t, f]."""
        if len(x) == 1 or not self.config.rope_axes:
            return x[0]
        axes = jnp.asarray(self.config.rope_axes)
        return jnp.take_along_axis(x, axes[None, None, None], axis=0)[0]

    def logits(self, hidden: Array) -> Array:
        """float32[..., vocab] logits of [..., d] hidden states.

        Raises:
            InputError: the decoder is headless.
        """
        c = self.config
        if c.headless:
            raise InputError(
                "model: lm_head",
                found="a language model without a head, which has hidden states alone",
                expected="a causal language model",
                fix="load the folder of the whole model (transformers' ...ForCausalLM)",
            )
        if c.tied:
            y = hidden @ self.embedding[...].T
            return (self.head(y) if c.head_bias else y).astype(jnp.float32)
        return self.head(hidden).astype(jnp.float32)
