"""Idefics3 and SmolVLM: the twin of `vfjax.architectures.idefics`, of transformers' own modules.

The two models' towers and connectors are the same.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from transformers import Idefics3Config, Idefics3VisionConfig, LlamaConfig
from transformers.models.idefics3.modeling_idefics3 import (
    Idefics3Connector,
    Idefics3VisionTransformer,
)

from converters.hf import encoders
from converters.hf.branch import Branch, Embed, Prompt, States, VisualTokens, all_of, register
from vfjax import architectures
from vfjax.vision.encoders import IdeficsConfig


def tower(config: IdeficsConfig) -> nn.Module:
    """Transformers' tower."""
    keys = {**encoders.vit(config), "intermediate_size": config.mlp}
    return Idefics3VisionTransformer(Idefics3VisionConfig(**keys))


def normed(module: nn.Module, pixels: Tensor, taps: Sequence[int]) -> list[Tensor]:
    """The last hidden state behind the last norm, which is all that is read."""
    assert tuple(taps) == (-1,)
    images = pixels.permute(0, 3, 1, 2).to(next(module.parameters()).dtype)
    return [module(images).last_hidden_state]


encoders.register(IdeficsConfig, encoders.Kind(tower, normed))


@register("Idefics")
class Idefics(Branch):
    """Views of pictures -> visual tokens."""

    def __init__(self, architecture: architectures.Idefics):
        super().__init__(architecture)
        tower, config = self.encoder.config, architecture.connector
        text = LlamaConfig(hidden_size=config.dout)
        self.connector = Idefics3Connector(
            Idefics3Config(vision_config=tower, text_config=text, scale_factor=config.factor)
        )

    def visual_tokens(
        self, states: States, embed: Embed, prompt: Prompt | None = None
    ) -> VisualTokens:
        """All views' tokens; see `Branch.visual_tokens`."""
        del embed, prompt
        return all_of(self.connector(*states["encoder"]))
