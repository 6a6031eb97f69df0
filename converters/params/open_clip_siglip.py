"""SigLIP's towers in OpenCLIP's files (open_clip TimmModel around timm 0.9's VisionTransformer).

timm 0.9 has the exact GELU in their MLPs, where big_vision, transformers and timm 1 have SO400M's
tanh; authors whose code is read here pin it.
"""

from converters.params.convnext import AROUND, PREFIXES, TEXT, UNUSED
from converters.params.table import CONV, TRANSPOSE, Published, Rule, Table, dense, norm
from converters.values import DEEPEST, Values
from vfjax.vision.encoders import SigLIPConfig

SIZES = {
    "vit_base_patch16_siglip": (768, 12, 12, 4.0, 16),
    "vit_large_patch16_siglip": (1024, 24, 16, 4.0, 16),
    "vit_so400m_patch14_siglip": (1152, 27, 16, 3.7362, 14),
}
"""Width, layers, heads, ratio of the MLPs and patch by timm's name, without the pictures' side."""

SIDES = {
    "vit_base_patch16_siglip": (224, 256, 384, 512),
    "vit_large_patch16_siglip": (256, 384),
    "vit_so400m_patch14_siglip": (224, 384),
}
NAMES = tuple(f"{kind}_{side}" for kind, sides in SIDES.items() for side in sides)


def read(hf: Values) -> SigLIPConfig:
    """From the `vision_cfg` of an open_clip_config.json, `model_type` added.

    `golden_*`, which only models of toy size have, take the place of the sizes by name.

    Raises:
        InputError: a timm model of another kind.
    """
    kind, side = hf.choice("timm_model_name", NAMES).rsplit("_", 1)
    width, layers, heads, ratio, patch = SIZES[kind]
    width = hf.whole("golden_dim", width)
    heads = hf.whole("golden_heads", heads)
    if width % heads:
        raise hf.error("golden_heads", f"a divisor of golden_dim, {width}")
    return SigLIPConfig(
        width=width,
        layers=hf.whole("golden_depth", layers, most=DEEPEST),
        heads=heads,
        mlp=int(width * hf.number("golden_mlp_ratio", ratio)),
        patch=hf.whole("golden_patch", patch),
        image_size=hf.side("image_size", int(side)),
        act="gelu",
        batch_axis=True,
    )


BLOCK = "blocks.{}."
ATTENTION = tuple(
    rule
    for i, name in enumerate(("q", "k", "v"))
    for rule in (
        Rule(BLOCK + "attn.qkv.weight", f"blocks/{{}}/attn/{name}/kernel", TRANSPOSE, part=(i, 3)),
        Rule(BLOCK + "attn.qkv.bias", f"blocks/{{}}/attn/{name}/bias", part=(i, 3)),
    )
)

SO400M_384 = Published(
    {
        "model_type": "open_clip_siglip",
        "image_size": 384,
        "timm_model_name": "vit_so400m_patch14_siglip_384",
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
    },
    {},
)

TABLE = Table(
    types=("open_clip_siglip",),
    read=read,
    unused={**UNUSED, "input_size": None},
    around=AROUND,
    rules=(
        Rule("pos_embed", "pos"),
        Rule("patch_embed.proj.weight", "patch/kernel", CONV),
        Rule("patch_embed.proj.bias", "patch/bias"),
        *norm(BLOCK + "norm1", "blocks/{}/norm1"),
        *ATTENTION,
        *dense(BLOCK + "attn.proj", "blocks/{}/attn/out"),
        *norm(BLOCK + "norm2", "blocks/{}/norm2"),
        *dense(BLOCK + "mlp.fc1", "blocks/{}/mlp/fc1"),
        *dense(BLOCK + "mlp.fc2", "blocks/{}/mlp/fc2"),
        *norm("norm", "norm"),
    ),
    ignore=(r"attn_pool\..*", *TEXT),
    prefixes=PREFIXES,
    published={"ViT-SO400M-14-SigLIP-384": SO400M_384},
)
