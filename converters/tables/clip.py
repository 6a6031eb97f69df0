"""CLIP's vision tower (transformers CLIPVisionModel, CLIPModel)."""

from collections.abc import Mapping
from typing import Any

from converters.rules import CONV, Published, Rule, Table, dense, norm
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
    published={
        "clip-vit-large-patch14-336": Published(
            {
                "model_type": "clip_vision_model",
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_attention_heads": 16,
                "num_hidden_layers": 24,
                "patch_size": 14,
                "image_size": 336,
                "hidden_act": "quick_gelu",
                "layer_norm_eps": 1e-05,
            },
            {
                "image_processor_type": "CLIPImageProcessor",
                "size": {"shortest_edge": 336},
                "crop_size": {"height": 336, "width": 336},
                "resample": 3,
                "image_mean": [0.48145466, 0.4578275, 0.40821073],
                "image_std": [0.26862954, 0.26130258, 0.27577711],
            },
        )
    },
)
