"""LLaVA-1.5 and 1.6 folders: upstream's (LLaVA llava/model), and transformers' in all spellings."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.layouts import Layout, Source
from converters.reader import read_json
from converters.towers import Tower, Towers
from vfjax import InputError

MODELS = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}
"""Upstream's `model_type` -> its LLM's."""

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

Names = tuple[tuple[str, str, str], ...]


def is_upstream(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of LLaVA's code or of code that grew from it."""
    return config.get("model_type") in MODELS and "text_config" not in config


def describe_upstream(path: Path, config: dict[str, Any], towers: Towers) -> Source:
    """Normal form of an upstream folder; the tower is the separate one unless it was tuned."""
    tower = upstream_tower(path, config, towers)
    branch = upstream_branch(path, config, tower)
    return upstream_source(path, "llava", config, branch, tower)


def upstream_tower(path: Path, config: Mapping[str, Any], towers: Towers) -> Tower:
    """The tower that an upstream config names."""
    return towers.find(path, str(config.get("mm_vision_tower") or config.get("vision_tower")))


def upstream_branch(path: Path, config: Mapping[str, Any], tower: Tower) -> dict[str, Any]:
    """The branch of an upstream folder, one layer through a projector.

    Raises:
        InputError: an image_aspect_ratio, merge or feature that upstream does not have.
    """
    aspect = choice(path, config, "image_aspect_ratio", "square", ("pad", "square", "anyres"))
    select = choice(path, config, "mm_vision_select_feature", "patch", ("patch", "cls_patch"))
    connector = {
        "model_type": "mlp",
        "mm_projector_type": config.get("mm_projector_type", "linear"),
        "din": config["mm_hidden_size"],
        "dout": config["hidden_size"],
        "groups": [[config.get("mm_vision_select_layer", -2)]],
        "drop": 1 if select == "patch" else 0,
    }
    if aspect == "anyres":
        merges = ("flat", "spatial", "spatial_unpad")
        connector["merge"] = choice(path, config, "mm_patch_merge_type", "flat", merges)
        connector["pinpoints"] = config["image_grid_pinpoints"]
    return {
        "name": tower.config["model_type"].split("_")[0],
        "encoder": tower.config,
        "preprocessor": tower.preprocessor,
        "aspect": "pad" if aspect == "pad" else "crop",
        "connector": connector,
    }


def choice(
    path: Path, config: Mapping[str, Any], key: str, default: str, known: tuple[str, ...]
) -> str:
    """A config value that must be one of a few.

    Raises:
        InputError: it is another.
    """
    value = config.get(key) or default
    if value not in known:
        raise InputError(
            f"{path / 'config.json'}: {key}",
            found=repr(value),
            expected=", ".join(map(repr, known)),
            fix="correct the config, or this kind of model is not supported",
        )
    return value


def upstream_source(
    path: Path,
    layout: str,
    config: dict[str, Any],
    branch: dict[str, Any],
    tower: Tower,
    *,
    llm: str = "",
    template: str = "vicuna_v1",
    own: tuple[str, ...] = (),
) -> Source:
    """An upstream folder's normal form; `own` are more keys that are not the LLM's."""
    kept = {k: v for k, v in config.items() if k not in (*OWN, *own) and not k.startswith("mm_")}
    kept["model_type"] = llm or MODELS[config["model_type"]]
    encoder = f"branches.{branch['name']}.encoder"
    tuned = (encoder,) if config.get("unfreeze_mm_vision_tower") else ()
    return Source(
        path, layout, config, kept, [branch], template, towers={encoder: tower}, tuned=tuned
    )


def upstream_names(source: Source) -> Names:
    """Upstream's names."""
    branch = f"branches.{source.branches[0]['name']}"
    return (
        ("model.mm_projector.weight", f"{branch}.connector", "0.weight"),
        ("model.mm_projector.bias", f"{branch}.connector", "0.bias"),
        ("model.mm_projector.", f"{branch}.connector", ""),
        ("model.image_newline", f"{branch}.connector", "image_newline"),
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
    for key in ("torch_dtype", "dtype", "tie_word_embeddings"):
        if key in config:
            llm.setdefault(key, config[key])
    layer = config.get("vision_feature_layer", -2)
    taps = list(layer) if isinstance(layer, list) else [layer]
    select = config.get("vision_feature_select_strategy", "default")
    branch = {
        "name": vision["model_type"].split("_")[0],
        "encoder": vision,
        "preprocessor": _preprocessor(path),
        "aspect": "crop",
        "connector": {
            "model_type": "mlp",
            "mm_projector_type": "mlp2x_gelu",
            "act": config.get("projector_hidden_act", "gelu"),
            "din": vision.get("hidden_size", 768) * len(taps),
            "dout": llm.get("hidden_size", 4096),
            "groups": [[tap] for tap in taps],
            "drop": 1 if select == "default" else 0,
        },
    }
    return Source(path, "llava-hf", config, llm, [branch], template="vicuna_v1")


def _preprocessor(path: Path) -> dict[str, Any]:
    """Version 5 of transformers keeps the image processor inside processor_config.json."""
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


def hf_names(source: Source) -> Names:
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


def _is_hf(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == "llava" and "text_config" in config


LAYOUTS = (
    Layout("llava", is_upstream, describe_upstream, upstream_names, general=True),
    Layout("llava-hf", _is_hf, describe_hf, hf_names),
)
