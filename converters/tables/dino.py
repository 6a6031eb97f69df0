"""DINO (transformers ViTModel)."""

from collections.abc import Mapping
from typing import Any

from converters.rules import CONV, Rule, Table, dense, norm
from vfjax.encoders import DINOConfig

LAYER = "encoder.layer.{}."


def config(hf: Mapping[str, Any]) -> DINOConfig:
    """Missing keys have the defaults of transformers' ViTConfig.

    `input_size`, which no Hugging Face config has, is the side of the pictures that are fed.
    """
    image_size = hf.get("image_size", 224)
    return DINOConfig(
        width=hf.get("hidden_size", 768),
        layers=hf.get("num_hidden_layers", 12),
        heads=hf.get("num_attention_heads", 12),
        mlp=hf.get("intermediate_size", 3072),
        patch=hf.get("patch_size", 16),
        image_size=image_size,
        input_size=hf.get("input_size", image_size),
        act=hf.get("hidden_act", "gelu"),
        eps=hf.get("layer_norm_eps", 1e-12),
        qkv_bias=hf.get("qkv_bias", True),
    )


TABLE = Table(
    types=("vit",),
    config=config,
    rules=(
        Rule("embeddings.cls_token", "cls"),
        Rule("embeddings.position_embeddings", "pos"),
        Rule("embeddings.patch_embeddings.projection.weight", "patch/kernel", CONV),
        Rule("embeddings.patch_embeddings.projection.bias", "patch/bias"),
        *norm(LAYER + "layernorm_before", "blocks/{}/norm1"),
        *dense(LAYER + "attention.attention.query", "blocks/{}/attn/q"),
        *dense(LAYER + "attention.attention.key", "blocks/{}/attn/k"),
        *dense(LAYER + "attention.attention.value", "blocks/{}/attn/v"),
        *dense(LAYER + "attention.output.dense", "blocks/{}/attn/out"),
        *norm(LAYER + "layernorm_after", "blocks/{}/norm2"),
        *dense(LAYER + "intermediate.dense", "blocks/{}/mlp/fc1"),
        *dense(LAYER + "output.dense", "blocks/{}/mlp/fc2"),
        *norm("layernorm", "norm"),
    ),
    ignore=(r"pooler\..*", r"embeddings\.mask_token"),
)
