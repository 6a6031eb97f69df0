"""Ovis2's AIMv2 (transformers Ovis2VisionTransformer)."""

from converters.params.clip import TOWER, sizes
from converters.params.table import CONV, Rule, Table, dense
from converters.values import ANY, Values
from vfjax.vision.encoders import AIMv2Config

LAYER = "encoder.layers.{}."


def read(hf: Values) -> AIMv2Config:
    """From the keys of transformers' Ovis2VisionConfig."""
    return AIMv2Config(
        **sizes(hf.over({"num_hidden_layers": 24}), 1024, 8),
        mlp=hf.whole("intermediate_size", 2816),
        patch=hf.side("patch_size", 14),
        image_size=hf.side("image_size", 224),
        act=hf.activation("hidden_act", "silu"),
        eps=hf.number("rms_norm_eps", 1e-5),
        qkv_bias=hf.flag("qkv_bias", False),
        mlp_bias=hf.flag("mlp_bias", False),
    )


TABLE = Table(
    types=("ovis2_vision",),
    read=read,
    unused={
        **TOWER,
        # The authors', which published folders still have and the port does not read.
        "backbone_config": ANY,
        "backbone_kwargs": ANY,
        "depths": ANY,
        "drop_cls_token": ANY,
        "tau": ANY,
        # The connector's.
        "hidden_stride": ANY,
        "num_visual_indicator_tokens": ANY,
        "tokenize_function": ANY,
    },
    rules=(
        Rule("embeddings.patch_embedding.weight", "patch/kernel", CONV),
        Rule("embeddings.patch_embedding.bias", "patch/bias"),
        Rule("embeddings.rms_norm.weight", "patch_norm/scale"),
        Rule("embeddings.position_embedding.weight", "pos"),
        Rule(LAYER + "rms_norm1.weight", "blocks/{}/norm1/scale"),
        *dense(LAYER + "attention.q_proj", "blocks/{}/attn/q"),
        *dense(LAYER + "attention.k_proj", "blocks/{}/attn/k"),
        *dense(LAYER + "attention.v_proj", "blocks/{}/attn/v"),
        *dense(LAYER + "attention.out_proj", "blocks/{}/attn/out"),
        Rule(LAYER + "rms_norm2.weight", "blocks/{}/norm2/scale"),
        *dense(LAYER + "ffn.gate_proj", "blocks/{}/mlp/gate"),
        *dense(LAYER + "ffn.up_proj", "blocks/{}/mlp/up"),
        *dense(LAYER + "ffn.down_proj", "blocks/{}/mlp/down"),
        Rule("rms_norm.weight", "norm/scale"),
    ),
)
