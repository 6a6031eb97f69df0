"""SliME's connector: gated global adapter, local resampler, text-guided router.

SliME llava/model/multimodal_projector/builder.py, llava/model/multimodal_resampler and
llava/model/llava_arch.py; arXiv 2406.08487, section 3.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from vfjax.connectors.combine import Combine
from vfjax.connectors.mlp import MLPConfig
from vfjax.nn.layers import attention, layer_norm, linear, param
from vfjax.vision.resize import bicubic

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class SliMEConfig:
    """Sizes and options, under the names of the checkpoint's config where it has them.

    Attributes:
        projector: the MLP that global and local tokens share.
        width: of the encoder.
        queries: local tokens a tile after the resampler (mm_resampler_dim), a square number.
        grid: side of the encoder's token grid.
        separator: id of the token between global and local ones (`seperator`).
        top_p: share of the router's probability that is kept (mm_resampler_topp).
        temperature: of the router (mm_resampler_temp).
        gate: -1 mixes both experts, 0 or 1 takes that one (mm_learnable_gated).
        shown: which tokens the LLM reads: "all", or "global" or "local" ones alone, as the first
            stages of its training do (use_global_only, use_local_only).
        tiles: most tiles of a picture; fixes the number of slots.
        vocab: rows of an embedding of the router's own, a fused member's; 0: the LLM's is read.
    """

    projector: MLPConfig
    width: int
    grid: int = 24
    queries: int = 144
    separator: int = 1919
    top_p: float = 0.95
    temperature: float = 1.0
    gate: int = -1
    shown: Literal["all", "global", "local"] = "all"
    tiles: int = 7
    combine: Combine = Combine()
    vocab: int = 0

    switches = ("gate", "shown", "temperature", "top_p")
    """Fields that a stage of training may set: no weight's shape hangs on them."""

    @property
    def act(self) -> str:
        """Activation of the projector."""
        return self.projector.act

    @property
    def taps(self) -> dict[str, tuple[int, ...]]:
        """Hidden states that are read of each encoder."""
        return {"encoder": self.combine.taps}

    @property
    def channels(self) -> dict[str, tuple[int, int]]:
        """Encoder -> hidden states that are joined on channels, channels of all of them."""
        return {"encoder": (self.combine.width(1), self.projector.din)}

    @property
    def dout(self) -> int:
        """The LLM's width."""
        return self.projector.dout

    def build(self, *, rngs: nnx.Rngs) -> "SliME":
        return SliME(self, rngs=rngs)


