"""InternLM2: transformers' Llama under its authors' names, queries, keys and values of one layer.

The twin of `vfjax.llm.internlm2`.
"""

from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, Cache, LlamaConfig, LlamaModel
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    apply_rotary_pos_emb,
    eager_attention_forward,
)


class InternLM2Config(LlamaConfig):
    """Llama's keys, and whether the attention's layers have biases."""

    model_type = "internlm2"

    vocab_size: int = 103168
    bias: bool = True


class Attention(nn.Module):
    """Llama's; each group of heads has its queries, its key and its value in a row."""

    is_causal = True

    def __init__(self, config: InternLM2Config, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.hidden_size // heads
        self.num_key_value_groups = heads // groups
        wide = (heads + 2 * groups) * self.head_dim
        self.wqkv = nn.Linear(config.hidden_size, wide, bias=config.bias)
        self.wo = nn.Linear(heads * self.head_dim, config.hidden_size, bias=config.bias)

    def forward(
        self,
        x: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor | None]:
        """What is added to [b, t, d], and who looked where, if the kind of attention says it."""
        rows = self.wqkv(x).unflatten(-1, (-1, self.num_key_value_groups + 2, self.head_dim))
        q, k, v = rows[..., :-2, :].flatten(2, 3), rows[..., -2, :], rows[..., -1, :]
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if cache is not None:
            k, v = cache.update(k, v, self.layer, kwargs=kwargs)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        y, looks = attend(
            self, q, k, v, attention_mask, dropout=0.0, scaling=self.head_dim**-0.5, **kwargs
        )
        return self.wo(y.flatten(2)), looks


class FeedForward(nn.Module):
    """Llama's gated MLP."""

    def __init__(self, config: InternLM2Config):
        super().__init__()
        self.act = ACT2FN[config.hidden_act]
        wide = config.intermediate_size
        self.w1, self.w3 = (nn.Linear(config.hidden_size, wide, bias=False) for _ in range(2))
        self.w2 = nn.Linear(wide, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.act(self.w1(x)) * self.w3(x))


class Layer(GradientCheckpointingLayer):
    """Pre-norm attention and feed-forward, each added to the stream."""

    def __init__(self, config: InternLM2Config, layer: int):
        super().__init__()
        self.attention = Attention(config, layer)
        self.feed_forward = FeedForward(config)
        self.attention_norm, self.ffn_norm = (
            LlamaRMSNorm(config.hidden_size, config.rms_norm_eps) for _ in range(2)
        )

    def forward(self, x: Tensor, **kwargs: object) -> Tensor:
        x = x + self.attention(self.attention_norm(x), **kwargs)[0]
        return x + self.feed_forward(self.ffn_norm(x))


class InternLM2Model(LlamaModel):
    """Embeddings -> hidden states."""

    config_class = InternLM2Config
    _no_split_modules = ["Layer"]
    _can_record_outputs = {"hidden_states": Layer, "attentions": Attention}

    def __init__(self, config: InternLM2Config):
        super().__init__(config)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.post_init()


AutoConfig.register(InternLM2Config.model_type, InternLM2Config, exist_ok=True)
AutoModel.register(InternLM2Config, InternLM2Model, exist_ok=True)
