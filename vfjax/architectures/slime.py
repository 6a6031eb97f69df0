"""SliME: the whole picture and tiles; gated adapter, local resampler, text-guided router.

SliME llava/model/multimodal_projector/builder.py, llava/model/multimodal_resampler and
llava/model/llava_arch.py; arXiv 2406.08487, section 3.
"""

import dataclasses
import math
from collections.abc import Container, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from vfjax.architectures.base import (
    AnyArray,
    Branch,
    Embed,
    Encoded,
    Inputs,
    Prompt,
    Size,
    VisualTokens,
    bucket,
)
from vfjax.architectures.boxes import NOWHERE, WHOLE, canvas, cells, cut, frame, within
from vfjax.architectures.combine import Combine
from vfjax.architectures.mlp import MLPConfig, Projecting
from vfjax.architectures.tapped import Shown, Tapped
from vfjax.nn.layers import attention, layer_norm, linear, param
from vfjax.vision import tiling
from vfjax.vision.images import preprocess
from vfjax.vision.resize import bicubic

Array = jax.Array

MAX_TILES = 6
"""The limit on the wanted number of tiles; the grid may have one more."""


@dataclasses.dataclass(frozen=True)
class SliMEConfig(Projecting):
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
        self, encoded: "EncodedSlices", embed: Embed, prompt: Prompt, key: Array | None = None
    ) -> VisualTokens:
        """The memory: of each picture the whole view, the separator, local tokens in raster order.

        Args:
            encoded: "encoder": hidden states [n * (1 + tiles), 1 + s, d] of `Slices`.
            embed: the LLM's embedding; the router has its own if the config says so.
            prompt: of each picture.
            key: in training, of the noise that is added to the gates' logits and router's scores.

        Returns:
            Tokens; local ones that the router leaves out are not kept; and what leads there.
        """
        c, ids, words = self.config, jnp.asarray(prompt.ids), jnp.asarray(prompt.mask)
        plain, _ = c.combine(encoded.states["encoder"])
        x = plain.reshape(-1, 1 + c.tiles, *plain.shape[1:])
        gate_key, router_key = (None, None) if key is None else jax.random.split(key)
        gates = self.gates(x[:, 0], gate_key)
        whole = self.mixed(x[:, 0], gates)
        small = self.sampler(x[:, 1:].reshape(-1, *x.shape[2:]))
        local = self.projector(small).reshape(len(x), c.tiles * c.queries, -1)
        local = jnp.take_along_axis(local, encoded.raster[..., None], axis=1)
        real = jnp.repeat(encoded.tile_mask, c.queries, axis=1)  # empty slots stay last
        text = self.embedding[...][ids] if c.vocab else embed(ids)
        scores = router(local, text, words)
        if router_key is not None:  # multimodal_resampler/builder.py, TextGuidedSampler
            scores += 0.1 * jax.random.normal(router_key, scores.shape, scores.dtype)
        selected = kept(jnp.where(real, scores, -jnp.inf) / c.temperature, real, c.top_p)
        n, d = len(x), whole.shape[-1]
        comma = jnp.broadcast_to(embed(jnp.asarray([c.separator])).astype(whole.dtype), (n, 1, d))
        before = jnp.full((n, whole.shape[1] + 1), c.shown != "local")
        before = before.at[:, -1].set(c.shown == "all")  # the separator stands between both
        keep = selected & (c.shown != "global")
        values = jnp.concatenate([whole, comma, local], axis=1).reshape(-1, d)
        keep = jnp.concatenate([before, keep], axis=1).reshape(-1)
        return VisualTokens(
            values,
            keep,
            stages={
                "vision_features": plain,
                "gates": gates,
                "global_features": whole,
                "local_compressed": small,
                "local_features": local,
                "router_scores": scores,
                "selected": selected,
                "image_features": values,
                "keep": keep,
            },
        )

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slices(Inputs):
    """Views of pictures, `1 + tiles` each: the whole, tiles in raster order, empty slots.

    Attributes:
        tile_mask: bool[n, tiles], False at empty slots.
        raster: int32[n, tiles * queries], where each local token stands in the raster over all
            tiles, empty ones last.
    """

    tile_mask: AnyArray = dataclasses.field(kw_only=True)
    raster: AnyArray = dataclasses.field(kw_only=True)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EncodedSlices(Encoded):
    """Hidden states of `Slices`, and what the connector needs of them."""

    tile_mask: AnyArray
    raster: AnyArray


