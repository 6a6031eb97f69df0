"""Keys of published config.json files, as their authors spelled them."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from converters.registry import TABLES
from converters.source import layout_of
from converters.towers import Towers
from tests.checkpoints import write_json
from vfjax import InputError

VICUNA: dict[str, Any] = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_length": 4096,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0",
    "use_cache": True,
    "vocab_size": 32000,
}

LLAVA: dict[str, Any] = {
    **VICUNA,
    "_name_or_path": "llava-v1.5-7b",
    "architectures": ["LlavaLlamaForCausalLM"],
    "freeze_mm_mlp_adapter": False,
    "freeze_mm_vision_resampler": False,
    "image_aspect_ratio": "pad",
    "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None,
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "model_type": "llava",
    "tune_mm_mlp_adapter": False,
    "tune_mm_vision_resampler": False,
    "unfreeze_mm_vision_tower": False,
    "use_mm_proj": True,
}

PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]

NEXT: dict[str, Any] = {
    **LLAVA,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "image_aspect_ratio": "anyres",
    "image_crop_resolution": 224,
    "image_grid_pinpoints": PINPOINTS,
    "image_split_resolution": 224,
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_lr": None,
    "mm_vision_tower_lr": 2e-06,
    "rope_theta": 10000.0,
    "tokenizer_model_max_length": 4096,
    "tokenizer_padding_side": "right",
    "unfreeze_mm_vision_tower": True,
}

HUB: dict[str, Any] = {
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.36.0.dev0",
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vocab_size": 32064,
}

WHOLE = {
    "llava-v1.5-7b": LLAVA,
    "llava-v1.6-vicuna-7b": NEXT,
    "llava-1.5-7b-hf": HUB,
    "llava-v1.6-vicuna-7b-hf": {
        **HUB,
        "image_grid_pinpoints": PINPOINTS,
        "model_type": "llava_next",
        "use_image_newline_parameter": True,
    },
    "LlavaConfig's own": transformers.LlavaConfig().to_dict(),
}
"""Name -> the whole file."""


@pytest.mark.parametrize("name", WHOLE)
def test_whole_files(tmp_path: Path, name: str):
    config = json.loads(json.dumps(WHOLE[name]))
    kind = "LlavaNextImageProcessor" if "1.6" in name else "CLIPImageProcessor"
    preprocessor = {
        "image_processor_type": kind,
        "size": {"shortest_edge": 336},
        "crop_size": {"height": 336, "width": 336},
    }
    write_json(tmp_path / "preprocessor_config.json", preprocessor)
    layout = layout_of(config)
    assert layout is not None
    source = layout.open(tmp_path, config, Towers())
    assert source.config_of("llm").layers == 32
    assert source.config_of("branches.clip.encoder").layers == 24


ODD: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "vicuna-7b-v1.3": ("llama", {"max_sequence_length": 2048}, {}),
    "SmolLM2": (
        "llama",
        {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"x": 1}},
        {"rope_interleaved": True},
    ),
    "Qwen1.5": ("qwen2", {"seq_length": 32768, "use_sliding_window": False}, {}),
    "Qwen2.5": ("qwen2", {"use_mrope": False}, {"use_mrope": True}),
    "Qwen2.5-1M": ("qwen2", {"dual_chunk_attention_config": {"chunk_size": 262144}}, {}),
    "Phi-4-mini": (
        "phi3",
        {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False},
        {"full_attn_mod": 2, "interpolate_factor": 2, "lm_head_bias": True},
    ),
    "dinov2-with-registers": (
        "dinov2_with_registers",
        {"interpolate_antialias": True, "interpolate_offset": 0.0},
        {"interpolate_antialias": False, "interpolate_offset": 0.1},
    ),
}
"""Name -> model_type, keys that no class of transformers has, and values that are refused."""


@pytest.mark.parametrize("name", ODD)
def test_keys_of_no_class(name: str):
    kind, keys, others = ODD[name]
    table, plain = TABLES[kind], {"model_type": kind}
    assert table.config({**plain, **keys}) == table.config(plain)
    for key, value in others.items():
        with pytest.raises(InputError, match=key):
            table.config({**plain, key: value})


def test_as_many_kinds_of_layers_as_layers():
    with pytest.raises(InputError, match="layer_types.*expected 2, one for each"):
        TABLES["llama"].config({"num_hidden_layers": 2, "layer_types": ["full_attention"]})
