"""InternViT: transformers' InternVLVisionModel, and its authors' InternVisionModel."""

from converters.params.clip import TOWER, sizes
from converters.params.table import CONV, TRANSPOSE, Rule, Table, dense, norm
from converters.values import ANY, Unused, Values
from vfjax.vision.encoders import InternViTConfig

NORMS = ("layer_norm", "rms_norm")


def port(hf: Values) -> InternViTConfig:
    """From the keys of transformers' InternVLVisionConfig; its norms of heads have one epsilon."""
    image_size = hf.side("image_size", 448)
    return InternViTConfig(
        **sizes(hf.over({"num_hidden_layers": 24}), 1024, 16),
        mlp=hf.whole("intermediate_size", 4096),
        patch=hf.side("patch_size", 14),
        image_size=image_size,
        input_size=hf.whole("input_size", image_size),
        act=hf.activation("hidden_act", "gelu"),
        eps=hf.number("layer_norm_eps", 1e-6),
        qkv_bias=hf.flag("attention_bias", False),
        qk_norm=1e-6 if hf.flag("use_qk_norm", False) else None,
        rms_norm=hf.choice("norm_type", NORMS, "layer_norm") == "rms_norm",
        final_norm=not hf.flag("use_mean_pooling", True),
    )


def authors(hf: Values) -> InternViTConfig:
    """From the keys of InternVisionConfig (configuration_intern_vit.py)."""
    image_size, eps = hf.side("image_size", 224), hf.number("layer_norm_eps", 1e-6)
    return InternViTConfig(
        **sizes(hf.over({"num_hidden_layers": 48}), 3200, 25),
        mlp=hf.whole("intermediate_size", 12800),
        patch=hf.side("patch_size", 14),
        image_size=image_size,
        input_size=hf.whole("input_size", image_size),
        act=hf.activation("hidden_act", "gelu"),
        eps=eps,
        qkv_bias=hf.flag("qkv_bias", False),
        qk_norm=eps if hf.flag("qk_normalization", True) else None,
        rms_norm=hf.choice("norm_type", NORMS, "rms_norm") == "rms_norm",
        final_norm=False,
    )


UNUSED: Unused = {
    **TOWER,
    "drop_path_rate": ANY,
    "use_moe": (False, None),
    **dict.fromkeys(
        (
            *("capacity_factor", "eval_capacity_factor", "laux_allreduce", "moe_coeff_ratio"),
            *("moe_intermediate_size", "moe_output_scale", "noisy_gate_policy", "num_experts"),
            *("num_routed_experts", "num_shared_experts", "shared_expert_intermediate_size"),
            *("use_residual", "use_rts", "use_weighted_residual"),
        ),
        ANY,  # of experts, which no published tower has
    ),
}

LAYER = "encoder.layer.{}."
AUTHORS = "encoder.layers.{}."

TABLES = (
    Table(
        types=("internvl_vision",),
        read=port,
        unused={
            **UNUSED,
            "hidden_dropout_prob": ANY,
            "layer_scale_init_value": ANY,
            "projection_dropout": ANY,
            "use_absolute_position_embeddings": (True,),
            "use_mask_token": ANY,
        },
        rules=(
            Rule("embeddings.cls_token", "cls"),
            Rule("embeddings.position_embeddings", "pos"),
            Rule("embeddings.patch_embeddings.projection.weight", "patch/kernel", CONV),
            Rule("embeddings.patch_embeddings.projection.bias", "patch/bias"),
            *norm(LAYER + "layernorm_before", "blocks/{}/norm1"),
            *dense(LAYER + "attention.q_proj", "blocks/{}/attn/q"),
            *dense(LAYER + "attention.k_proj", "blocks/{}/attn/k"),
            *dense(LAYER + "attention.v_proj", "blocks/{}/attn/v"),
            Rule(LAYER + "attention.q_norm.weight", "blocks/{}/attn/q_norm/scale"),
            Rule(LAYER + "attention.k_norm.weight", "blocks/{}/attn/k_norm/scale"),
            *dense(LAYER + "attention.projection_layer", "blocks/{}/attn/out"),
            Rule(LAYER + "lambda_1", "blocks/{}/scale1"),
            *norm(LAYER + "layernorm_after", "blocks/{}/norm2"),
            *dense(LAYER + "mlp.fc1", "blocks/{}/mlp/fc1"),
            *dense(LAYER + "mlp.fc2", "blocks/{}/mlp/fc2"),
            Rule(LAYER + "lambda_2", "blocks/{}/scale2"),
            *norm("layernorm", "norm"),
        ),
        ignore=(r"embeddings\.mask_token",),
    ),
    Table(
        types=("intern_vit_6b",),
        read=authors,
        unused={**UNUSED, "use_flash_attn": ANY},
        rules=(
            Rule("embeddings.class_embedding", "cls"),
            Rule("embeddings.position_embedding", "pos"),
            Rule("embeddings.patch_embedding.weight", "patch/kernel", CONV),
            Rule("embeddings.patch_embedding.bias", "patch/bias"),
            *norm(AUTHORS + "norm1", "blocks/{}/norm1"),
            *(
                rule
                for i, name in enumerate("qkv")
                for rule in (
                    Rule(
                        AUTHORS + "attn.qkv.weight",
                        f"blocks/{{}}/attn/{name}/kernel",
                        TRANSPOSE,
                        (i, 3),
                    ),
                    Rule(AUTHORS + "attn.qkv.bias", f"blocks/{{}}/attn/{name}/bias", None, (i, 3)),
                )
            ),
            Rule(AUTHORS + "attn.q_norm.weight", "blocks/{}/attn/q_norm/scale"),
            Rule(AUTHORS + "attn.k_norm.weight", "blocks/{}/attn/k_norm/scale"),
            *dense(AUTHORS + "attn.proj", "blocks/{}/attn/out"),
            Rule(AUTHORS + "ls1", "blocks/{}/scale1"),
            *norm(AUTHORS + "norm2", "blocks/{}/norm2"),
            *dense(AUTHORS + "mlp.fc1", "blocks/{}/mlp/fc1"),
            *dense(AUTHORS + "mlp.fc2", "blocks/{}/mlp/fc2"),
            Rule(AUTHORS + "ls2", "blocks/{}/scale2"),
        ),
    ),
)
