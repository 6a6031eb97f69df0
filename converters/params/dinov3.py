"""DINOv3 (transformers DINOv3ViTModel)."""

from converters.params.clip import TOWER, sizes
from converters.params.dino import BACKBONE
from converters.params.table import CONV, Rule, Table, dense, norm
from converters.values import ANY, Values
from vfjax.vision.encoders import DINOv3Config

LAYER = "layer.{}."


def read(hf: Values) -> DINOv3Config:
    """From the keys of transformers' DINOv3ViTConfig.

    `input_size`, which no Hugging Face config has, is the side of the pictures that are fed.

    Raises:
        InputError: heads whose features are no multiple of four, which a place on a plane turns.
    """
    sized = sizes(hf, 384, 6)
    if sized["width"] // sized["heads"] % 4:
        raise hf.error("num_attention_heads", "heads whose width is a multiple of 4")
    return DINOv3Config(
        **sized,
        mlp=hf.whole("intermediate_size", 1536),
        patch=hf.side("patch_size", 16),
        image_size=hf.whole("input_size", hf.side("image_size", 224)),
        act=hf.activation("hidden_act", "gelu"),
        gated=hf.flag("use_gated_mlp", False),
        registers=hf.whole("num_register_tokens", 0, least=0),
        q_bias=hf.flag("query_bias", True),
        k_bias=hf.flag("key_bias", False),
        v_bias=hf.flag("value_bias", True),
        out_bias=hf.flag("proj_bias", True),
        mlp_bias=hf.flag("mlp_bias", True),
        rope_theta=hf.number("rope_theta", 100.0, least=1),
        eps=hf.number("layer_norm_eps", 1e-5),
    )


TABLE = Table(
    types=("dinov3_vit",),
    read=read,
    unused={
        **TOWER,
        **BACKBONE,
        "drop_path_rate": ANY,
        "layerscale_value": ANY,  # where training begins
        "pos_embed_jitter": ANY,  # in training
        "pos_embed_rescale": ANY,
        "pos_embed_shift": ANY,
    },
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
