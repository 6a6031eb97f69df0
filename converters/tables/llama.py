"""Llama-family decoders (transformers LlamaForCausalLM)."""

from collections.abc import Mapping
from typing import Any

from converters.rules import TRANSPOSE, Rule, Table, dense
from vfjax import InputError
from vfjax.llm import LlamaConfig, RopeScaling

LAYER = "model.layers.{}."


def config(hf: Mapping[str, Any]) -> LlamaConfig:
    """Missing keys have the defaults of transformers' LlamaConfig.

    Raises:
        InputError: a rotary scaling other than Llama-3's.
    """
    width, heads = hf.get("hidden_size", 4096), hf.get("num_attention_heads", 32)
    bias = hf.get("attention_bias", False)
    theta, scaling = rope(hf)
    return LlamaConfig(
        vocab=hf.get("vocab_size", 32000),
        width=width,
        layers=hf.get("num_hidden_layers", 32),
        heads=heads,
        kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or width // heads,
        mlp=hf.get("intermediate_size", 11008),
        context=hf.get("max_position_embeddings", 2048),
        act=hf.get("hidden_act", "silu"),
        eps=hf.get("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=hf.get("mlp_bias", False),
        tied=hf.get("tie_word_embeddings", False),
    )


def rope(hf: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from the keys of transformers 5 (`rope_parameters`) or of older ones."""
    new = hf.get("rope_parameters") or {}
    scaling = new or hf.get("rope_scaling") or {}
    theta = float(new.get("rope_theta") or hf.get("rope_theta") or 10000.0)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise InputError(
            "config.json: rope_scaling",
            found=f"rope_type {kind!r}",
            expected="'default' or 'llama3'",
            fix="this scaling is not supported yet",
        )
    return theta, RopeScaling(
        factor=scaling["factor"],
        low=scaling["low_freq_factor"],
        high=scaling["high_freq_factor"],
        original_context=scaling["original_max_position_embeddings"],
    )


TABLE = Table(
    types=("llama",),
    config=config,
    rules=(
        Rule("model.embed_tokens.weight", "embedding"),
        Rule(LAYER + "input_layernorm.weight", "blocks/{}/norm1/scale"),
        *dense(LAYER + "self_attn.q_proj", "blocks/{}/attn/q"),
        *dense(LAYER + "self_attn.k_proj", "blocks/{}/attn/k"),
        *dense(LAYER + "self_attn.v_proj", "blocks/{}/attn/v"),
        *dense(LAYER + "self_attn.o_proj", "blocks/{}/attn/out"),
        Rule(LAYER + "post_attention_layernorm.weight", "blocks/{}/norm2/scale"),
        *dense(LAYER + "mlp.gate_proj", "blocks/{}/mlp/gate"),
        *dense(LAYER + "mlp.up_proj", "blocks/{}/mlp/up"),
        *dense(LAYER + "mlp.down_proj", "blocks/{}/mlp/down"),
        Rule("model.norm.weight", "norm/scale"),
        Rule("lm_head.weight", "head/kernel", TRANSPOSE, like="model.embed_tokens.weight"),
    ),
    architecture="LlamaForCausalLM",
    ignore=(r".*\.rotary_emb\.inv_freq",),
)
