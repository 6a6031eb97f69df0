"""LLaVA-1.5 (arXiv 2310.03744), and Dense Connector on it: the twin of `architectures.llava`."""

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from converters.hf.branch import Branch, Embed, Prompt, States, VisualTokens, all_of, register
from converters.hf.dense_connector import combine
from vfjax.architectures import Architecture, MLPConfig, ProjectorConfig


class Projector(nn.Sequential):
    """LLaVA's projector: linear layers at even places, the activation between.

    `newline`, of LLaVA-NeXT, is what ends a row of patches.
    """

    def __init__(self, config: MLPConfig, *, newline: bool = False):
        layers: list[nn.Module] = []
        for i in range(config.layers):
            layers += [ACT2FN[config.act]] * (i > 0)
            layers += [nn.Linear(config.dout if i else config.din, config.dout, bias=config.bias)]
        super().__init__(*layers)
        if newline:
            self.image_newline = nn.Parameter(torch.zeros(config.dout))

    def forward(self, features: Tensor) -> Tensor:
        """Features [n, s, din] -> visual tokens [n, s, dout]."""
        return super().forward(features.to(self[0].weight.dtype))


@register("Llava")
class Llava(Branch):
    """Each picture is one view, its tokens projected."""

    connector: Projector

    def __init__(self, architecture: Architecture):
        super().__init__(architecture)
        config: ProjectorConfig = self.architecture.connector
        self.connector = Projector(config.projector, newline=config.newline)

    def visual_tokens(
        self, states: States, embed: Embed, prompt: Prompt | None = None
    ) -> VisualTokens:
        """The memory, the newline behind it; see `Branch.visual_tokens`."""
        del embed, prompt
        config: ProjectorConfig = self.architecture.connector
        memory = all_of(self.connector(combine(config.combine, states["encoder"])))
        if not config.newline:
            return memory
        newline = self.connector.image_newline.to(memory.values)[None]
        keep = memory.keep.new_ones(len(memory.keep) + 1)
        return VisualTokens(torch.cat([memory.values, newline]), keep)