class SlimeBranch(Branch):
    """Its connector reads the prompt, too."""

    def encode(self, inputs: Slices) -> EncodedSlices:  # type: ignore[override]
        """See `Branch.encode`."""
        return EncodedSlices(self.states(inputs), inputs.tile_mask, inputs.raster)

    def visual_tokens(  # type: ignore[override]
        self,
        encoded: EncodedSlices,
        embed: Embed,
        *,
        prompt: Prompt,
        key: Array | None = None,
    ) -> VisualTokens:
        """See `Branch.visual_tokens`; tokens that the router leaves out are not kept."""
        return self.connector(encoded, embed, prompt, key)


@dataclasses.dataclass(frozen=True)
class Slime(Tapped):
    """The whole picture and as many tiles as its size asks for; images' `aspect` is "crop"."""

    reads_text = True  # the router asks which tiles the prompt is about

    @property
    def side(self) -> int:
        """Tokens a side of a tile."""
        return math.isqrt(self.connector.queries)

    @property
    def tokens(self) -> int:
        """Tokens of a picture, at most: whole view, separator, tiles."""
        return self.patches + 1 + self.connector.tiles * self.side**2

    def show(
        self, pictures: Sequence[Image.Image], frames: Container[int] = (), slots: int | None = None
    ) -> Shown:
        """Inputs: `Slices`; see `Tapped.show`."""
        n, tiles = bucket(len(pictures)) if slots is None else slots, self.connector.tiles
        each, per_tile, size = self.tokens, self.side**2, self.images.size
        pixels = np.zeros((n, 1 + tiles, size, size, 3), np.float32)
        mask = np.zeros((n, tiles), bool)
        raster = np.tile(np.arange(tiles * per_tile, dtype=np.int32), (n, 1))
        indices = []
        for i, picture in enumerate(pictures):
            if i in frames:
                pixels[i, 0] = preprocess(picture, dataclasses.replace(self.images, aspect="pad"))
                indices.append(i * each + np.arange(self.patches))
                continue
            grid = adaptive_grid(picture.size, size)
            views = tiling.tiles(picture, grid, size)
            count = len(views) - 1
            pixels[i, : len(views)] = [preprocess(v, self.images) for v in views]
            mask[i, :count] = True
            raster[i, : count * per_tile] = tiling.raster_indices(grid, self.side).ravel()
            indices.append(i * each + np.arange(self.patches + 1 + count * per_tile))
        inputs = Slices(pixels.reshape(-1, *pixels.shape[2:]), tile_mask=mask, raster=raster)
        return Shown(inputs, indices, n * each)

    def regions(self, size: Size) -> np.ndarray:
        """See `Architecture.regions`; the separator has no place."""
        tile = self.images.size
        grid = adaptive_grid(size, tile)
        inner = frame(self.images, (tile, tile))
        tiles = cut(canvas(size, grid, tile), (grid[0] * self.side, grid[1] * self.side))
        return np.concatenate([cells(within(WHOLE, inner), self.patches), NOWHERE, tiles])

    def build(self, *, rngs: nnx.Rngs) -> SlimeBranch:
        return SlimeBranch(self, rngs=rngs)


def adaptive_grid(size: Size, tile: int) -> Size:
    """The grid of 2 to 7 tiles of a SliME picture.

    SliME's `select_best_resolution_uhd`: as many tiles as the picture's area fills, one fewer or
    one more, in any grid, whichever is the best resolution.

    Args:
        size: the picture's.
        tile: side of the encoder's input in pixels.
    """
    wanted = min(max(math.ceil(size[0] * size[1] / tile**2), 2), MAX_TILES)
    grids = [
        (cols, count // cols)
        for count in range(max(wanted - 1, 2), wanted + 2)
        for cols in range(1, count + 1)
        if count % cols == 0
    ]
    return tiling.anyres_grid(size, [(cols * tile, rows * tile) for cols, rows in grids], tile)
