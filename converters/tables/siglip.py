"""SigLIP's vision tower (transformers SiglipVisionModel, SiglipModel)."""

from collections.abc import Mapping
from typing import Any

from converters.rules import CONV, Published, Rule, Table, norm
from converters.tables.clip import BLOCK
from vfjax.encoders import SigLIPConfig


def config(hf: Mapping[str, Any]) -> SigLIPConfig:
    """Missing keys have the defaults of transformers' SiglipVisionConfig."""
    return SigLIPConfig(
        width=hf.get("hidden_size", 768),
        layers=hf.get("num_hidden_layers", 12),
        heads=hf.get("num_attention_heads", 12),
        mlp=hf.get("intermediate_size", 3072),
        patch=hf.get("patch_size", 16),
        image_size=hf.get("image_size", 224),
        act=hf.get("hidden_act", "gelu_pytorch_tanh"),
        eps=hf.get("layer_norm_eps", 1e-6),
    )


TABLE = Table(
    types=("siglip_vision_model", "siglip"),
    config=config,
    rules=(
        Rule("embeddings.patch_embedding.weight", "patch/kernel", CONV),
        Rule("embeddings.patch_embedding.bias", "patch/bias"),
        Rule("embeddings.position_embedding.weight", "pos"),
        *BLOCK,
        *norm("post_layernorm", "norm"),
    ),
    ignore=(
        r"embeddings\.position_ids",
        r"head\..*",
        r"text_model\..*",
        r"logit_scale",
        r"logit_bias",
    ),
    prefixes=(("vision_model.", ""), ("", "")),
    published={
        "siglip-so400m-patch14-384": Published(
            {
                "model_type": "siglip_vision_model",
                "hidden_size": 1152,
                "image_size": 384,
                "intermediate_size": 4304,
                "num_attention_heads": 16,
                "num_hidden_layers": 27,
                "patch_size": 14,
                "hidden_act": "gelu_pytorch_tanh",
                "layer_norm_eps": 1e-06,
            },
            {
                "image_processor_type": "SiglipImageProcessor",
                "size": {"height": 384, "width": 384},
                "resample": 3,
                "image_mean": [0.5, 0.5, 0.5],
                "image_std": [0.5, 0.5, 0.5],
            },
        )
    },
)
