"""CLIP's vision tower (transformers CLIPVisionModel, CLIPModel)."""

from collections.abc import Mapping
from typing import Any

from converters.rules import CONV, Rule, Table, dense, norm
from vfjax.encoders import CLIPConfig

LAYER = "encoder.layers.{}."

BLOCK = (
    *norm(LAYER + "layer_norm1", "blocks/{}/norm1"),
    *norm(LAYER + "layer_norm2", "blocks/{}/norm2"),
    *dense(LAYER + "self_attn.q_proj", "blocks/{}/attn/q"),
    *dense(LAYER + "self_attn.k_proj", "blocks/{}/attn/k"),
    *dense(LAYER + "self_attn.v_proj", "blocks/{}/attn/v"),
    *dense(LAYER + "self_attn.out_proj", "blocks/{}/attn/out"),
    *dense(LAYER + "mlp.fc1", "blocks/{}/mlp/fc1"),
    *dense(LAYER + "mlp.fc2", "blocks/{}/mlp/fc2"),
)
"""A transformer block; SigLIP's has the same names."""


def config(hf: Mapping[str, Any]) -> CLIPConfig:
    """Missing keys have the defaults of transformers' CLIPVisionConfig."""
    return CLIPConfig(
        width=hf.get("hidden_size", 768),
        layers=hf.get("num_hidden_layers", 12),
        heads=hf.get("num_attention_heads", 12),
        mlp=hf.get("intermediate_size", 3072),
        patch=hf.get("patch_size", 32),
        image_size=hf.get("image_size", 224),
        act=hf.get("hidden_act", "quick_gelu"),
        eps=hf.get("layer_norm_eps", 1e-5),
    )


TABLE = Table(
    types=("clip_vision_model", "clip"),
    config=config,
    rules=(
        Rule("embeddings.class_embedding", "cls"),
        Rule("embeddings.patch_embedding.weight", "patch/kernel", CONV),
        Rule("embeddings.position_embedding.weight", "pos"),
        *norm("pre_layrnorm", "pre_norm"),
        *BLOCK,
        *norm("post_layernorm", "norm"),
    ),
    ignore=(
        r"embeddings\.position_ids",
        r"text_model\..*",
        r"text_projection\.weight",
        r"visual_projection\.weight",
        r"logit_scale",
    ),
    prefixes=(("vision_model.", ""), ("", "")),
)
