"""Cambrian-1's branch: the Spatial Vision Aggregator, twin of `vfjax.architectures.cambrian`.

Cambrian cambrian/model/cambrian_arch.py and vision_sampler.py; arXiv 2406.16860, section 4.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, scaled_dot_product_attention

from converters.hf import encoders
from converters.hf.branch import (
    Branch,
    Embed,
    Inputs,
    Prompt,
    States,
    VisualTokens,
    all_of,
    register,
)
from converters.hf.llava import Projector
from converters.hf.mini_gemini import asker
from vfjax import architectures
from vfjax.architectures.cambrian import HEADS
from vfjax.architectures.mlp import MLPConfig


class CrossAttention(nn.Module):
    """Queries [m, d] ask the towers' features of their cells."""

    def __init__(self, width: int, towers: int):
        super().__init__()
        self.towers = towers
        self.q_proj = asker(width, width, bias=False)
        for i in range(towers):
            self.add_module(f"k_proj_{i}", asker(width, width, bias=False))
            self.add_module(f"v_proj_{i}", asker(width, width, bias=False))
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, queries: Tensor, features: Sequence[Tensor], mask: Tensor) -> Tensor:
        """What they find, [m, d]; other arguments as of `Sampler.forward`."""
        keys, values = (
            torch.cat(
                [self.get_submodule(f"{kind}_proj_{i}")(f) for i, f in enumerate(features)], dim=1
            )
            for kind in "kv"
        )
        q, k, v = (
            x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for x in (self.q_proj(queries)[:, None], keys, values)
        )
        found = scaled_dot_product_attention(q, k, v, mask[:, None, None])
        return self.o_proj(found.flatten(1))


