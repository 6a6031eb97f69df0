"""Qwen3-VL: the twin of `vfjax.architectures.qwen3_vl`, of transformers' own modules."""

import torch
from torch import nn
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from converters.hf.branch import Embed, Inputs, Prompt, States, VisualTokens, all_of, register
from converters.hf.qwen_vl import QwenVL, keys
from vfjax import architectures

MERGERS = ("merger", "deepstack_merger_list")
"""Of the last state, and of those of some layers."""


@register("Qwen3VL")
class Qwen3VL(QwenVL):
    """Patches of all pictures -> visual tokens, and what is added to them in the LLM."""

    def __init__(self, architecture: architectures.Qwen3VL):
        nn.Module.__init__(self)
        self.architecture = architecture
        c, connector = architecture.encoder, architecture.connector
        *taps, _ = connector.taps["encoder"]
        self.encoder = Qwen3VLVisionModel(
            Qwen3VLVisionConfig(
                **keys(architecture),
                hidden_size=c.width,
                intermediate_size=c.mlp,
                out_hidden_size=connector.dout,
                num_position_embeddings=c.side**2,
                deepstack_visual_indexes=[tap - 1 for tap in taps],
            )
        )
        self.connector = nn.ModuleDict({name: getattr(self.encoder, name) for name in MERGERS})
        # The tower gives back the states that these would read.
        self.encoder.merger = nn.Identity()
        self.encoder.deepstack_merger_list = nn.ModuleList(nn.Identity() for _ in taps)

    def encode(self, inputs: Inputs) -> States:
        """The states that are merged [1, n, width], the last one last; zero at padding."""
        learned = {f"interp_{name}": inputs[name] for name in ("indices", "weights")}
        seen = self.seen(inputs, **learned)
        states = [*seen.deepstack_features, seen.last_hidden_state]
        return {"encoder": [self.filled(state, inputs) for state in states]}

    def visual_tokens(
        self, states: States, embed: Embed, prompt: Prompt | None = None
    ) -> VisualTokens:
        """All tokens, in the order of their patches; see `Branch.visual_tokens`."""
        del embed, prompt
        *tapped, last = states["encoder"]
        tokens = all_of(self.connector["merger"](last)[None])
        mergers = self.connector["deepstack_merger_list"]
        deep = [merger(state) for merger, state in zip(mergers, tapped, strict=True)]
        return tokens._replace(deep=torch.stack(deep) if deep else None)
