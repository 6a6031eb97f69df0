"""SliME's branch: gated adapter, local resampler, text-guided router.

Twin of `vfjax.architectures.slime`. SliME llava/model/multimodal_projector/builder.py,
llava/model/multimodal_resampler and llava/model/llava_arch.py; arXiv 2406.08487, section 3.
"""

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from converters.hf.branch import (
    Branch,
    Embed,
    Inputs,
    Prompt,
    States,
    VisualTokens,
    register,
)
from converters.hf.dense_connector import combine
from converters.hf.llava import Projector
from vfjax import architectures


class Attention(nn.Module):
    """`nn.MultiheadAttention` under its names, [n, s, d] queries and [n, t, d] keys and values.

    torch's own reads the weight of `out_proj` without calling it: weights that are fetched when a
    module is called (`device_map` with "cpu" or "disk") would be missed.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, w, b).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Resampler(nn.Module):
    """Queries that read a grid of tokens once: [n, grid * grid, width] -> [n, queries, width].

    One cross-attention with positions on queries and keys, not on values. The keys' table is the
    queries' own, resized by torch's bicubic when the grids differ.
    """

    def __init__(self, width: int, queries: int, grid: int):
        super().__init__()
        self.grid = grid
        self.query = nn.Parameter(torch.zeros(queries, width))
        self.pos_embed = nn.Parameter(torch.zeros(queries, width), requires_grad=False)
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.attn = Attention(width, max(1, width // 128))

    def forward(self, x: Tensor) -> Tensor:
        x = self.ln_kv(x)
        query = (self.ln_q(self.query) + self.pos_embed).expand(len(x), -1, -1)
        return self.ln_post(self.attn(query, x + self.key_positions(), x))

    def key_positions(self) -> Tensor:
        """The table [grid * grid, width] at the keys' grid."""
        side = math.isqrt(len(self.pos_embed))
        if side == self.grid:
            return self.pos_embed
        table = self.pos_embed.float().T.unflatten(1, (side, side))[None]
        table = F.interpolate(table, size=(self.grid, self.grid), mode="bicubic")
        return table[0].flatten(1).T.to(self.pos_embed.dtype)


class Adapter(nn.Module):
    """The global adapter: an MLP on the tokens, and on what queries read of them, gated."""

    def __init__(self, config: architectures.SliMEConfig):
        super().__init__()
        self.gate = config.gate
        self.projection = Projector(config.projector)
        self.attn = Resampler(config.width, config.grid**2, config.grid)
        self.w_gate = nn.Parameter(torch.zeros(config.width, 2))

    def forward(self, x: Tensor) -> Tensor:
        """[n, s, d] -> [n, s, D]; both experts share one MLP."""
        experts = (lambda: self.projection(x), lambda: self.projection(self.attn(x)))
        if self.gate >= 0:
            return experts[self.gate]()
        gates = self.gates(x)
        return gates[..., :1] * experts[0]() + gates[..., 1:] * experts[1]()

    def gates(self, x: Tensor) -> Tensor:
        """Shares [n, s, 2] of the two experts; in training, of logits with noise."""
        logits = x @ self.w_gate
        if self.training:
            logits = logits + (F.softplus(logits) + 0.01) * torch.randn_like(logits)
        shares = logits.softmax(dim=-1)
        return shares / (shares.sum(dim=-1, keepdim=True) + 1e-6)


class SliME(nn.Module):
    """Hidden states of a whole view and of tiles -> visual tokens, and which of them are kept."""

    def __init__(self, config: architectures.SliMEConfig):
        super().__init__()
        self.config = config
        self.mm_projector = Adapter(config)
        sampler = Resampler(config.width, config.queries, config.grid)
        self.sampler = nn.ModuleDict({"post_qformer": sampler})
        if config.vocab:
            self.embedding = nn.Embedding(config.vocab, config.projector.dout)

    def forward(
        self,
        states: Sequence[Tensor],
        tile_mask: Tensor,
        raster: Tensor,
        embed: Embed,
        prompt: Prompt,
    ) -> VisualTokens:
        """The memory: of each picture the whole view, the separator, local tokens in raster order.

        Args:
            states: hidden states [n * (1 + tiles), prefix + s, d].
            tile_mask: bool[n, tiles], False at empty slots.
            raster: int[n, tiles * queries], where each local token stands in the raster.
            embed: the LLM's embedding; the router has its own if the config says so.
            prompt: of each picture.
        """
        c, project = self.config, self.mm_projector.projection
        first = dataclasses.replace(c.combine, groups=c.combine.groups[:1], side=0)
        x = combine(first, states[: len(first.taps)]).unflatten(0, (-1, 1 + c.tiles))
        whole = self.mm_projector(x[:, 0])
        local = project(self.sampler["post_qformer"](x[:, 1:].flatten(0, 1)))
        local = local.unflatten(0, (-1, c.tiles)).flatten(1, 2)
        tile_mask, raster, words = (x.to(local.device) for x in (tile_mask, raster, prompt.mask))
        local = local.gather(1, raster.long()[..., None].expand_as(local))
        real = tile_mask.repeat_interleave(c.queries, dim=1)  # empty slots stay last
        text = self.embedding(prompt.ids) if c.vocab else embed(prompt.ids)
        scores = router(local, text.to(local.device), words)
        if self.training:  # multimodal_resampler/builder.py, TextGuidedSampler
            scores = scores + 0.1 * torch.randn_like(scores)
        scores = scores.masked_fill(~real, -torch.inf) / c.temperature
        n, d = len(x), whole.shape[-1]
        comma = embed(prompt.ids.new_tensor([c.separator])).to(whole)
        before = real.new_full((n, whole.shape[1] + 1), c.shown != "local")
        before[:, -1] = c.shown == "all"  # the separator stands between both
        keep = kept(scores, real, c.top_p) & (c.shown != "global")
        values = torch.cat([whole, comma.expand(n, 1, d), local], dim=1)
        return VisualTokens(values.flatten(0, 1), torch.cat([before, keep], dim=1).flatten())


def router(local: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    """Score float32[n, l] of each local token: its cosines with the text, summed.

    Args:
        local: [n, l, D] tokens.
        text: [n, t, D] embeddings of the prompt.
        mask: bool[n, t], False at padding.
    """
    local, text = (F.normalize(x.float(), dim=-1, eps=1e-8) for x in (local, text))
    return (local @ text.mT).masked_fill(~mask[:, None], 0).sum(dim=-1)


def kept(logits: Tensor, real: Tensor, top_p: float) -> Tensor:
    """The likeliest tokens whose probabilities sum to at most `top_p`, and one more: bool[n, l]."""
    ranked, order = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    count = (ranked.cumsum(dim=-1) <= top_p).sum(dim=-1) + 1
    return (order.argsort(dim=-1) < count[:, None]) & real


@register("Slime")
class Slime(Branch):
    """Its connector reads the prompt, too."""

    def __init__(self, architecture: architectures.Slime):
        super().__init__(architecture)
        self.connector = SliME(architecture.connector)

    def encode(self, inputs: Inputs) -> States:
        """Hidden states; beside them, what else the connector needs of the inputs."""
        return super().encode(inputs) | {key: [inputs[key]] for key in ("tile_mask", "raster")}

    def visual_tokens(
        self, states: States, embed: Embed, prompt: Prompt | None = None
    ) -> VisualTokens:
        """The memory; tokens that the router leaves out are not kept; see `SliME`."""
        assert prompt is not None, "SliME's router reads the prompt"
        (tile_mask,), (raster,) = states["tile_mask"], states["raster"]
        return self.connector(states["encoder"], tile_mask, raster, embed, prompt)
