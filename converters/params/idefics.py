"""Idefics3's and SmolVLM's vision tower (transformers Idefics3VisionTransformer)."""

from converters.params.clip import AROUND, BLOCK, TOWER, sizes
from converters.params.table import CONV, Rule, Table, norm
from converters.values import ANY, Values
from vfjax.vision.encoders import IdeficsConfig


def read(hf: Values) -> IdeficsConfig:
    """From the keys of transformers' Idefics3VisionConfig."""
    image_size = hf.side("image_size", 224)
    return IdeficsConfig(
        **sizes(hf, width=1152, heads=16),
        mlp=hf.whole("intermediate_size", 3072),
        patch=hf.side("patch_size", 32),
        image_size=image_size,
        input_size=hf.whole("input_size", image_size),
        act=hf.activation("hidden_act", "gelu_pytorch_tanh"),
        eps=hf.number("layer_norm_eps", 1e-6),
    )


TABLE = Table(
    types=("idefics3_vision", "smolvlm_vision"),
    read=read,
    unused={
        **TOWER,
        "max_image_size": ANY,  # the image processor's, in early folders
        "size": ANY,
        "use_base_siglip": ANY,  # where training began
    },
    around=AROUND,
    rules=(
        Rule("embeddings.patch_embedding.weight", "patch/kernel", CONV),
        Rule("embeddings.patch_embedding.bias", "patch/bias"),
        Rule("embeddings.position_embedding.weight", "pos"),
        *BLOCK,
        *norm("post_layernorm", "norm"),
    ),
)
