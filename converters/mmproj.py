"""GGUF files of what LLMs see with, `mmproj`, beside their LLMs': as transformers' folders.

As llama.cpp's tools write and read them (tools/mtmd/clip-impl.h, clip.cpp, models/llava.cpp;
tools/mtmd/legacy-models/convert_image_encoder_to_gguf.py). What the file's model was trained with
is computed, not llama.cpp's own short cuts: activations are exact, pictures are resized by Pillow's
bicubic filter with antialiasing.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from converters.files import gguf
from converters.files.gguf import Held
from converters.files.gguf_header import Header
from converters.towers import PREPROCESSOR
from converters.values import ANY, DEEPEST, Unused, Values
from vfjax import InputError
from vfjax.text.prompts import IMAGE_TOKEN

Seeing = tuple[dict[str, Any], dict[str, Held]]
"""config.json, and tensors by HF names."""

Parts = tuple[dict[str, Any], dict[str, Held], dict[str, Any]]
"""config.json, tensors by HF names, settings of the preprocessor."""

BLOCK = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_out": "self_attn.out_proj",
    "ln1": "layer_norm1",
    "ln2": "layer_norm2",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
}
"""Parts of a transformer block, without .weight and .bias."""

TOWER = {
    "v.class_embd": "embeddings.class_embedding",
    "v.patch_embd.weight": "embeddings.patch_embedding.weight",
    "v.patch_embd.bias": "embeddings.patch_embedding.bias",
    "v.position_embd.weight": "embeddings.position_embedding.weight",
    "v.pre_ln.weight": "pre_layrnorm.weight",
    "v.pre_ln.bias": "pre_layrnorm.bias",
}
"""A CLIP's or SigLIP's tensors outside of its blocks."""

UNUSED: Unused = {
    "has_text_encoder": (False,),
    "has_vision_encoder": (True,),
    "has_audio_encoder": (False,),
    "has_llava_projector": (True,),
    "use_silu": (False,),
    "vision.projection_dim": ANY,  # of CLIP's own head; tensors say the projector's
    "vision.mm_projector_type": ("mlp2x_gelu",),
    "vision.image_crop_resolution": ANY,  # of ways to crop that no checkpoint names
    "vision.image_split_resolution": ANY,
}
"""Keys behind "clip." without effect."""


def seeing(
    header: Header, llm: Header, text: dict[str, Any], tensors: Mapping[str, Held], folder: Path
) -> Seeing:
    """config.json and tensors of an LLM and what it sees with; writes its preprocessor's settings.

    Args:
        header: of the `mmproj` file.
        llm: of the LLM's.
        text: the LLM's config.json.
        tensors: the LLM's by HF names.
        folder: what both stand for.

    Raises:
        InputError: a projector, a key or a tensor that is not known, or no such file.
    """
    kind = header.values.get("general.architecture")
    if kind != gguf.PROJECTOR:
        raise InputError(
            f"{header.path}: general.architecture",
            found=repr(kind)[:60],
            expected=f"{gguf.PROJECTOR!r}, as mmproj files have",
            fix="name the file that llama.cpp takes by --mmproj",
        )
    others = [
        key for key in header.values if not key.startswith(("clip.", "general.", "quantize."))
    ]
    if others:
        raise InputError(
            f"{header.path}: {others[0]}",
            found="a key that is not known",
            expected="those of clip",
            fix="take the repository that the file was made from",
        )
    own = {
        key.removeprefix("clip."): value
        for key, value in header.values.items()
        if key.startswith("clip.")
    }
    values = Values(own, f"{header.path}: clip")
    named = values.text("projector_type", None) or values.text("vision.projector_type", "mlp")
    if named not in PROJECTORS:
        raise InputError(
            f"{header.path}: clip.projector_type",
            found=repr(named)[:60],
            expected=", ".join(PROJECTORS),
            fix="not supported: take the repository that the file was made from",
        )
    config, names, settings = PROJECTORS[named](header, values, text)
    values.done(UNUSED)
    if image := _image_id(llm):
        config["image_token_index"] = image
    (folder / PREPROCESSOR).write_text(json.dumps(settings, indent=2))
    found = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    left = set(header.tensors) - {tensor.name for tensor in names.values()}
    left = {
        name for name in left if not name.startswith("v.head.")
    }  # SigLIP's, which nothing reads
    if left:
        raise InputError(
            f"{header.path}: {min(left)}",
            found=f"a tensor that no part of a {config['model_type']} is",
            expected=f"those of a projector {named!r} and its tower",
            fix="take the repository that the file was made from",
        )
    return config, {**found, **names}


def _image_id(llm: Header) -> int | None:
    """The id of what stands for a picture in the LLM's tokenizer, if it has such a token."""
    tokens = llm.values.get("tokenizer.ggml.tokens", [])
    return tokens.index(IMAGE_TOKEN) if IMAGE_TOKEN in tokens else None


def _tower(header: Header, values: Values) -> dict[str, Any]:
    """Config of a CLIP or SigLIP, by whether it has a class token.

    Raises:
        InputError: an activation that the tower's class has not.
    """
    clip = "v.class_embd" in header.tensors
    gelu = values.flag("use_gelu", False)
    if not clip and not gelu:
        raise values.error("use_gelu", "True of a SigLIP, a tower without class token")
    return {
        "model_type": "clip_vision_model" if clip else "siglip_vision_model",
        "hidden_size": values.whole("vision.embedding_length"),
        "intermediate_size": values.whole("vision.feed_forward_length"),
        "num_attention_heads": values.whole("vision.attention.head_count"),
        "num_hidden_layers": values.whole("vision.block_count", most=DEEPEST),
        "image_size": values.whole("vision.image_size"),
        "patch_size": values.whole("vision.patch_size"),
        "layer_norm_eps": round(values.number("vision.attention.layer_norm_epsilon"), 12),
        "hidden_act": ("gelu" if gelu else "quick_gelu") if clip else "gelu_pytorch_tanh",
    }


