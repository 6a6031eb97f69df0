"""DINOv3 (transformers DINOv3ViTModel)."""

from collections.abc import Mapping
from typing import Any

from converters.rules import CONV, Rule, Table, dense, norm
from vfjax.encoders import DINOv3Config

LAYER = "layer.{}."


def config(hf: Mapping[str, Any]) -> DINOv3Config:
    """Missing keys have the defaults of transformers' DINOv3ViTConfig.

    `input_size`, which no Hugging Face config has, is the side of the pictures that are fed.
    """
    return DINOv3Config(
        width=hf.get("hidden_size", 384),
        layers=hf.get("num_hidden_layers", 12),
        heads=hf.get("num_attention_heads", 6),
        mlp=hf.get("intermediate_size", 1536),
        patch=hf.get("patch_size", 16),
        image_size=hf.get("input_size", hf.get("image_size", 224)),
        act=hf.get("hidden_act", "gelu"),
        gated=hf.get("use_gated_mlp", False),
        registers=hf.get("num_register_tokens", 0),
        q_bias=hf.get("query_bias", True),
        k_bias=hf.get("key_bias", False),
        v_bias=hf.get("value_bias", True),
        out_bias=hf.get("proj_bias", True),
        mlp_bias=hf.get("mlp_bias", True),
        rope_theta=hf.get("rope_theta", 100.0),
        eps=hf.get("layer_norm_eps", 1e-5),
    )


TABLE = Table(
    types=("dinov3_vit",),
    config=config,
    rules=(
        Rule("embeddings.cls_token", "cls"),
        Rule("embeddings.mask_token", "mask"),
        Rule("embeddings.register_tokens", "registers"),
        Rule("embeddings.patch_embeddings.weight", "patch/kernel", CONV),
        Rule("embeddings.patch_embeddings.bias", "patch/bias"),
        *norm(LAYER + "norm1", "blocks/{}/norm1"),
        *dense(LAYER + "attention.q_proj", "blocks/{}/attn/q"),
        *dense(LAYER + "attention.k_proj", "blocks/{}/attn/k"),
        *dense(LAYER + "attention.v_proj", "blocks/{}/attn/v"),
        *dense(LAYER + "attention.o_proj", "blocks/{}/attn/out"),
        Rule(LAYER + "layer_scale1.lambda1", "blocks/{}/scale1"),
        *norm(LAYER + "norm2", "blocks/{}/norm2"),
        *dense(LAYER + "mlp.gate_proj", "blocks/{}/mlp/gate"),
        *dense(LAYER + "mlp.up_proj", "blocks/{}/mlp/up"),
        *dense(LAYER + "mlp.down_proj", "blocks/{}/mlp/down"),
        Rule(LAYER + "layer_scale2.lambda1", "blocks/{}/scale2"),
        *norm("norm", "norm"),
    ),
)
