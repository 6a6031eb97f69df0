"""CLIP's vision tower (transformers CLIPVisionModel, CLIPModel)."""

from converters.params.table import CONV, Published, Rule, Table, dense, norm
from converters.values import ANY, DEEPEST, PRETRAINED, Unused, Values
from vfjax.vision.encoders import CLIPConfig

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


def read(hf: Values) -> CLIPConfig:
    """From the keys of transformers' CLIPVisionConfig."""
    return CLIPConfig(
        **sizes(hf),
        mlp=hf.whole("intermediate_size", 3072),
        patch=hf.side("patch_size", 32),
        image_size=hf.side("image_size", 224),
        act=hf.activation("hidden_act", "quick_gelu"),
        eps=hf.number("layer_norm_eps", 1e-5),
    )


def sizes(hf: Values, width: int = 768, heads: int = 12) -> dict[str, int]:
    """Width, layers and heads of a vision transformer.

    Args:
        hf: its config.
        width: default of `hidden_size`.
        heads: default of `num_attention_heads`.

    Raises:
        InputError: heads that do not divide the width.
    """
    width = hf.whole("hidden_size", width)
    heads = hf.whole("num_attention_heads", heads)
    if width % heads:
        raise hf.error("num_attention_heads", f"a divisor of hidden_size, {width}")
    layers = hf.whole("num_hidden_layers", 12, most=DEEPEST)
    return {"width": width, "layers": layers, "heads": heads}


TOWER: Unused = {
    **PRETRAINED,
    "attention_dropout": ANY,
    "dropout": ANY,
    "input_size": ANY,  # ours: the side of the pictures that are fed
    "num_channels": (3,),
    "tie_word_embeddings": ANY,
    "vocab_size": ANY,  # in LlavaConfig's default
}
"""Keys without effect on any vision tower."""

AROUND: Unused = {
    **PRETRAINED,
    "initializer_factor": ANY,
    "logit_scale_init_value": ANY,
    "projection_dim": ANY,
    "text_config": ANY,
    "text_config_dict": ANY,
    "tie_word_embeddings": ANY,
}
"""Beside the vision tower of a larger model."""

TABLE = Table(
    types=("clip_vision_model", "clip"),
    depth="num_hidden_layers",
    read=read,
    unused={**TOWER, "projection_dim": ANY},
    around=AROUND,
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
