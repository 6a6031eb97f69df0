"""Cambrian's folders with random weights, drawn alike by its authors' code and here, for tests."""

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

CLIP = "openai/clip-vit-large-patch14-336"
DINO = "facebook/dinov2-giant"
SIGLIP = "timm/ViT-SO400M-14-SigLIP-384"
CONVNEXT = "laion/CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-soup"
"""Repositories of the towers, in the order of `NAMES`: SigLIP, CLIP, DINOv2, ConvNeXt."""

NAMES = [
    *("siglip/CLIP-ViT-SO400M-14-384", CLIP),
    *(f"{DINO}-res49", "clip-convnext-XXL-multi-stage-res96"),
]
"""As config.json has them; sides of 7, 6, 7 and 24, 12, 6, 3 tokens."""

VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 7,
    "layer_norm_eps": 1e-3,
}
CLIP_CONFIG = {**VIT, "model_type": "clip_vision_model", "intermediate_size": 24, "image_size": 42}
DINO_CONFIG = {
    **VIT,
    "model_type": "dinov2",
    "mlp_ratio": 2,
    "image_size": 56,
    "use_swiglu_ffn": True,
}
SIGLIP_CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": 49,
        "timm_model_name": "vit_so400m_patch14_siglip_384",
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
        "golden_depth": 2,
        "golden_dim": 16,
        "golden_heads": 2,
        "golden_mlp_ratio": 1.5,
        "golden_patch": 7,
    },
}
CONVNEXT_CONFIG = {
    "embed_dim": 8,
    "vision_cfg": {
        "timm_model_name": "convnext_xxlarge",
        "timm_model_pretrained": False,
        "timm_pool": "",
        "timm_proj": "linear",
        "timm_drop": 0.0,
        "timm_drop_path": 0.1,
        "image_size": 256,
        "golden_depths": [1, 1, 2, 1],
        "golden_dims": [4, 8, 12, 16],
    },
}
OPENAI = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
HALF = [0.5] * 3, [0.5] * 3
IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

CONFIG = {
    "architectures": ["CambrianLlamaForCausalLM"],
    "model_type": "cambrian_llama",
    "attention_bias": False,
    "bos_token_id": 1,
    "connector_depth": 2,
    "connector_only": False,
    "eos_token_id": 2,
    "freeze_mm_mlp_adapter": False,
    "hidden_act": "silu",
    "hidden_size": 32,
    "image_aspect_ratio": "pad",
    "image_position": 5,
    "image_token_len": 36,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
    "mm_projector_lr": None,
    "mm_projector_type": "sva",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_sampler_lr": None,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower_aux_list": NAMES,
    "mm_vision_tower_aux_token_len_list": [36, 36, 36, 144],
    "mm_vision_tower_lr": None,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "num_of_vision_sampler_layers": 2,
    "num_query_group": 1,
    "pretraining_tp": 1,
    "query_num_list": [36],
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "start_of_vision_sampler_layers": 0,
    "stride_of_vision_sampler_layers": 2,
    "tie_word_embeddings": False,
    "tokenizer_model_max_length": 512,
    "tokenizer_padding_side": "right",
    "torch_dtype": "float32",
    "tune_mm_mlp_adapter": False,
    "unfreeze_mm_vision_tower": False,
    "use_cache": True,
    "use_mm_proj": True,
    "vision_hidden_size": 32,
    "vocab_size": 96,
}

PHI3 = {
    "architectures": ["CambrianPhi3ForCausalLM"],
    "model_type": "cambrian_phi3",
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "original_max_position_embeddings": 512,
    "num_of_vision_sampler_layers": 3,
    "start_of_vision_sampler_layers": 1,
    "stride_of_vision_sampler_layers": 1,
}
CASES: dict[str, dict[str, Any]] = {
    "samplers": {},
    "connector": {"connector_only": True, "num_query_group": 2, "query_num_list": [36, 9]},
    "phi3": PHI3,
}
"""Name -> keys beside `CONFIG`, or in place of its own."""

TOY = {"golden_depth", "golden_dim", "golden_heads", "golden_mlp_ratio", "golden_patch"} | {
    *("golden_depths", "golden_dims", "image_size")
}
"""Keys of towers of toy size."""

PUBLISHED = {
    "connector_depth": 3,
    "hidden_size": 4096,
    "image_position": 91,
    "image_token_len": 576,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "mm_vision_tower_aux_list": [
        *("siglip/CLIP-ViT-SO400M-14-384", CLIP),
        *(f"{DINO}-res378", "clip-convnext-XXL-multi-stage"),
    ],
    "mm_vision_tower_aux_token_len_list": [576, 576, 576, 9216],
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_of_vision_sampler_layers": 10,
    "query_num_list": [576],
    "rope_theta": 500000.0,
    "stride_of_vision_sampler_layers": 3,
    "tokenizer_model_max_length": 2048,
    "vision_hidden_size": 1024,
    "vocab_size": 128256,
}
"""Cambrian-8B's keys in place of `CONFIG`'s: scripts/cambrian/finetune_cambrian_8b.sh, Llama-3."""

