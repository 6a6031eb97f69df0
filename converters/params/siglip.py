"""SigLIP's vision tower (transformers SiglipVisionModel, SiglipModel)."""

from converters.params.clip import AROUND, BLOCK, TOWER, sizes
from converters.params.table import CONV, Published, Rule, Table, norm
from converters.values import ANY, Values
from vfjax.vision.encoders import SigLIPConfig


def read(hf: Values) -> SigLIPConfig:
    """From the keys of transformers' SiglipVisionConfig."""
    return SigLIPConfig(
        **sizes(hf),
        mlp=hf.whole("intermediate_size", 3072),
        patch=hf.side("patch_size", 16),
        image_size=hf.side("image_size", 224),
        act=hf.activation("hidden_act", "gelu_pytorch_tanh"),
        eps=hf.number("layer_norm_eps", 1e-6),
        batch_axis=False,
    )


TABLE = Table(
    types=("siglip_vision_model", "siglip"),
    depth="num_hidden_layers",
    read=read,
    unused={**TOWER, "vision_use_head": ANY},
    around=AROUND,
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
