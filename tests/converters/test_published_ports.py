"""Full-size ports, by transformers' classes without weights: names, shapes, rows of MODELS.md."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from transformers.initialization import no_init_weights

from converters import open_source
from converters.load import check, model_config
from tests import onevision15
from tests.checkpoints import header_file, write_json
from tests.converters.test_published import MODELS, row, shapes

INTERNVIT = {
    "attention_bias": True,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
}
SIGLIP = {
    "hidden_size": 1152,
    "image_size": 384,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
}
SIGLIP_BASE = {
    "hidden_size": 768,
    "image_size": 512,
    "num_attention_heads": 12,
    "patch_size": 16,
}
SMOLLM2 = {
    "model_type": "llama",
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "vocab_size": 49280,
}
QWEN = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
VISION = {"depth": 32, "num_heads": 16, "patch_size": 14, "spatial_merge_size": 2}
PORTS: Mapping[str, dict[str, Any]] = {
    "InternVL3-8B-hf": {
        "model_type": "internvl",
        "vision_config": INTERNVIT,
        "text_config": {
            "model_type": "qwen2",
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "max_position_embeddings": 32768,
            "num_attention_heads": 28,
            "num_hidden_layers": 28,
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1000000.0},
            "vocab_size": 151674,
        },
        "tie_word_embeddings": False,
    },
    "InternVL3_5-8B-HF": {
        "model_type": "internvl",
        "image_token_id": 151671,
        "vision_config": INTERNVIT,
        "text_config": {
            "model_type": "qwen3",
            "head_dim": 128,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "max_position_embeddings": 40960,
            "num_attention_heads": 32,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            "vocab_size": 151936,
        },
        "tie_word_embeddings": False,
    },
    "Idefics3-8B-Llama3": {
        "model_type": "idefics3",
        "scale_factor": 2,
        "vision_config": {**SIGLIP, "image_size": 364},
        "text_config": {
            "model_type": "llama",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 10240,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
            "vocab_size": 128259,
        },
    },
    "SmolVLM-256M-Instruct": {
        "model_type": "idefics3",
        "image_token_id": 49190,
        "scale_factor": 4,
        "vision_config": SIGLIP_BASE,
        "text_config": {
            **SMOLLM2,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_attention_heads": 9,
            "num_hidden_layers": 30,
            "num_key_value_heads": 3,
        },
    },
    "SmolVLM2-500M-Video-Instruct": {
        "model_type": "smolvlm",
        "image_token_id": 49190,
        "scale_factor": 4,
        "vision_config": SIGLIP_BASE,
        "text_config": {
            **SMOLLM2,
            "hidden_size": 960,
            "intermediate_size": 2560,
            "num_attention_heads": 15,
            "num_hidden_layers": 32,
            "num_key_value_heads": 5,
        },
    },
    "SmolVLM-Instruct": {
        "model_type": "idefics3",
        "image_token_id": 49153,
        "scale_factor": 3,
        "vision_config": SIGLIP,
        "text_config": {
            **SMOLLM2,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "max_position_embeddings": 16384,
            "num_attention_heads": 32,
            "num_hidden_layers": 24,
            "rope_parameters": {"rope_type": "default", "rope_theta": 273768.0},
            "vocab_size": 49155,
        },
    },
    "llava-onevision-qwen2-7b-ov-hf": {
        "model_type": "llava_onevision",
        "vision_config": {
            **SIGLIP,
            "model_type": "siglip_vision_model",
            "num_hidden_layers": 26,
            "vision_use_head": False,
        },
        "text_config": {
            "model_type": "qwen2",
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "max_position_embeddings": 32768,
            "num_attention_heads": 28,
            "num_hidden_layers": 28,
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            "vocab_size": 152000,
        },
    },
    "Qwen2-VL-7B-Instruct": {
        **QWEN,
        "model_type": "qwen2_vl",
        "max_position_embeddings": 32768,
        "vision_config": {**VISION, "embed_dim": 1280, "hidden_size": 3584, "mlp_ratio": 4},
    },
    "Qwen2.5-VL-7B-Instruct": {
        **QWEN,
        "model_type": "qwen2_5_vl",
        "max_position_embeddings": 128000,
        "vision_config": {
            **VISION,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "out_hidden_size": 3584,
            "tokens_per_second": 2,
            "window_size": 112,
        },
    },
    "Ovis2-2B-hf": {
        "model_type": "ovis2",
        "hidden_size": 1536,
        "vision_config": {
            "hidden_stride": 2,
            "image_size": 448,
            "vocab_size": 65536,
        },
        "text_config": {
            "model_type": "qwen2",
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "max_position_embeddings": 32768,
            "num_attention_heads": 12,
            "num_hidden_layers": 28,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            "vocab_size": 151936,
        },
        "vocab_size": 151936,
    },
    "Qwen3-VL-8B-Instruct": {
        "model_type": "qwen3_vl",
        "vision_config": {
            "deepstack_visual_indexes": [8, 16, 24],
            "depth": 27,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_heads": 16,
            "num_position_embeddings": 2304,
            "out_hidden_size": 4096,
            "patch_size": 16,
        },
        "text_config": {
            "head_dim": 128,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "max_position_embeddings": 262144,
            "num_attention_heads": 32,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5000000.0,
                "mrope_interleaved": True,
                "mrope_section": [24, 20, 20],
            },
            "vocab_size": 151936,
        },
    },
}
"""Configs of the published repositories."""


def idefics(size: int, tile: int, tokens: int) -> dict[str, Any]:
    """Idefics3's processor_config.json; SmolVLM's is the same but for videos."""
    images = {"size": {"longest_edge": size}, "max_image_size": {"longest_edge": tile}}
    return {"image_processor": images, "image_seq_len": tokens}


NATIVE = {
    "image_processor": {
        "image_processor_type": "Qwen2VLImageProcessor",
        "max_pixels": 12845056,
        "min_pixels": 3136,
    },
}
PROCESSORS = {
    "internvl": {
        "image_processor": {
            "image_processor_type": "GotOcr2ImageProcessor",
            "size": {"height": 448, "width": 448},
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
        },
        "image_seq_length": 256,
    },
    "llava_onevision": {
        "image_processor": {"image_processor_type": "LlavaOnevisionImageProcessor"},
        "num_image_tokens": 729,
    },
    "Idefics3-8B-Llama3": idefics(4 * 364, 364, 169),
    "SmolVLM-256M-Instruct": idefics(4 * 512, 512, 64),
    "SmolVLM2-500M-Video-Instruct": idefics(4 * 512, 512, 64),
    "SmolVLM-Instruct": idefics(4 * 384, 384, 81),
    "qwen2_vl": NATIVE,
    "qwen2_5_vl": NATIVE,
    "ovis2": {
        "image_processor": {
            "image_processor_type": "Ovis2ImageProcessor",
            "crop_to_patches": True,
            "size": {"height": 448, "width": 448},
        },
        "image_seq_length": 256,
    },
    "qwen3_vl": {
        "image_processor": {
            "image_processor_type": "Qwen2VLImageProcessorFast",
            "patch_size": 16,
            "size": {"longest_edge": 16777216, "shortest_edge": 65536},
        },
        "video_processor": {
            "video_processor_type": "Qwen3VLVideoProcessor",
            "size": {"longest_edge": 25165824, "shortest_edge": 4096},
        },
    },
}
"""`model_type`, or model -> processor_config.json."""


def tokenizer_files(path: Path) -> None:
    """One token a mark of Idefics3, and one for two newlines, as the published ones have."""
    engine = tokenizers.Tokenizer(tokenizers.models.BPE({"Ċ": 0, "ĊĊ": 1}, [("Ċ", "Ċ")]))
    engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    marks = [f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)]
    engine.add_special_tokens(["<fake_token_around_image>", "<image>", "<global-img>", *marks])
    engine.save(str(path / "tokenizer.json"))
    write_json(path / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})


SIZES = ((336, 336), (1024, 768), (500, 3000))


def assert_listed(name: str, folder: Path, count: int) -> None:
    """The folder's tensors are the model's, so many parameters, and its rows are in MODELS.md."""
    source = open_source(folder)
    params = shapes(source)
    check(source, params)
    assert sum(math.prod(p.shape) for p in params.values()) == count
    (branch,) = model_config(source).branches
    counts = [str(len(branch.architecture.regions(size))) for size in SIZES]
    lines = MODELS.read_text().splitlines()
    assert row(name, source) in lines
    assert f"| {' | '.join([name, *counts])} |" in lines


@pytest.mark.parametrize("name", PORTS)
def test_port(tmp_path: Path, name: str):
    """Every tensor of the class is a parameter, and the other way round."""
    given = PORTS[name]
    config = transformers.AutoConfig.for_model(**given)
    with no_init_weights(), torch.device("meta"):
        theirs = transformers.AutoModelForImageTextToText.from_config(config)
    theirs.tie_weights()  # left out with the rest of the initialisation
    named = {n: ("BF16", list(x.shape)) for n, x in theirs.named_parameters()}
    write_json(tmp_path / "config.json", config.to_dict())
    processor = PROCESSORS[name if name in PROCESSORS else given["model_type"]]
    write_json(tmp_path / "processor_config.json", processor)
    if given["model_type"] in ("idefics3", "smolvlm"):
        tokenizer_files(tmp_path)
    header_file(tmp_path / "model.safetensors", named)
    assert_listed(name, tmp_path, theirs.num_parameters())


@pytest.mark.parametrize("kind", ["llava_qwen", "llava"])
def test_authors_onevision(tmp_path: Path, kind: str):
    """LLaVA-NeXT's code: Qwen2 with a projector, a newline, and SigLIP without its last layer."""
    name = "llava-onevision-qwen2-7b-ov"
    text = {**PORTS[f"{name}-hf"]["text_config"], "vocab_size": 152064}
    config = transformers.AutoConfig.for_model(**text)
    vision = transformers.SiglipVisionConfig(
        **{**SIGLIP, "num_hidden_layers": 26}, vision_use_head=False
    )
    with no_init_weights(), torch.device("meta"):
        llm = transformers.AutoModelForCausalLM.from_config(config).state_dict()
        tower = transformers.SiglipVisionModel(vision).state_dict()
    shown = {n.removeprefix("vision_model."): x for n, x in tower.items()}
    named = {n: list(x.shape) for n, x in llm.items()}
    named |= {
        f"model.vision_tower.vision_tower.vision_model.{n}": x.shape for n, x in shown.items()
    }
    for i, width in ((0, 1152), (2, 3584)):
        named[f"model.mm_projector.{i}.weight"] = [3584, width]
        named[f"model.mm_projector.{i}.bias"] = [3584]
    named["model.image_newline"] = [3584]
    own = {
        "architectures": ["LlavaQwenForCausalLM"],
        "model_type": kind,
        "image_aspect_ratio": "anyres_max_9",
        "image_crop_resolution": None,
        "image_grid_pinpoints": [[384 * i, 384 * j] for i in range(1, 7) for j in range(1, 7)],
        "image_split_resolution": None,
        "image_token_index": 151646,
        "mm_hidden_size": 1152,
        "mm_newline_position": "one_token",
        "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_lr": None,
        "mm_projector_type": "mlp2x_gelu",
        "mm_resampler_type": None,
        "mm_spatial_pool_mode": "bilinear",
        "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "google/siglip-so400m-patch14-384",
        "mm_vision_tower_lr": 2e-06,
        "pos_skipping_range": 4096,
        "tokenizer_model_max_length": 32768,
        "tokenizer_padding_side": "right",
        "use_mm_proj": True,
        "use_pos_skipping": False,
        "vision_tower_pretrained": None,
    }
    write_json(tmp_path / "config.json", {**text, **own})
    header_file(tmp_path / "model.safetensors", {n: ("BF16", list(x)) for n, x in named.items()})
    assert_listed(name, tmp_path, sum(map(math.prod, named.values())))


