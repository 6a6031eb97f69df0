"""LLaVA-OneVision-1.5: the twin of `vfjax.architectures.onevision15`; RICE of Qwen2-VL's parts.

Its LLM is a Qwen3 under a name of its own (ds/llavaonevision1_5).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, Qwen3Config, Qwen3Model
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    PatchMerger,
    Qwen2VLPreTrainedModel,
    Qwen2VLVisionBlock,
    Qwen2VLVisionRotaryEmbedding,
    VisionMlp,
)

from converters.hf.branch import Inputs, States, register
from converters.hf.qwen_vl import QwenVL, keys
from vfjax import architectures
from vfjax.atomic import JSON


class Rice(Qwen2VLPreTrainedModel):
    """Patches -> hidden states; within the tower a class token stands before each frame."""

    config: Qwen2VLVisionConfig

    def __init__(self, architecture: architectures.OneVision15):
        c = architecture.encoder
        config = Qwen2VLVisionConfig(**keys(architecture), embed_dim=c.width)
        super().__init__(config)
        self.patch_embed = nn.ModuleDict(
            {"proj": nn.Conv2d(3, c.width, c.patch, stride=c.patch, bias=False)}
        )
        self.class_embedding = nn.Parameter(torch.zeros(c.width))
        self.class_pos_emb = nn.Parameter(torch.zeros(1, c.width // c.heads // 2))
        self.rotary_pos_emb = Qwen2VLVisionRotaryEmbedding(config)
        self.pre_layernorm = nn.LayerNorm(c.width, eps=c.pre_eps)
        self.blocks = nn.ModuleList(Qwen2VLVisionBlock(config) for _ in range(c.layers))
        for block in self.blocks:
            block.mlp = VisionMlp(c.width, c.mlp, c.act)
            block.norm1.eps = block.norm2.eps = c.eps
        self.post_init()

    def forward(
        self,
        pixels: Tensor,
        grid: None,
        *,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        kept: Tensor,
    ) -> BaseModelOutput:
        """The last hidden state [m, width], of class tokens none.

        Args:
            pixels: float[n, 3 * patch * patch], with slots for the class tokens.
            grid: not read.
            position_ids: int[n, 2], row and column in the frame.
            cu_seqlens: int32[k + 1], where frames begin, their class token's slot first; the end.
            kept: int[m], the slots of the patches.
        """
        del grid
        side = self.config.patch_size
        patches = pixels.reshape(-1, 3, side, side).to(self.class_embedding.dtype)
        x = self.patch_embed["proj"](patches).flatten(1)
        classes = torch.ones(len(x), 1, dtype=torch.bool, device=x.device)
        classes[kept] = False
        x = self.pre_layernorm(torch.where(classes, self.class_embedding, x))
        angles = self.class_pos_emb.float().repeat(1, 2)
        cos, sin = self.rotary_pos_emb(x, position_ids)
        turns = torch.where(classes, angles.cos(), cos), torch.where(classes, angles.sin(), sin)
        for block in self.blocks:
            x = block(x, cu_seqlens=cu_seqlens, position_embeddings=turns)
        return BaseModelOutput(x[kept])


@register("OneVision15")
class OneVision15(QwenVL):
    """Patches of all pictures -> visual tokens."""

    def __init__(self, architecture: architectures.OneVision15):
        nn.Module.__init__(self)
        self.architecture, c = architecture, architecture.connector
        self.encoder = Rice(architecture)
        self.connector = PatchMerger(c.dout, c.din, c.merge)
        self.connector.ln_q.eps = c.eps

    def encode(self, inputs: Inputs) -> States:
        """The last hidden state [1, n, width], zero at padding."""
        kept = inputs["kept"]
        seen = self.seen(inputs, kept=kept[kept < len(kept)])
        return {"encoder": [self.filled(seen.last_hidden_state, inputs)]}


class OneVision15TextConfig(Qwen3Config):
    """Qwen3's keys; a rope of type "mrope" turns by one position, too."""

    model_type = "LLaVAOneVision1_5_text"

    hidden_size: int = 2560
    intermediate_size: int = 9728
    num_hidden_layers: int = 36
    num_key_value_heads: int = 8
    max_position_embeddings: int = 262144
    default_theta = 5000000.0

    def __post_init__(self, **kwargs: Mapping[str, JSON] | None) -> None:
        found = dict(kwargs.get("rope_scaling") or {})
        if "mrope" in (found.pop("type", None), found.get("rope_type")):
            found.pop("mrope_section", None)
            kwargs["rope_scaling"] = {**found, "rope_type": "default"}
        super().__post_init__(**kwargs)


class OneVision15TextModel(Qwen3Model):
    """Embeddings -> hidden states."""

    config_class = OneVision15TextConfig


AutoConfig.register(OneVision15TextConfig.model_type, OneVision15TextConfig, exist_ok=True)
AutoModel.register(OneVision15TextConfig, OneVision15TextModel, exist_ok=True)
