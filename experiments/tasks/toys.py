"""Small LLaVA checkpoints with random weights, one base, different eyes."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

import converters
from converters.layouts import Source
from converters.load import abstract, join, model_config
from converters.towers import Prefixes, Tower
from vfjax import Model

QUESTION = "What is in the picture?"

SPECIAL = ("<unk>", "<s>", "</s>")

LLM: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}

CLIP: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "patch_size": 14,
    "image_size": 84,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}

CLIP_IMAGES: dict[str, Any] = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 84},
    "crop_size": {"height": 84, "width": 84},
}

DINOV2: dict[str, Any] = {
    "model_type": "dinov2",
    "hidden_size": 96,
    "mlp_ratio": 2,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "patch_size": 14,
    "image_size": 98,
    "layer_norm_eps": 1e-6,
}

DINOV2_IMAGES: dict[str, Any] = {
    "image_processor_type": "BitImageProcessor",
    "size": {"shortest_edge": 80},
    "crop_size": {"height": 70, "width": 70},
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def write_family(folder: Path, seed: int) -> dict[str, Path]:
    """Writes base, `clip` (upstream's layout) and `dino` (transformers' layout) into `folder`."""
    seeds = folder / "tokenizer"
    write_tokenizer(seeds)
    base = make(plain(seeds), seed)
    out = {name: folder / name for name in ("base", "clip", "dino")}
    converters.export(base, out["base"])
    for number, (name, source) in enumerate((("clip", upstream(seeds)), ("dino", hf(seeds))), 1):
        converters.export(tuned(make(source, seed + number), base, seed + number), out[name])
    return out


def make(source: Source, seed: int) -> Model:
    """A model of a description in bfloat16, weights drawn from `seed` on the host."""
    graph, params = abstract(model_config(source).build)
    rng = np.random.default_rng(seed)
    for name, param in params.items():
        if name.endswith("scale"):
            value = np.ones(param.shape)
        else:
            value = rng.normal(0, max(param.shape[0], 16) ** -0.5, param.shape)
        params[name] = param.replace(jnp.asarray(value, jnp.bfloat16))
    return join(graph, params)


def tuned(model: Model, base: Model, seed: int) -> Model:
    """The model with the base's LLM, moved a little, as fine-tuning would."""
    rng = np.random.default_rng(seed)

    def move(x: jax.Array) -> jax.Array:
        moved = np.asarray(x, np.float32) + rng.normal(0, 0.02, x.shape)
        return jnp.asarray(moved, x.dtype)

    model.llm = jax.tree.map(move, base.llm)
    return model


def plain(path: Path) -> Source:
    """The base LLM."""
    return Source(path, "llm", LLM, LLM, [], "plain", prefixes={"llm": (("", ""),)})


def upstream(path: Path) -> Source:
    """LLaVA with a CLIP tower in a folder of its own."""
    config = LLM | {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "mm_vision_tower": "vision_tower",
        "mm_hidden_size": CLIP["hidden_size"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "image_aspect_ratio": "pad",
    }
    branch = branch_of("clip", CLIP, CLIP_IMAGES, aspect="pad")
    prefixes: dict[str, Prefixes] = {
        "llm": (("", ""),),
        "branches.clip.connector": (("model.mm_projector.", ""),),
        "branches.clip.encoder": (("vision_model.", ""),),
    }
    tower = {"branches.clip.encoder": Tower(CLIP, CLIP_IMAGES)}
    return Source(path, "llava", config, LLM, [branch], "vicuna_v1", {}, prefixes, tower)


def hf(path: Path) -> Source:
    """LLaVA as transformers keeps it, with a DINOv2 tower."""
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": LLM,
        "vision_config": DINOV2,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "torch_dtype": "bfloat16",
    }
    branch = branch_of("dinov2", DINOV2, DINOV2_IMAGES, aspect="crop")
    prefixes: dict[str, Prefixes] = {
        "llm": (("language_model.model.", "model."), ("language_model.lm_head.", "lm_head.")),
        "branches.dinov2.connector": (
            ("multi_modal_projector.linear_1.", "0."),
            ("multi_modal_projector.linear_2.", "2."),
        ),
        "branches.dinov2.encoder": (("vision_tower.", ""),),
    }
    return Source(path, "llava-hf", config, LLM, [branch], "vicuna_v1", {}, prefixes)


def branch_of(
    name: str, encoder: dict[str, Any], images: dict[str, Any], *, aspect: str
) -> dict[str, Any]:
    """A branch with LLaVA-1.5's taps and projector."""
    return {
        "name": name,
        "encoder": encoder,
        "preprocessor": images,
        "connector": {
            "model_type": "mlp",
            "mm_projector_type": "mlp2x_gelu",
            "din": encoder["hidden_size"],
            "dout": LLM["hidden_size"],
            "groups": [[-2]],
            "drop": 1,
        },
        "aspect": aspect,
    }


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer that puts <s> first, and the preprocessor of the DINOv2 member."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=SPECIAL[0]))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model.train_from_iterator(
        [QUESTION, "A chat between a curious user and an artificial intelligence assistant."],
        tokenizers.trainers.BpeTrainer(
            vocab_size=LLM["vocab_size"],
            special_tokens=list(SPECIAL),
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    folder.mkdir(parents=True)
    model.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (folder / "preprocessor_config.json").write_text(json.dumps(DINOV2_IMAGES, indent=2))