def _tower_tensors(header: Header, vision: Mapping[str, Any], prefix: str) -> dict[str, Held]:
    """HF name -> tensor, of a CLIP or SigLIP whose last layer norm nothing reads."""
    width = vision["hidden_size"]
    out: dict[str, Held] = {
        f"{prefix}post_layernorm.weight": gguf.Filled(header.path, (width,), 1.0),
        f"{prefix}post_layernorm.bias": gguf.Filled(header.path, (width,), 0.0),
    }
    block = re.compile(r"v\.blk\.(\d+)\.(\w+)\.(weight|bias)")
    for name in header.tensors:
        if name in TOWER:
            out[prefix + TOWER[name]] = gguf.tensor(header, name)
        if not (found := block.fullmatch(name)):
            continue
        number, part, end = found.groups()
        down = header.tensors.get(f"v.blk.{number}.ffn_down.weight")
        if part in ("ffn_up", "ffn_down") and down and down[0][-1] == width:
            part = "ffn_down" if part == "ffn_up" else "ffn_up"  # old files call fc1 down
        if part in BLOCK:
            out[f"{prefix}encoder.layers.{number}.{BLOCK[part]}.{end}"] = gguf.tensor(header, name)
    return out


def _pixels(values: Values, key: str) -> list[float]:
    """A mean or deviation of each colour, which the file has in float32."""
    found = values.any(f"vision.{key}")
    good = isinstance(found, list) and len(found) == 3 and all(isinstance(x, float) for x in found)
    if not good:
        raise values.error(f"vision.{key}", "three numbers")
    return [float(str(np.float32(x))) for x in found]


def _llava(header: Header, values: Values, text: Mapping[str, Any]) -> Parts:
    """LLaVA-1.5, or 1.6 if there are pinpoints, of any LLM.

    Without `feature_layer` the last of the file's layers is read: its converter left out those
    behind. (llama.cpp stops a layer before it.) The pictures of LLaVA-1.5 are padded to squares, as
    LLaVA's authors' code and llama.cpp do.

    Raises:
        InputError: a key that the family has not.
    """
    vision = _tower(header, values)
    layers, side = vision["num_hidden_layers"], vision["image_size"]
    taps = list(values.wholes("vision.feature_layer", None, least=0, most=layers) or [layers])
    config: dict[str, Any] = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": text["vocab_size"],
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "text_config": dict(text),
        "tie_word_embeddings": text["tie_word_embeddings"],
        "vision_config": vision,
        "vision_feature_layer": taps if taps[1:] else taps[0],
        "vision_feature_select_strategy": "default" if "v.class_embd" in header.tensors else "full",
    }
    settings: dict[str, Any] = {
        "image_processor_type": "LlavaImageProcessor",
        "do_pad": True,
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "resample": 3,
        "image_mean": _pixels(values, "image_mean"),
        "image_std": _pixels(values, "image_std"),
    }
    points = list(values.wholes("vision.image_grid_pinpoints", None, least=1) or [])
    merge = values.text("vision.mm_patch_merge_type", "spatial_unpad" if points else "flat")
    aspect = values.text("vision.image_aspect_ratio", "anyres" if points else "pad")
    if points:
        if len(points) % 2:
            raise values.error("vision.image_grid_pinpoints", "a width and a height of each canvas")
        if merge != "spatial_unpad" or aspect != "anyres":
            key = "mm_patch_merge_type" if merge != "spatial_unpad" else "image_aspect_ratio"
            raise values.error(f"vision.{key}", "'spatial_unpad' and 'anyres' beside pinpoints")
        pairs = [[high, wide] for wide, high in zip(points[::2], points[1::2], strict=True)]
        config |= {
            "architectures": ["LlavaNextForConditionalGeneration"],
            "model_type": "llava_next",
            "image_grid_pinpoints": pairs,
        }
        settings |= {"image_processor_type": "LlavaNextImageProcessor"}
        settings["image_grid_pinpoints"] = pairs
    elif merge != "flat":
        raise values.error("vision.mm_patch_merge_type", "'flat' without pinpoints")
    elif aspect not in ("pad", "square"):
        raise values.error("vision.image_aspect_ratio", "'pad' or 'square' without pinpoints")
    else:
        settings["do_pad"] = aspect == "pad"
    names = _tower_tensors(header, vision, "vision_tower.vision_model.")
    for number, linear in ((0, 1), (2, 2)):
        for end in ("weight", "bias"):
            if (own := f"mm.{number}.{end}") in header.tensors:
                names[f"multi_modal_projector.linear_{linear}.{end}"] = gguf.tensor(header, own)
    for own in ("model.image_newline", "v.image_newline"):
        if points and own in header.tensors:
            names["image_newline"] = gguf.tensor(header, own)
    return config, names, settings


PROJECTORS: dict[str, Callable[[Header, Values, Mapping[str, Any]], Parts]] = {"mlp": _llava}
"""`clip.projector_type` -> its reader."""
