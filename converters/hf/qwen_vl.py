"""Qwen2-VL and Qwen2.5-VL: the twin of `vfjax.architectures.qwen_vl`, of transformers' own modules.

What the towers would make of a picture's grid, the host has said already of each patch.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
)
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

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
from vfjax import architectures


def keys(architecture: architectures.QwenVL) -> dict[str, Any]:
    """What the towers' configs say alike."""
    c = architecture.encoder
    return {
        "depth": c.layers,
        "num_heads": c.heads,
        "hidden_act": c.act,
        "patch_size": c.patch,
        "temporal_patch_size": c.time,
        "spatial_merge_size": c.merge,
        "rope_parameters": {"rope_type": "axial", "rope_theta": c.theta},
    }


def tower(architecture: architectures.QwenVL) -> nn.Module:
    """Transformers' tower with its merger."""
    c, dout = architecture.encoder, architecture.connector.dout
    if not c.gated:
        own = {"embed_dim": c.width, "hidden_size": dout, "mlp_ratio": c.mlp // c.width}
        return Qwen2VisionTransformerPretrainedModel(
            Qwen2VLVisionConfig(**keys(architecture), **own)
        )
    return Qwen2_5_VisionTransformerPretrainedModel(
        Qwen2_5_VLVisionConfig(
            **keys(architecture),
            hidden_size=c.width,
            intermediate_size=c.mlp,
            out_hidden_size=dout,
            window_size=c.window * c.merge * c.patch,
            fullatt_block_indexes=list(c.full),
        )
    )


@register("QwenVL")
class QwenVL(Branch):
    """Patches of all pictures -> visual tokens.

    `connector` is the tower's merger, in whose place the tower has none.
    """

    def __init__(self, architecture: architectures.QwenVL):
        nn.Module.__init__(self)
        self.architecture = architecture
        self.encoder = tower(architecture)
        self.connector = self.encoder.merger
        self.encoder.merger = nn.Identity()

    def encode(self, inputs: Inputs) -> States:
        """The last hidden state [1, n, width], zero at padding."""
        return {"encoder": [self.filled(self.seen(inputs).last_hidden_state, inputs)]}

    def seen(self, inputs: Inputs, **more: Tensor) -> BaseModelOutputWithPooling:
        """What the tower makes of the patches that are no padding.

        Args:
            inputs: see `vfjax.architectures.qwen_vl.Patches`.
            more: of each patch, what the tower is told besides.
        """
        told = {"place": inputs["place"], **more}
        n = patches(inputs["frames"], self.architecture.encoder.merge)
        told = {name: x[:n] for name, x in told.items()}
        told["position_ids"] = told.pop("place")
        told["cu_seqlens"] = bounds(inputs["frames"][:n])
        if self.architecture.encoder.window:  # patches are in the order of the windows already
            told["cu_window_seqlens"] = bounds(inputs["windows"][:n])
            tokens = n // self.architecture.encoder.merge**2
            told["window_index"] = torch.arange(tokens, device=inputs["frames"].device)
        return self.encoder(inputs["pixels"][:n], None, **told)

    def filled(self, state: Tensor, inputs: Inputs) -> Tensor:
        """[1, n, width] of the states of the first patches, zero behind them."""
        return pad(state, (0, 0, 0, len(inputs["pixels"]) - len(state)))[None]

    def visual_tokens(
        self, states: States, embed: Embed, prompt: Prompt | None = None
    ) -> VisualTokens:
        """All tokens, in the order of their patches; see `Branch.visual_tokens`."""
        del embed, prompt
        (state,) = states["encoder"]
        return all_of(self.connector(state)[None])


def patches(back: Tensor, merge: int) -> int:
    """How many patches are a picture's, of those that `back` is of; the rest is padding.

    Args:
        back: int[n], from each patch to the first of its frame, not positive; padding is alone.
        merge: patches a side of a token; of 1, a patch may be a frame as padding is.
    """
    found = back.nonzero()
    return int(found[-1]) + 1 if merge > 1 and len(found) else len(back)


def bounds(back: Tensor) -> Tensor:
    """int32[k + 1], where segments begin, and the end; `back` is as of `patches`."""
    return pad(torch.nonzero(back == 0).flatten(), (0, 1), value=len(back)).int()
