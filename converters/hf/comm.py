"""COMM's branch (arXiv 2310.08825), twin of `vfjax.architectures.comm`."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from converters.hf.branch import Branch, Embed, Prompt, States, VisualTokens, all_of, register
from converters.hf.convnext import MLP
from vfjax import architectures


class Merge(nn.Module):
    """Hidden states [n, drop + s, D] of one encoder -> one feature [n, s, D]."""

    def __init__(self, config: architectures.MergeConfig):
        super().__init__()
        self.config = c = config
        if c.merge in ("lln_layerscale", "conv_layerscale"):
            self.layers = nn.ModuleList(self._layer() for _ in c.layers)
        if c.merge != "mean":
            self.logits = nn.Parameter(torch.zeros(len(c.layers)))
        self.mlp = nn.Sequential(
            *(MLP(c.width, c.ratio * c.width, "gelu") for _ in range(c.blocks))
        )

    def _layer(self) -> nn.Module:
        c = self.config
        linear = nn.Linear(c.width, c.width)
        if c.merge == "conv_layerscale":
            return nn.ModuleDict({"conv": linear})  # 1 x 1, stored as a matrix
        return nn.ModuleDict({"norm": nn.LayerNorm(c.width, c.eps), "linear": linear})

    def forward(self, states: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The feature of the hidden states at `config.layers`, computed in `dtype`."""
        c = self.config
        features = [s[:, c.drop :].to(dtype) for s in states]
        if c.merge == "mean":
            return self.mlp(sum(features[1:], start=features[0]) / len(features))
        if c.merge != "layerscale":
            features = [_applied(f, x) for f, x in zip(self.layers, features, strict=True)]
        shares = self.logits.float().softmax(dim=0).to(dtype)
        return self.mlp(sum(share * x for share, x in zip(shares, features, strict=True)))


def _applied(layer: nn.ModuleDict, x: Tensor) -> Tensor:
    for module in layer.values():
        x = module(x)
    return x


class COMM(nn.Module):
    """v = [merge(CLIP), MLP(merge(DINOv2))]; visual tokens = Linear(v) (section 3.2)."""

    def __init__(self, config: architectures.COMMConfig):
        super().__init__()
        self.config = config
        self.encoder = Merge(config.encoder)
        if config.aux is not None:
            self.aux = Merge(config.aux)
        self.projector = nn.Linear(config.width, config.dout)

    def forward(self, states: States) -> Tensor:
        """Visual tokens [n, s', D]; states as `vfjax.architectures.comm.COMM` takes them."""
        dtype = self.projector.weight.dtype
        features = [self.encoder(states["encoder"], dtype)]
        if self.config.aux is not None:
            features.append(self.aux(states["aux"], dtype))
        return self.projector(torch.cat(features, dim=2 if self.config.join == "channels" else 1))


@register("Comm")
class Comm(Branch):
    """One encoder or two, each with a merge of its own."""

    def __init__(self, architecture: architectures.Comm):
        super().__init__(architecture)
        self.connector = COMM(architecture.connector)

    def visual_tokens(
        self, states: States, embed: Embed, prompt: Prompt | None = None
    ) -> VisualTokens:
        """All tokens; see `Branch.visual_tokens`."""
        del embed, prompt
        return all_of(self.connector(states))
