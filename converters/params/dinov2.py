"""DINOv2 (transformers Dinov2Model, Dinov2WithRegistersModel)."""

from converters.params.clip import sizes
from converters.params.dino import BACKBONE, VIT
from converters.params.table import CONV, Rule, Table, dense, norm
from converters.values import ANY, Values
from vfjax.vision.encoders import DINOv2Config

LAYER = "encoder.layer.{}."


def read(hf: Values) -> DINOv2Config:
    """From the keys of transformers' Dinov2Config, or Dinov2WithRegistersConfig.

    `input_size`, which no Hugging Face config has, is the side of the pictures that are fed; the
    loader sets it from the preprocessor (tables trained at 518 are commonly fed 224). So is
    `position_offset`, of the position table's interpolation, which members of older code have.
    """
    registers = "registers" in hf.text("model_type")
    sized, swiglu = sizes(hf), hf.flag("use_swiglu_ffn", False)
    mlp = int(sized["width"] * hf.number("mlp_ratio", 4, least=1e-3))
    image_size = hf.side("image_size", 224)
    return DINOv2Config(
        **sized,
        mlp=(int(mlp * 2 / 3) + 7) // 8 * 8 if swiglu else mlp,
        patch=hf.side("patch_size", 16 if registers else 14),
        image_size=image_size,
        input_size=hf.whole("input_size", image_size),
        act=hf.activation("hidden_act", "gelu"),
        swiglu=swiglu,
        registers=hf.whole("num_register_tokens", 4, least=0) if registers else 0,
        qkv_bias=hf.flag("qkv_bias", True),
        mask_token=registers or hf.flag("use_mask_token", True),
        eps=hf.number("layer_norm_eps", 1e-6),
        offset=hf.number("position_offset", 0.0),
    )


TABLE = Table(
    types=("dinov2", "dinov2_with_registers"),
    read=read,
    unused={
        **VIT,
        **BACKBONE,
        "interpolate_antialias": (True,),
        "interpolate_offset": (0.0,),
        "layerscale_value": ANY,  # where training begins
        "use_mask_token": ANY,  # with registers it is always there
    },
    rules=(
        Rule("embeddings.cls_token", "cls"),
        Rule("embeddings.mask_token", "mask", optional=True),
        Rule("embeddings.register_tokens", "registers"),
        Rule("embeddings.position_embeddings", "pos"),
        Rule("embeddings.patch_embeddings.projection.weight", "patch/kernel", CONV),
        Rule("embeddings.patch_embeddings.projection.bias", "patch/bias"),
        *norm(LAYER + "norm1", "blocks/{}/norm1"),
        *dense(LAYER + "attention.attention.query", "blocks/{}/attn/q"),
        *dense(LAYER + "attention.attention.key", "blocks/{}/attn/k"),
        *dense(LAYER + "attention.attention.value", "blocks/{}/attn/v"),
        *dense(LAYER + "attention.output.dense", "blocks/{}/attn/out"),
        Rule(LAYER + "layer_scale1.lambda1", "blocks/{}/scale1"),
        *norm(LAYER + "norm2", "blocks/{}/norm2"),
        *dense(LAYER + "mlp.fc1", "blocks/{}/mlp/fc1"),
        *dense(LAYER + "mlp.fc2", "blocks/{}/mlp/fc2"),
        *dense(LAYER + "mlp.weights_in", "blocks/{}/mlp/gated"),
        *dense(LAYER + "mlp.weights_out", "blocks/{}/mlp/out"),
        Rule(LAYER + "layer_scale2.lambda1", "blocks/{}/scale2"),
        *norm("layernorm", "norm"),
    ),
    ignore=(r"classifier\..*",),
    prefixes=(("dinov2.", ""), ("dinov2_with_registers.", ""), ("", "")),
)
