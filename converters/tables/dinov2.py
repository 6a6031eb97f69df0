"""DINOv2 (transformers Dinov2Model, Dinov2WithRegistersModel)."""

from collections.abc import Mapping
from typing import Any

from converters.rules import CONV, Rule, Table, dense, norm
from vfjax.encoders import DINOv2Config

LAYER = "encoder.layer.{}."


def config(hf: Mapping[str, Any]) -> DINOv2Config:
    """Missing keys have the defaults of transformers' Dinov2Config.

    `input_size`, which no Hugging Face config has, is the side of the pictures that are fed; the
    loader sets it from the preprocessor (tables trained at 518 are commonly fed 224).
    """
    width = hf.get("hidden_size", 768)
    swiglu = hf.get("use_swiglu_ffn", False)
    mlp = int(width * hf.get("mlp_ratio", 4))
    registers = hf.get("num_register_tokens", 4) if "registers" in hf["model_type"] else 0
    image_size = hf.get("image_size", 224)
    return DINOv2Config(
        width=width,
        layers=hf.get("num_hidden_layers", 12),
        heads=hf.get("num_attention_heads", 12),
        mlp=(int(mlp * 2 / 3) + 7) // 8 * 8 if swiglu else mlp,
        patch=hf.get("patch_size", 14),
        image_size=image_size,
        input_size=hf.get("input_size", image_size),
        act=hf.get("hidden_act", "gelu"),
        swiglu=swiglu,
        registers=registers,
        qkv_bias=hf.get("qkv_bias", True),
        mask_token=hf.get("use_mask_token", True) or registers > 0,
        eps=hf.get("layer_norm_eps", 1e-6),
    )


TABLE = Table(
    types=("dinov2", "dinov2_with_registers"),
    config=config,
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