class Bottleneck(nn.Module):
    """Two dense layers around an exact GELU."""

    def __init__(self, din: int, hidden: int, dout: int):
        super().__init__()
        self.linear_1 = nn.Linear(din, hidden, bias=False)
        self.linear_2 = nn.Linear(hidden, dout, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(nn.functional.gelu(self.linear_1(x)))


class Sampler(nn.Module):
    """One cross-attention of queries [m, q] to the features of their cells (equation 1)."""

    def __init__(self, config: architectures.SVAConfig, q: int, side: int):
        super().__init__()
        d = config.width
        self.proj_context = nn.Linear(d, d, bias=False)
        self.proj_in = nn.Linear(q + d, d, bias=False)
        self.proj_out = Bottleneck(d, d, q)
        self.norm = nn.LayerNorm(d)
        self.cross_attn = CrossAttention(d, len(config.towers))
        self.sides = config.cell(side)
        for i, k in enumerate(self.sides):
            if k > 1:
                self.register_parameter(f"pos_embed_{i}", nn.Parameter(torch.zeros(k * k, d)))

    def forward(
        self, queries: Tensor, context: Tensor, features: Sequence[Tensor], mask: Tensor
    ) -> Tensor:
        """What is added to the queries, [m, q].

        Args:
            queries: [m, q].
            context: [m, width].
            features: of each tower [m, k * k, width], those of the query's cell.
            mask: bool[m, s], which of all of them show the picture.
        """
        queries = queries.to(self.norm.weight.dtype)
        x = self.proj_in(torch.cat([queries, self.proj_context(context)], dim=-1))
        placed = [
            f + self.get_parameter(f"pos_embed_{i}") if side > 1 else f
            for i, (f, side) in enumerate(zip(features, self.sides, strict=True))
        ]
        return self.proj_out(self.norm(x + self.cross_attn(x, placed, mask)))


def samplers(made: Sequence[Sampler]) -> nn.ModuleDict:
    """Samplers one after another, as the authors name them."""
    return nn.ModuleDict({"layers": nn.ModuleList(made)})


class SVA(nn.Module):
    """Features of all towers -> visual tokens, and what these may ask for within the LLM."""

    def __init__(self, config: architectures.SVAConfig):
        super().__init__()
        c = self.config = config
        self.mm_projector = Projector(MLPConfig(c.width * len(c.queries), c.dout))
        for i, tower in enumerate(c.towers):
            layers = (nn.Linear(tower.width, c.width), nn.GELU(), nn.Linear(c.width, c.width))
            self.add_module(f"mm_projector_aux_{i}", nn.Sequential(*layers, nn.LayerNorm(c.width)))
        for g, side in enumerate(c.queries):
            made = [Sampler(c, c.width, side) for _ in range(c.depth)]
            self.add_module(f"vision_sampler_{g}", samplers(made))
        if c.layers:
            self.vision_sampler_layers = nn.ModuleList(
                samplers([Sampler(c, c.dout, c.side)]) for _ in c.layers
            )
        self.vision_query = nn.Parameter(torch.zeros(len(c.queries), c.width))
        self.image_newline = nn.Parameter(torch.zeros(c.dout))

    def forward(
        self, states: Mapping[str, Sequence[Tensor]], masks: Mapping[str, Tensor]
    ) -> VisualTokens:
        """The memory, the newline behind it.

        Args:
            states: encoder -> hidden states at its taps.
            masks: encoder -> bool[n, side, side], where its feature shows the picture.
        """
        c = self.config
        features = [
            self.get_submodule(f"mm_projector_aux_{i}")(
                raster(states[name], tower).to(self.vision_query.dtype)
            )
            for i, (name, tower) in enumerate(zip(c.names, c.towers, strict=True))
        ]
        n, context = len(features[0]), features[0].mean(dim=1)
        shown = [masks[name] for name in c.names]
        found = []
        for g, side in enumerate(c.queries):
            cells = [cut(each, side) for each in features]
            every, mask = context.repeat_interleave(side * side, 0), seen(shown, side)
            x = self.vision_query[g].expand(len(every), -1)
            for sampler in self.get_submodule(f"vision_sampler_{g}")["layers"]:
                x = x + sampler(x, every, cells, mask)
            found.append(resized(x.reshape(n, side, side, -1), c.side).flatten(1, 2))
        memory = all_of(self.mm_projector(torch.cat(found, dim=-1)))
        newline = self.image_newline.to(memory.values)[None]
        own = None
        if c.layers:
            cells = [cut(each, c.side) for each in features]
            own = (context.repeat_interleave(c.side**2, 0), seen(shown, c.side), *cells)
        return VisualTokens(
            torch.cat([memory.values, newline]),
            memory.keep.new_ones(len(memory.keep) + 1),
            seen=own,
        )


def raster(states: Sequence[Tensor], tower: architectures.TowerConfig) -> Tensor:
    """A tower's feature [n, side * side, width]: its states, resized each and joined."""
    found = []
    for x in states:
        if x.ndim == 3:
            x = x[:, tower.drop :]
            x = x.unflatten(1, (math.isqrt(x.shape[1]), -1))
        found.append(resized(x, tower.side))
    return torch.cat(found, dim=-1).flatten(1, 2)


def resized(x: Tensor, side: int) -> Tensor:
    """Maps [n, h, w, d] -> [n, side, side, d], bilinearly, in float32."""
    if x.shape[1:3] == (side, side):
        return x
    maps = x.movedim(-1, 1).float()
    made = interpolate(maps, (side, side), mode="bilinear", align_corners=False)
    return made.movedim(1, -1).to(x.dtype)


def cut(x: Tensor, side: int) -> Tensor:
    """[n, s * s, ...] of a raster -> [n * side * side, k * k, ...], the tokens of each cell."""
    s = math.isqrt(x.shape[1])
    x = x.unflatten(1, (side, s // side, side, s // side)).transpose(2, 3)
    return x.flatten(3, 4).flatten(0, 2)


def seen(masks: Sequence[Tensor], side: int) -> Tensor:
    """bool[n * side * side, s]; a tower is seen whole in a cell where nothing shows the picture."""
    parts = [cut(each.flatten(1), side) for each in masks]
    return torch.cat([x | ~x.any(dim=1, keepdim=True) for x in parts], dim=1)


@register("Cambrian")
class Cambrian(Branch):
    """Some towers end in their norm; tokens ask for more within the LLM."""

    def __init__(self, architecture: architectures.Cambrian):
        super().__init__(architecture)
        self.connector = SVA(architecture.connector)
        self.layers = architecture.connector.layers

    def encode(self, inputs: Inputs) -> States:
        """Hidden states at the connector's taps, and the masks of `Padded` as "masks.NAME"."""
        states, c = super().encode(inputs), self.architecture.connector
        for name, tower in zip(c.names, c.towers, strict=True):
            if tower.norm:
                norm = encoders.final_norm(self.get_submodule(name))
                states[name] = [norm(x) for x in states[name]]
        return states | {f"masks.{name}": [inputs[f"masks.{name}"]] for name in c.names}

    def visual_tokens(
        self, states: States, embed: Embed, prompt: Prompt | None = None
    ) -> VisualTokens:
        """The memory, the newline behind it; see `Branch.visual_tokens`."""
        del embed, prompt
        masks = {name: states[f"masks.{name}"][0] for name in self.architecture.connector.names}
        return self.connector(states, masks)

    def within(self, layer: int, x: Tensor, seen: Sequence[Tensor]) -> Tensor:
        """See `Branch.within`."""
        context, mask, *cells = seen
        (sampler,) = self.connector.vision_sampler_layers[self.layers.index(layer)]["layers"]
        return sampler(x, context, cells, mask)
