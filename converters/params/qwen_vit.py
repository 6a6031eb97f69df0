"""Qwen-VL's vision towers (transformers models/qwen2_vl, models/qwen2_5_vl, models/qwen3_vl), RICE.

The last is that of LLaVA-OneVision-1.5 (its ds/llavaonevision1_5/modeling_llavaonevision1_5.py).
"""

import dataclasses
import math

from converters.params.clip import TOWER
from converters.params.table import Rule, Table, dense, norm
from converters.values import ANY, DEEPEST, Unused, Values
from vfjax.atomic import JSON
from vfjax.vision.encoders import QwenViTConfig

BLOCK = "blocks.{}."
LARGEST = 8
"""Patches a side that become one token, at most."""


def common(hf: Values, width: str) -> QwenViTConfig:
    """What both have; `width` is the key of a patch's channels.

    Raises:
        InputError: heads that don't fit, sides that are no power of two.
    """
    channels, heads = hf.whole(width, None), hf.whole("num_heads", 16)
    channels = channels or {"embed_dim": 1280, "hidden_size": 3584}[width]
    if channels % (4 * heads):
        raise hf.error("num_heads", f"heads of {width} {channels}, each a multiple of 4 channels")
    merge = hf.whole("spatial_merge_size", 2, most=LARGEST)
    if merge & (merge - 1):
        raise hf.error("spatial_merge_size", f"a power of two up to {LARGEST}")
    rope = hf.section("rope_parameters", None)
    rope.choice("rope_type", ("axial",), "axial")
    theta = rope.number("rope_theta", 10000.0, least=1)
    rope.done({})
    return QwenViTConfig(
        width=channels,
        layers=hf.whole("depth", 32, most=DEEPEST),
        heads=heads,
        mlp=0,
        patch=hf.side("patch_size", 14),
        time=hf.side("temporal_patch_size", 2),
        merge=merge,
        theta=theta,
    )


def qwen2(hf: Values) -> QwenViTConfig:
    """From the keys of Qwen2VLVisionConfig."""
    made = common(hf, "embed_dim")
    act, ratio = hf.activation("hidden_act", "quick_gelu"), hf.whole("mlp_ratio", 4)
    return dataclasses.replace(made, mlp=made.width * ratio, act=act)


def qwen25(hf: Values) -> QwenViTConfig:
    """From the keys of Qwen2_5_VLVisionConfig.

    Raises:
        InputError: as of `common`; windows smaller than a token.
    """
    made = common(hf, "hidden_size")
    window = hf.whole("window_size", 112) // made.merge // made.patch
    if not window:
        raise hf.error("window_size", f"pixels of a token at least, {made.merge * made.patch}")
    return dataclasses.replace(
        made,
        mlp=hf.whole("intermediate_size", 3420),
        act=hf.activation("hidden_act", "silu"),
        gated=True,
        window=window,
        full=hf.wholes("fullatt_block_indexes", (7, 15, 23, 31), least=0),
    )


DEFAULTS3: dict[str, JSON] = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "patch_size": 16,
    "deepstack_visual_indexes": (8, 16, 24),
}
"""Of Qwen3VLVisionConfig."""


def qwen3(hf: Values) -> QwenViTConfig:
    """From the keys of Qwen3VLVisionConfig.

    Raises:
        InputError: as of `common`; learned positions that are no square.
    """
    hf = hf.over(DEFAULTS3)
    made, count = common(hf, "hidden_size"), hf.whole("num_position_embeddings", 2304)
    if math.isqrt(count) ** 2 != count:
        raise hf.error("num_position_embeddings", "the square of a whole number")
    return dataclasses.replace(
        made,
        mlp=hf.whole("intermediate_size"),
        act=hf.activation("hidden_act", "gelu_pytorch_tanh"),
        side=math.isqrt(count),
    )


DEFAULTS_RICE: dict[str, JSON] = {"depth": 24, "hidden_size": 1024}
"""Of RiceConfig."""