GIANT = {
    "model_type": "dinov2",
    "hidden_size": 1536,
    "image_size": 518,
    "mlp_ratio": 4,
    "num_attention_heads": 24,
    "num_hidden_layers": 40,
    "patch_size": 14,
    "use_swiglu_ffn": True,
}
"""config.json of its third tower."""

SIZES = [(9, 50), (50, 10), (40, 30), (30, 40), (33, 33)]
"""Width and height of each sample's picture."""


def draw(name: str, shape: Sequence[int]) -> np.ndarray:
    """A tensor's values, by its name: each one moves the output; scales are about one."""
    noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape))
    if len(shape) > 1:
        fan = np.prod(shape[1:]) if len(shape) == 4 else shape[-1]
        return (noise * fan**-0.5).astype(np.float32)
    scale = name.endswith((".weight", ".lambda1", ".gamma"))
    return (0.2 * noise + scale).astype(np.float32)


def picture(seed: int, size: tuple[int, int]) -> np.ndarray:
    """uint8[h, w, 3]: smooth colours and some noise."""
    width, height = size
    rng = np.random.RandomState(seed)
    y, x = np.mgrid[0:height, 0:width] / max(size)
    waves = np.stack([np.sin(2 * np.pi * (k * x + (3 - k) * y + k / 3)) for k in range(3)], -1)
    return (127.5 + 90 * waves + rng.randint(-37, 37, waves.shape)).astype(np.uint8)


def row(seed: int, length: int) -> np.ndarray:
    """Ids with a picture at `image_position`."""
    ids = np.random.RandomState(seed).randint(3, 96, length)
    return np.concatenate([[1], ids[: CONFIG["image_position"] - 1], [-200], ids[4:]])


def write_folder(
    path: Path, shapes: Mapping[str, Mapping[str, Sequence[int]]], config: Mapping[str, Any]
) -> None:
    """A folder with its towers in it.

    Args:
        path: to make.
        shapes: "" or the sub-folder of a tower -> name of a tensor -> shape.
        config: config.json.
    """
    from safetensors.numpy import save_file

    for folder, tensors in shapes.items():
        (path / folder).mkdir(parents=True, exist_ok=True)
        start = f"{folder}/" if folder else ""
        drawn = {name: draw(start + name, shape) for name, shape in tensors.items()}
        stem = "open_clip_model" if folder in OPEN else "model"
        save_file(drawn, path / folder / f"{stem}.safetensors")
    write_configs(path, config)


def write_configs(path: Path, config: Mapping[str, Any], *, full: bool = False) -> None:
    """All JSON files of such a folder; `full`: of towers of the published sizes."""
    siglip, convnext, clip, dino = SIGLIP_CONFIG, CONVNEXT_CONFIG, CLIP_CONFIG, DINO_CONFIG
    side = 42
    if full:
        siglip, convnext = (
            {"vision_cfg": {k: v for k, v in x["vision_cfg"].items() if k not in TOY}}
            for x in (siglip, convnext)
        )
        side, dino = 336, GIANT
        clip = {
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "patch_size": 14,
            "image_size": 336,
        }
    files = {
        "config.json": config,
        "vision_tower/open_clip_config.json": open_clip(siglip, *HALF, "squash"),
        "vision_tower_aux_1/config.json": clip,
        "vision_tower_aux_1/preprocessor_config.json": processor("CLIP", side, *OPENAI),
        "vision_tower_aux_2/config.json": dino,
        "vision_tower_aux_2/preprocessor_config.json": processor("Bit", 32, *IMAGENET),
        "vision_tower_aux_3/open_clip_config.json": open_clip(convnext, *OPENAI),
    }
    for name, content in files.items():
        (path / name).write_text(json.dumps(content))


OPEN = ("vision_tower", "vision_tower_aux_3")
"""Towers in OpenCLIP's files."""


def open_clip(
    config: Mapping[str, Any], mean: Sequence[float], std: Sequence[float], mode: str = "shortest"
) -> dict[str, Any]:
    """open_clip_config.json."""
    shown = {"mean": mean, "std": std, "interpolation": "bicubic", "resize_mode": mode}
    return {"model_cfg": config, "preprocess_cfg": shown}


def processor(kind: str, side: int, mean: Sequence[float], std: Sequence[float]) -> dict[str, Any]:
    """preprocessor_config.json."""
    return {
        "image_processor_type": f"{kind}ImageProcessor",
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_center_crop": True,
        "do_convert_rgb": True,
        "resample": 3,
        "size": {"shortest_edge": side},
        "crop_size": {"height": side - 4 * (kind == "Bit"), "width": side - 4 * (kind == "Bit")},
        "image_mean": mean,
        "image_std": std,
    }
