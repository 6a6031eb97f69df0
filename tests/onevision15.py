"""Folders of LLaVA-OneVision-1.5, for tests, beside what the authors' code made of them.

`data/onevision15.npz` was recorded with ds/llavaonevision1_5/modeling_llavaonevision1_5.py of
EvolvingLMMs-Lab/LLaVA-OneVision-1.5 (a5eb942) and transformers 4.53.3, which it is written for, on
pixels of transformers' Qwen2VLImageProcessor. Its tower was shown one picture or frame at a time:
of several it gives the k-th one's tokens from k - 1 patches too early, its class token among them.
"""

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.checkpoints import write_json
from tests.qwen_vl import IMAGE, PIXELS, VIDEO, picture, write_tokenizer
from vfjax import Video

TEXT: dict[str, Any] = {
    "model_type": "LLaVAOneVision1_5_text",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rope_theta": 1e4,
    "max_position_embeddings": 4096,
    "layer_types": ["full_attention", "full_attention"],
    "sliding_window": None,
    "tie_word_embeddings": False,
}
VISION = {
    "model_type": "rice_vit",
    "depth": 3,
    "embed_dim": 32,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 1,
    "text_hidden_size": 32,
}
CONFIG = {
    "architectures": ["LLaVAOneVision1_5_ForConditionalGeneration"],
    "auto_map": {"AutoConfig": "configuration_llavaonevision1_5.Llavaonevision1_5Config"},
    "model_type": "llavaonevision1_5",
    "text_config": TEXT,
    "vision_config": VISION,
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vocab_size": 320,
    "torch_dtype": "float32",
}
IMAGES = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": 4,
    "temporal_patch_size": 1,
    "size": PIXELS,
}

FRAMES = (picture(40, 24), picture(24, 40).resize((40, 24)), picture(41, 24).resize((40, 24)))
ROWS = (
    [picture(30, 500)],
    [picture(120, 90)],
    [picture(20, 20), picture(61, 47)],
    [picture(200, 33)],
    [],
    [Video(FRAMES)],
)
RECORDED = dict(np.load(Path(__file__).parent / "data" / "onevision15.npz"))
"""Row -> "input_ids", "pixels" (of the first patches), "states" (of these, behind all blocks),
"features", "logits" (the last six), and the "answer", 20 tokens."""


def prompt(row: int) -> list[int]:
    """The row's ids, a picture or video one -200."""
    out: list[int] = []
    for token in RECORDED[f"{row}/input_ids"].tolist():
        token = -200 if token in (IMAGE, VIDEO) else token
        out += [token] if out[-1:] != [-200] or token != -200 else []
    return [token for token in out if token not in (312, 313)]


def shapes(
    text: Mapping[str, Any] = TEXT, vision: Mapping[str, Any] = VISION
) -> dict[str, tuple[int, ...]]:
    """Of all tensors."""
    rows, d, h = text["vocab_size"], text["hidden_size"], text["intermediate_size"]
    size = text["head_dim"]
    q, k = (size * text[f"num_{kind}_heads"] for kind in ("attention", "key_value"))
    w, m, p = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    out = {
        "model.visual.class_embedding": (w,),
        "model.visual.class_pos_emb": (1, w // vision["num_heads"] // 2),
        "model.visual.patch_embed.proj.weight": (w, 3, p, p),
        "model.visual.merger.mlp.0.weight": (4 * w, 4 * w),
        "model.visual.merger.mlp.0.bias": (4 * w,),
        "model.visual.merger.mlp.2.weight": (d, 4 * w),
        "model.visual.merger.mlp.2.bias": (d,),
        "model.language_model.embed_tokens.weight": (rows, d),
        "model.language_model.norm.weight": (d,),
        "lm_head.weight": (rows, d),
    }
    norms = ["pre_layernorm", "merger.ln_q"]
    for i in range(vision["depth"]):
        norms += [f"blocks.{i}.norm1", f"blocks.{i}.norm2"]
        for name, (wide, deep) in {
            "attn.qkv": (3 * w, w),
            "attn.proj": (w, w),
            "mlp.fc1": (m, w),
            "mlp.fc2": (w, m),
        }.items():
            out[f"model.visual.blocks.{i}.{name}.weight"] = (wide, deep)
            out[f"model.visual.blocks.{i}.{name}.bias"] = (wide,)
    out |= {f"model.visual.{x}.{part}": (w,) for x in norms for part in ("weight", "bias")}
    for i in range(text["num_hidden_layers"]):
        sizes = {
            "self_attn.q_proj": (q, d),
            "self_attn.k_proj": (k, d),
            "self_attn.v_proj": (k, d),
            "self_attn.o_proj": (d, q),
            "self_attn.q_norm": (size,),
            "self_attn.k_norm": (size,),
            "mlp.gate_proj": (h, d),
            "mlp.up_proj": (h, d),
            "mlp.down_proj": (d, h),
            "input_layernorm": (d,),
            "post_attention_layernorm": (d,),
        }
        out |= {f"model.language_model.layers.{i}.{x}.weight": y for x, y in sizes.items()}
    return out


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random numbers, the same for a name; those that norms multiply by are around one."""
    found = np.random.default_rng(zlib.crc32(name.encode())).normal(0, 0.2, shape)
    norm = "norm" in name or "ln_q" in name
    return (found + (norm and name.endswith("weight"))).astype(np.float32)


def write(path: Path) -> Path:
    """A folder as the published ones are, which is given back."""
    path.mkdir(parents=True)
    write_tokenizer(path)
    save_file(
        {name: values(name, shape) for name, shape in shapes().items()}, path / "model.safetensors"
    )
    write_json(path / "config.json", CONFIG)
    write_json(path / "preprocessor_config.json", IMAGES)
    return path