def rice(hf: Values) -> QwenViTConfig:
    """From the keys of RiceConfig; a patch is of one frame whatever `temporal_patch_size` says.

    The blocks' norms add 1e-5 whatever `layer_norm_eps` says, which is that of the other norms.

    Raises:
        InputError: as of `common`.
    """
    hf = hf.over(DEFAULTS_RICE)
    return dataclasses.replace(
        common(hf, "hidden_size"),
        mlp=hf.whole("intermediate_size", 4096),
        act=hf.activation("hidden_act", "gelu"),
        time=1,
        eps=1e-5,
        classes=True,
        pre_eps=hf.number("layer_norm_eps", 1e-5),
    )


def attention(part: str) -> tuple[Rule, ...]:
    """Rules of weights or biases; queries, keys and values are one tensor."""
    perm, name = ((1, 0), "kernel") if part == "weight" else (None, "bias")
    return (
        *(
            Rule(f"{BLOCK}attn.qkv.{part}", f"blocks/{{}}/attn/{one}/{name}", perm, part=(i, 3))
            for i, one in enumerate("qkv")
        ),
        Rule(f"{BLOCK}attn.proj.{part}", f"blocks/{{}}/attn/out/{name}", perm),
    )


BLOCKS = (
    *norm(f"{BLOCK}norm1", "blocks/{}/norm1"),
    *norm(f"{BLOCK}norm2", "blocks/{}/norm2"),
    *attention("weight"),
    *attention("bias"),
)
RULES = (Rule("patch_embed.proj.weight", "patch", (1, 2, 3, 4, 0)), *BLOCKS)
PLAIN = (
    *dense(f"{BLOCK}mlp.fc1", "blocks/{}/mlp/fc1"),
    *dense(f"{BLOCK}mlp.fc2", "blocks/{}/mlp/fc2"),
)

UNUSED: Unused = {
    **TOWER,
    "in_channels": (3,),
    "in_chans": (3,),  # of the hub's first files
    "spatial_patch_size": ANY,  # so, too; nothing reads it
    "tokens_per_second": ANY,  # of videos, see `converters.formats.qwen_vl`
}
"""Keys without effect on the tower."""

MERGER = (r"merger\..*", r"deepstack_merger_list\..*")
"""Of a tower that was saved alone, with what makes visual tokens of its states."""

TABLES = (
    Table(
        types=("qwen2_vl_vision",),
        read=qwen2,
        unused={**UNUSED, "hidden_size": ANY},  # the LLM's width
        rules=(*RULES, *PLAIN),
        ignore=MERGER,
    ),
    Table(
        types=("qwen2_5_vl_vision",),
        read=qwen25,
        unused={**UNUSED, "out_hidden_size": ANY},  # the LLM's width
        rules=(
            *RULES,
            *dense(f"{BLOCK}mlp.gate_proj", "blocks/{}/mlp/gate"),
            *dense(f"{BLOCK}mlp.up_proj", "blocks/{}/mlp/up"),
            *dense(f"{BLOCK}mlp.down_proj", "blocks/{}/mlp/down"),
        ),
        ignore=MERGER,
    ),
    Table(
        types=("qwen3_vl_vision",),
        read=qwen3,
        unused={**UNUSED, "out_hidden_size": ANY, "deepstack_visual_indexes": ANY},  # mergers'
        rules=(
            *RULES,
            Rule("patch_embed.proj.bias", "bias"),
            Rule("pos_embed.weight", "table"),
            *dense(f"{BLOCK}mlp.linear_fc1", "blocks/{}/mlp/fc1"),
            *dense(f"{BLOCK}mlp.linear_fc2", "blocks/{}/mlp/fc2"),
        ),
        ignore=MERGER,
    ),
    Table(
        types=("rice_vit",),
        read=rice,
        unused={**UNUSED, "embed_dim": ANY, "text_hidden_size": ANY},  # the last is the LLM's width
        rules=(
            Rule("patch_embed.proj.weight", "patch", (1, 2, 3, 0)),
            Rule("class_embedding", "cls"),
            Rule("class_pos_emb", "angles"),
            *norm("pre_layernorm", "pre_norm"),
            *BLOCKS,
            *PLAIN,
        ),
        ignore=MERGER,
    ),
)
