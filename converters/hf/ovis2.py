"""Ovis2 in torch: the twin of `vfjax.architectures.ovis2`; the tower is of transformers' parts."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Ovis2VisionConfig
from transformers.models.ovis2.modeling_ovis2 import (
    Ovis2PreTrainedModel,
    Ovis2VisionTransformer,
    hard_softmax,
)

from converters.hf import encoders
from converters.hf.branch import Branch, Embed, Prompt, States, VisualTokens, all_of, register
from converters.hf.idefics import normed
from vfjax import architectures
from vfjax.architectures.pixel_shuffle import joined_patches
from vfjax.vision.encoders import AIMv2Config


class Tower(Ovis2PreTrainedModel):
    """Ovis2VisionTransformer as a model by itself, so that transformers fills its buffers."""

    config: Ovis2VisionConfig

    def __init__(self, config: Ovis2VisionConfig):
        super().__init__(config)
        made = Ovis2VisionTransformer(config)
        self.embeddings, self.encoder, self.rms_norm = made.embeddings, made.encoder, made.rms_norm
        self.post_init()

    forward = Ovis2VisionTransformer.forward


class Vocabulary(nn.Module):
    """The last hidden state -> visual tokens: a head over visual words, and their table."""

    def __init__(self, config: architectures.VocabularyConfig):
        super().__init__()
        self.config, words = config, config.words - config.marks
        self.head_linear = nn.Linear(config.din, words, bias=False)
        self.head_norm = nn.LayerNorm(words)
        self.table = nn.Embedding(config.words, config.dout)

    def forward(self, state: Tensor) -> Tensor:
        """All views' tokens of [n, s * s, d], the marks behind them: [m, dout]."""
        blocks = joined_patches(state, self.config.stride)
        shares = self.shares(self.head_norm(self.head_linear(blocks)))
        table = self.table(torch.arange(self.config.words, device=state.device))
        words, marks = table.split([shares.shape[-1], self.config.marks])
        return torch.cat([(shares @ words).flatten(0, 1), marks])

    def shares(self, logits: Tensor) -> Tensor:
        """What each word has of a token, [..., words]; see `vfjax.architectures.ovis2.Choice`.

        Drawn in training alone.
        """
        if self.config.choice == "softmax":
            return logits.softmax(dim=-1)
        if self.config.choice == "gumbel_argmax" and self.training:
            return F.gumbel_softmax(logits, dim=-1, hard=True)
        return hard_softmax(logits, dim=-1)


def tower(config: AIMv2Config) -> nn.Module:
    """Transformers' tower."""
    keys = encoders.vit(config)
    keys["rms_norm_eps"] = keys.pop("layer_norm_eps")
    keys |= {"intermediate_size": config.mlp, "mlp_bias": config.mlp_bias}
    return Tower(Ovis2VisionConfig(**keys, qkv_bias=config.qkv_bias))


encoders.register(AIMv2Config, encoders.Kind(tower, normed))


@register("Ovis2")
class Ovis2(Branch):
    """Views of pictures -> visual tokens."""

    def __init__(self, architecture: architectures.Ovis2):
        super().__init__(architecture)
        self.connector = Vocabulary(architecture.connector)

    def visual_tokens(
        self, states: States, embed: Embed, prompt: Prompt | None = None
    ) -> VisualTokens:
        """All views' tokens, the marks behind them; see `Branch.visual_tokens`."""
        del embed, prompt
        return all_of(self.connector(*states["encoder"])[None])
