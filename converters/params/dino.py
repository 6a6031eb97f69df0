"""DINO (transformers ViTModel)."""

from converters.params.clip import TOWER, sizes
from converters.params.table import CONV, Rule, Table, dense, norm
from converters.values import ANY, Unused, Values
from vfjax.vision.encoders import DINOConfig

LAYER = "encoder.layer.{}."


def read(hf: Values) -> DINOConfig:
    """From the keys of transformers' ViTConfig.

    `input_size`, which no Hugging Face config has, is the side of the pictures that are fed.
    """
    image_size = hf.side("image_size", 224)
    return DINOConfig(
        **sizes(hf),
        mlp=hf.whole("intermediate_size", 3072),
        patch=hf.side("patch_size", 16),
        image_size=image_size,
        input_size=hf.whole("input_size", image_size),
        act=hf.activation("hidden_act", "gelu"),
        eps=hf.number("layer_norm_eps", 1e-12),
        qkv_bias=hf.flag("qkv_bias", True),
    )


VIT: Unused = {
    **TOWER,
    "attention_probs_dropout_prob": ANY,
    "drop_path_rate": ANY,
    "hidden_dropout_prob": ANY,
}
"""Keys without effect on transformers' ViT and those that grew from it."""

BACKBONE: Unused = dict.fromkeys(
    ("apply_layernorm", "out_features", "out_indices", "reshape_hidden_states", "stage_names"), ANY
)
"""Of the feature maps that a tower gives as a backbone."""

TABLE = Table(
    types=("vit",),
    read=read,
    unused={
        **VIT,
        "encoder_stride": ANY,  # of masked image modelling
        "pooler_act": ANY,
        "pooler_output_size": ANY,
    },
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