class Resampler(nnx.Module):
    """Queries that read a grid of tokens once: [n, grid * grid, width] -> [n, queries, width].

    One cross-attention with positions on queries and keys, not on values. The keys' table is the
    queries' own, resized by torch's bicubic when the grids differ.
    """

    def __init__(self, width: int, queries: int, grid: int, *, rngs: nnx.Rngs):
        self.grid, self.heads = grid, max(1, width // 128)
        self.query = param((queries, width), (None, None), rngs=rngs)
        self.pos = nnx.Param(sines(math.isqrt(queries), width), axes=(None, None))
        self.norm_q, self.norm_kv, self.norm_post = (
            layer_norm(width, 1e-6, rngs=rngs) for _ in range(3)
        )
        self.q, self.k, self.v = (
            linear(width, width, ("embed", "heads"), rngs=rngs) for _ in range(3)
        )
        self.out = linear(width, width, ("heads", "embed"), rngs=rngs)

    def redraw(self, rngs: nnx.Rngs) -> None:
        """Draws the attention's weights as torch's MultiheadAttention does, in place.

        Queries, keys and values are one matrix there, uniform by Xavier's rule; biases are zero.
        """
        width = self.q.kernel.shape[0]
        bound = math.sqrt(6 / (4 * width))
        for layer in (self.q, self.k, self.v):
            shape = layer.kernel.shape
            drawn = jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)
            layer.kernel[...] = drawn
        for layer in (self.q, self.k, self.v, self.out):
            assert layer.bias is not None
            layer.bias[...] = jnp.zeros(width)

    def __call__(self, x: Array) -> Array:
        n, s, d = x.shape
        x = self.norm_kv(x)
        pos = jax.lax.stop_gradient(self.pos[...])  # upstream's requires no gradient
        query = jnp.broadcast_to(self.norm_q(self.query[...]) + pos, (n, *self.pos.shape))
        split = (n, -1, self.heads, d // self.heads)
        q, k, v = self.q(query), self.k(x + self.key_positions()), self.v(x)
        y = attention(q.reshape(split), k.reshape(split), v.reshape(split))
        return self.norm_post(self.out(y.reshape(n, -1, d)))

    def key_positions(self) -> Array:
        """The table [grid * grid, width] at the keys' grid."""
        side, pos = math.isqrt(self.pos.shape[0]), jax.lax.stop_gradient(self.pos[...])
        if side == self.grid:
            return pos
        weights = jnp.asarray(bicubic(side, self.grid, antialias=False), jnp.float32)
        table = pos.reshape(side, side, -1).astype(jnp.float32)
        table = jnp.einsum("yi,xj,ijd->yxd", weights, weights, table, precision="highest")
        return table.reshape(self.grid**2, -1).astype(pos.dtype)


def sines(side: int, width: int) -> Array:
    """Positions of a grid, float32[side * side, width]: sines, cosines of the column, of the row.

    SliME llava/model/multimodal_resampler/sampler.py, get_2d_sincos_pos_embed.
    """
    omega = 10000.0 ** (-jnp.arange(width // 4) / (width // 4))
    angles = jnp.arange(side)[:, None] * omega
    axis = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
    column, row = jnp.tile(axis, (side, 1)), jnp.repeat(axis, side, axis=0)
    return jnp.concatenate([column, row], axis=1)


class SliME(nnx.Module):
    """Hidden states of a whole view and of tiles -> visual tokens, and which of them are kept."""

    def __init__(self, config: SliMEConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        self.projector = c.projector.build(rngs=rngs)
        self.expert = Resampler(c.width, c.grid**2, c.grid, rngs=rngs)
        self.sampler = Resampler(c.width, c.queries, c.grid, rngs=rngs)
        self.gate = nnx.Param(jnp.zeros((c.width, 2)), axes=(None, None))  # as upstream begins
        if c.vocab:
            self.embedding = param((c.vocab, c.projector.dout), ("vocab", "embed"), rngs=rngs)

    def __call__(
        self,
        states: Mapping[str, Sequence[Array]],
        inputs: Mapping[str, Array],
        embed: Callable[[Array], Array],
    ) -> dict[str, Array]:
        """Stages up to the visual tokens.

        Args:
            states: "encoder": hidden states [n * (1 + tiles), 1 + s, d], picture by picture, the
                whole view first, then tiles in raster order, then empty slots.
            inputs: "tile_mask" bool[n, tiles], False at empty slots; "raster" int32[n, tiles *
                queries], where each local token stands in the raster over all tiles, empty ones
                last; "text" int32[n, l] ids of the picture's prompt; "text_mask" bool[n, l]; in
                training "noise", a key of the random numbers that are added to the gates' logits
                and the router's scores.
            embed: the LLM's embedding; the router has its own if the config says so.

        Returns:
            tokens: of each picture the whole view's s, the separator, the local ones in raster
            order; keep, False at the local ones that the router leaves out; and what leads there.
        """
        c = self.config
        plain, _ = c.combine(states["encoder"])
        x = plain.reshape(-1, 1 + c.tiles, *plain.shape[1:])
        gate_key, router_key = (
            jax.random.split(inputs["noise"]) if "noise" in inputs else (None,) * 2
        )
        gates = self.gates(x[:, 0], gate_key)
        whole = self.mixed(x[:, 0], gates)
        small = self.sampler(x[:, 1:].reshape(-1, *x.shape[2:]))
        local = self.projector(small).reshape(len(x), c.tiles * c.queries, -1)
        local = jnp.take_along_axis(local, inputs["raster"][..., None], axis=1)
        real = jnp.repeat(inputs["tile_mask"], c.queries, axis=1)  # empty slots stay last
        text = self.embedding[...][inputs["text"]] if c.vocab else embed(inputs["text"])
        scores = router(local, text, inputs["text_mask"])
        if router_key is not None:  # multimodal_resampler/builder.py, TextGuidedSampler
            scores += 0.1 * jax.random.normal(router_key, scores.shape, scores.dtype)
        selected = kept(jnp.where(real, scores, -jnp.inf) / c.temperature, real, c.top_p)
        n, d = len(x), whole.shape[-1]
        comma = jnp.broadcast_to(embed(jnp.asarray([c.separator])).astype(whole.dtype), (n, 1, d))
        before = jnp.full((n, whole.shape[1] + 1), c.shown != "local")
        before = before.at[:, -1].set(c.shown == "all")  # the separator stands between both
        keep = selected & (c.shown != "global")
        return {
            "vision_features": plain,
            "gates": gates,
            "global_features": whole,
            "local_compressed": small,
            "local_features": local,
            "router_scores": scores,
            "selected": selected,
            "tokens": jnp.concatenate([whole, comma, local], axis=1).reshape(-1, d),
            "keep": jnp.concatenate([before, keep], axis=1).reshape(-1),
        }

    def gates(self, x: Array, key: Array | None = None) -> Array:
        """Shares [n, s, 2] of the two experts; with a key, of logits with noise.

        The noise's deviation is made of the logits themselves: upstream's code has a weight for it
        (`w_noise`) that it does not read.
        """
        logits = x @ self.gate[...]
        if key is not None:
            deviation = jax.nn.softplus(logits) + 0.01
            logits += deviation * jax.random.normal(key, logits.shape, logits.dtype)
        p = jax.nn.softmax(logits, axis=-1)
        return p / (p.sum(axis=-1, keepdims=True) + 1e-6)

    def mixed(self, x: Array, gates: Array) -> Array:
        """The global adapter: [n, s, d] -> [n, s, D]; both experts share one MLP."""
        experts = (lambda: self.projector(x), lambda: self.projector(self.expert(x)))
        if self.config.gate >= 0:
            return experts[self.config.gate]()
        return gates[..., :1] * experts[0]() + gates[..., 1:] * experts[1]()


def router(local: Array, text: Array, text_mask: Array) -> Array:
    """Score float32[n, l] of each local token: its cosines with the text, summed.

    Args:
        local: [n, l, D] tokens.
        text: [n, t, D] embeddings of the prompt.
        text_mask: bool[n, t].
    """

    def unit(x: Array) -> Array:
        x = x.astype(jnp.float32)
        return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-8)

    cosines = jnp.einsum("nld,ntd->nlt", unit(local), unit(text), precision="highest")
    return jnp.where(text_mask[:, None], cosines, 0).sum(axis=-1)


def kept(logits: Array, real: Array, top_p: float) -> Array:
    """The likeliest tokens whose probabilities sum to at most `top_p`, and one more: bool[n, l]."""
    p = jax.nn.softmax(logits, axis=-1)
    order = jnp.argsort(-p, axis=-1)  # stable
    ranked = jnp.take_along_axis(p, order, axis=-1)
    count = (jnp.cumsum(ranked, axis=-1) <= top_p).sum(axis=-1) + 1
    rank = jnp.argsort(order, axis=-1)
    return (rank < count[:, None]) & real
