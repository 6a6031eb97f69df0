"""LLaVA-1.5 folders: upstream's (LLaVA llava/model), and transformers' in all spellings."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.layouts import Layout, Source, Towers
from converters.reader import read_json
from vfjax import InputError

OTHERS = ("mm_dense_connector_type", "mm_vision_tower_aux")
"""Config keys of families that share upstream's names but not its computation."""


def describe_upstream(path: Path, config: dict[str, Any], towers: Towers) -> Source:
    """Normal form of an upstream folder; the tower is the separate one unless it was tuned."""
    where = path / "config.json"
    for key in OTHERS:
        if config.get(key):
            raise InputError(
                f"{where}: {key}", found=repr(config[key]), expected="none", fix="not supported yet"
            )
    aspect = config.get("image_aspect_ratio") or "square"
    if aspect not in ("pad", "square"):
        raise InputError(
            f"{where}: image_aspect_ratio",
            found=repr(aspect),
            expected="'pad' or 'square'",
            fix="not supported yet",
        )
    if (select := config.get("mm_vision_select_feature", "patch")) not in ("patch", "cls_patch"):
        raise InputError(
            f"{where}: mm_vision_select_feature",
            found=repr(select),
            expected="'patch' or 'cls_patch'",
            fix="correct the config",
        )
    name = config.get("mm_vision_tower") or config.get("vision_tower")
    tower = towers.find(path, str(name))
    if tower is None:
        raise towers.missing(path, str(name))
    branch = {
        "name": tower.config["model_type"].split("_")[0],
        "encoder": tower.config,
        "preprocessor": tower.preprocessor,
        "connector": {
            "model_type": "mlp",
            "mm_projector_type": config.get("mm_projector_type", "linear"),
            "din": config["mm_hidden_size"],
            "dout": config["hidden_size"],
        },
        "aspect": "pad" if aspect == "pad" else "crop",
        "taps": [config.get("mm_vision_select_layer", -2)],
        "drop": 1 if select == "patch" else 0,
    }
    llm = {k: v for k, v in config.items() if k not in OWN and not k.startswith("mm_")}
    llm |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    source = Source(path, "llava", config, llm, [branch], template="vicuna_v1")
    if not config.get("unfreeze_mm_vision_tower"):
        source.towers[f"branches.{branch['name']}.encoder"] = tower
    return source


OWN = (
    "_name_or_path",
    "auto_map",
    "freeze_mm_mlp_adapter",
    "image_aspect_ratio",
    "image_crop_resolution",
    "image_grid_pinpoints",
    "image_split_resolution",
    "tokenizer_model_max_length",
    "tokenizer_padding_side",
    "tune_mm_mlp_adapter",
    "tune_mm_vision_resampler",
    "unfreeze_mm_vision_tower",
    "use_mm_proj",
    "vision_tower",
)
"""Keys of upstream's config that are not the LLM's, beside `mm_*`."""


def upstream_prefixes(source: Source) -> tuple[tuple[str, str, str], ...]:
    """Upstream's names."""
    branch = f"branches.{source.branches[0]['name']}"
    return (
        ("model.mm_projector.weight", f"{branch}.connector", "0.weight"),
        ("model.mm_projector.bias", f"{branch}.connector", "0.bias"),
        ("model.mm_projector.", f"{branch}.connector", ""),
        ("model.vision_tower.vision_tower.vision_model.", f"{branch}.encoder", ""),
        ("model.vision_tower.vision_tower.", f"{branch}.encoder", ""),
        ("", "llm", ""),
    )


def describe_hf(path: Path, config: dict[str, Any], towers: Towers) -> Source:
    """Normal form of a transformers folder. Its processors crop; upstream's pad."""
    del towers  # the tower is in the folder
    vision, llm = dict(config["vision_config"]), dict(config["text_config"])
    vision.setdefault("model_type", "clip_vision_model")  # the defaults of LlavaConfig
    llm.setdefault("model_type", "llama")
    llm |= {"architectures": ["LlamaForCausalLM"]}
    for key in ("torch_dtype", "dtype", "tie_word_embeddings"):
        if key in config:
            llm.setdefault(key, config[key])
    layer = config.get("vision_feature_layer", -2)
    select = config.get("vision_feature_select_strategy", "default")
    taps = list(layer) if isinstance(layer, list) else [layer]
    branch = {
        "name": vision["model_type"].split("_")[0],
        "encoder": vision,
        "preprocessor": _preprocessor(path),
        "connector": {
            "model_type": "mlp",
            "mm_projector_type": "mlp2x_gelu",
            "act": config.get("projector_hidden_act", "gelu"),
            "din": vision.get("hidden_size", 768) * len(taps),
            "dout": llm.get("hidden_size", 4096),
        },
        "aspect": "crop",
        "taps": taps,
        "drop": 1 if select == "default" else 0,
    }
    return Source(path, "llava-hf", config, llm, [branch], template="vicuna_v1")


def _preprocessor(path: Path) -> dict[str, Any]:
    """Transformers 5 keeps the image processor inside processor_config.json."""
    if (path / "preprocessor_config.json").is_file():
        return read_json(path / "preprocessor_config.json")
    if (path / "processor_config.json").is_file():
        nested = read_json(path / "processor_config.json").get("image_processor")
        if isinstance(nested, dict):
            return nested
    raise InputError(
        path,
        found="no preprocessor_config.json",
        expected="it, or processor_config.json with an image_processor",
        fix="copy it from the published repository",
    )


def hf_prefixes(source: Source) -> tuple[tuple[str, str, str], ...]:
    """Names of the hub, and of later transformers in memory and on disk."""
    branch = f"branches.{source.branches[0]['name']}"
    return (
        ("language_model.model.", "llm", "model."),
        ("language_model.lm_head.", "llm", "lm_head."),
        ("model.language_model.", "llm", "model."),
        ("lm_head.", "llm", "lm_head."),
        *(
            (start + old, f"{branch}.{part}", new)
            for start in ("", "model.")
            for old, part, new in (
                ("vision_tower.vision_model.", "encoder", ""),
                ("vision_tower.", "encoder", ""),
                ("multi_modal_projector.linear_1.", "connector", "0."),
                ("multi_modal_projector.linear_2.", "connector", "2."),
            )
        ),
    )


def _is_upstream(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") in ("llava", "llava_llama") and "text_config" not in config


def _is_hf(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == "llava" and "text_config" in config


LAYOUTS = (
    Layout("llava", _is_upstream, describe_upstream, upstream_prefixes),
    Layout("llava-hf", _is_hf, describe_hf, hf_prefixes),
)
