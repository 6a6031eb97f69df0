"""OpenCLIP's ConvNeXt towers (open_clip TimmModel around timm's ConvNeXt)."""

from converters.params.table import CONV, Published, Rule, Table, dense, norm
from converters.values import ANY, DEEPEST, Unused, Values
from vfjax.vision.encoders import ConvNeXtConfig

STAGE = "stages.{}."
BLOCK = STAGE + "blocks.{}."
PATH = "stages/{}/blocks/{}/"

SIZES = {
    "convnext_tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "convnext_small": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "convnext_base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "convnext_large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
    "convnext_xlarge": ((3, 3, 27, 3), (256, 512, 1024, 2048)),
    "convnext_xxlarge": ((3, 4, 30, 3), (384, 768, 1536, 3072)),
}
"""Depths and widths by timm's name (arXiv 2201.03545, section 3; OpenCLIP's own XXL)."""

EPS = {"convnext_xxlarge": 1e-5}
"""What a kind's norms add to a variance, if not 1e-6."""


def read(hf: Values) -> ConvNeXtConfig:
    """From the `vision_cfg` of an open_clip_config.json, `model_type` added.

    `golden_depths` and `golden_dims`, which only models of toy size have, take the place of the
    sizes by name. `input_size`, which no such file has, is the side of the pictures that are fed.

    Raises:
        InputError: a timm model of another kind, or stages without widths.
    """
    name = hf.choice("timm_model_name", tuple(SIZES))
    named = SIZES[name]
    depths = hf.wholes("golden_depths", named[0], least=1, most=DEEPEST)
    widths = hf.wholes("golden_dims", named[1], least=1)
    if len(widths) != len(depths):
        raise hf.error("golden_dims", f"{len(depths)} widths, as golden_depths")
    return ConvNeXtConfig(
        depths=depths,
        widths=widths,
        image_size=hf.whole("input_size", hf.side("image_size", 224)),
        eps=EPS.get(name, 1e-6),
    )


def conv(source: str, path: str) -> tuple[Rule, ...]:
    """Rules of a convolution's kernel and bias."""
    return Rule(f"{source}.weight", f"{path}/kernel", CONV), Rule(f"{source}.bias", f"{path}/bias")


LARGE_320 = Published(
    {
        "model_type": "open_clip_convnext",
        "timm_model_name": "convnext_large",
        "timm_model_pretrained": False,
        "timm_pool": "",
        "timm_proj": "mlp",
        "timm_drop": 0.0,
        "timm_drop_path": 0.1,
        "image_size": 320,
    },
    {},
)
"""Mini-Gemini's second tower, which it feeds pictures of the first one's processor."""

XXL = Published(
    {
        "model_type": "open_clip_convnext",
        "timm_model_name": "convnext_xxlarge",
        "timm_model_pretrained": False,
        "timm_pool": "",
        "timm_proj": "linear",
        "timm_drop": 0.0,
        "timm_drop_path": 0.1,
        "image_size": 256,
    },
    {},
)
"""Cambrian's fourth tower."""

UNUSED: Unused = {
    "timm_drop": ANY,  # in training
    "timm_drop_path": ANY,
    "timm_model_pretrained": ANY,
    "timm_pool": ANY,  # of the head, which is not read
    "timm_proj": ANY,
    "timm_proj_bias": ANY,
    "torch_dtype": ANY,
}
"""Keys of a timm tower of OpenCLIP's."""

AROUND: Unused = {
    "custom_text": ANY,
    "embed_dim": ANY,
    "init_logit_bias": ANY,
    "init_logit_scale": ANY,
    "quick_gelu": ANY,  # of OpenCLIP's own towers
    "text_cfg": ANY,
}
"""Beside it."""

TEXT = (
    r"transformer\..*",
    r"text\..*",
    r"token_embedding\.weight",
    r"positional_embedding",
    r"ln_final\..*",
    r"text_projection",
    r"logit_scale",
    r"logit_bias",
)
"""Tensors of the half that reads text."""

PREFIXES = (("visual.trunk.", ""), ("module.visual.trunk.", ""), ("module.", ""), ("", ""))

TABLE = Table(
    types=("open_clip_convnext",),
    read=read,
    unused=UNUSED,
    around=AROUND,
    rules=(
        *conv("stem.0", "stem"),
        *norm("stem.1", "stem_norm"),
        *norm(STAGE + "downsample.0", "stages/{}/norm"),
        *conv(STAGE + "downsample.1", "stages/{}/halve"),
        *conv(BLOCK + "conv_dw", PATH + "conv"),
        *norm(BLOCK + "norm", PATH + "norm"),
        *dense(BLOCK + "mlp.fc1", PATH + "mlp/fc1"),
        *dense(BLOCK + "mlp.fc2", PATH + "mlp/fc2"),
        Rule(BLOCK + "gamma", PATH + "gamma"),
    ),
    ignore=(r"head\..*", r"visual\.head\..*", *TEXT),
    prefixes=PREFIXES,
    published={
        "CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup": LARGE_320,
        "openclip-convnext-large-d-320-laion2B-s29B-b131K-ft-soup": LARGE_320,  # in MGM's configs
        "CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-soup": XXL,
    },
)