def test_onevision15(tmp_path: Path):
    """LLaVA-OneVision-1.5's own code: Qwen3-8B and RICE, by the sizes that its authors give."""
    name, llm = "LLaVA-OneVision-1.5-8B-Instruct", PORTS["InternVL3_5-8B-HF"]["text_config"]
    text = {k: llm.get(k, v) for k, v in onevision15.TEXT.items()} | {
        "model_type": "LLaVAOneVision1_5_text",
        "layer_types": None,
    }
    sizes = {"depth": 24, "embed_dim": 1024, "hidden_size": 1024, "intermediate_size": 4096}
    vision = {**onevision15.VISION, **sizes, "num_heads": 16, "patch_size": 14}
    vision["text_hidden_size"] = text["hidden_size"]
    named = onevision15.shapes(text, vision)
    config = {**onevision15.CONFIG, "text_config": text, "vision_config": vision}
    ids = {"image_token_id": 151655, "video_token_id": 151656}
    write_json(tmp_path / "config.json", {**config, **ids, "vocab_size": text["vocab_size"]})
    pixels = {"shortest_edge": 3136, "longest_edge": 1600 * 1600}
    images = {**onevision15.IMAGES, "patch_size": 14, "size": pixels}
    write_json(tmp_path / "preprocessor_config.json", images)
    header_file(tmp_path / "model.safetensors", {n: ("BF16", list(x)) for n, x in named.items()})
    assert_listed(name, tmp_path, sum(map(math.prod, named.values())))
