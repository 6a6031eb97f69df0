"""LLaVA-1.5 and 1.6 folders: upstream's (LLaVA llava/model), and transformers' in all spellings.

A folder is read as the code that its config.json is for reads it. Upstream pads pictures of
LLaVA-1.5 with their mean colour; transformers' port crops them. Of LLaVA-1.6, whose ports are
nearly the same, see `describe_next`.
"""

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters import tables
from converters.chat import read_chat_template
from converters.layouts import Layout, Source, tokenizer_class
from converters.preprocessor import from_preprocessor, read_preprocessor
from converters.reader import read_json
from converters.towers import Tower, Towers
from vfjax import InputError
from vfjax.chat import CHAT_TEMPLATE
from vfjax.prompts import IMAGE_TOKEN

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

_PROCESSORS = {"llava": "LlavaImageProcessor", "llava_next": "LlavaNextImageProcessor"}
"""`model_type` of transformers' folders -> the image processor of files that don't name one."""

Names = tuple[tuple[str, str, str], ...]


def is_upstream(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of LLaVA's code or of code that grew from it."""
    return config.get("model_type") in MODELS and "text_config" not in config


def describe_upstream(path: Path, config: dict[str, Any], towers: Towers) -> Source:
    """Normal form of an upstream folder; the tower is the separate one unless it was tuned."""
    tower = upstream_tower(path, config, towers)
    branch = upstream_branch(path, config, tower)
    return upstream_source(path, "llava", config, branch, tower)


def _pinpoints(path: Path, found: Any) -> list[list[int]]:
    """(width, height) of each canvas: of a list, or of its text, which mm_utils.py reads, too."""
    try:
        value = ast.literal_eval(found) if isinstance(found, str) else found
        return [[int(width), int(height)] for width, height in value]
    except (SyntaxError, TypeError, ValueError) as error:
        raise InputError(
            f"{path / 'config.json'}: image_grid_pinpoints",
            found=repr(found)[:60],
            expected="pairs of width and height, as [[336, 672], [672, 336]]",
            fix="correct it",
        ) from error


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
        connector["pinpoints"] = _pinpoints(path, config["image_grid_pinpoints"])
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
    template: str = "",
    own: tuple[str, ...] = (),
) -> Source:
    """An upstream folder's normal form.

    Args:
        path: the folder.
        layout: its name.
        config: its config.json.
        branch: its only one.
        tower: the branch's.
        llm: `model_type` of the LLM, by default upstream's.
        template: name of the prompt template, by default upstream's, see `prompt_template`.
        own: more keys that are not the LLM's.
    """
    if config.get("mm_use_im_start_end"):
        raise InputError(
            f"{path / 'config.json'}: mm_use_im_start_end",
            found="true",
            expected="false: <im_start> and <im_end> around pictures are not supported",
            fix="load another checkpoint",
        )
    kept = {k: v for k, v in config.items() if k not in (*OWN, *own) and not k.startswith("mm_")}
    kept["model_type"] = llm or MODELS[config["model_type"]]
    encoder = f"branches.{branch['name']}.encoder"
    tuned = (encoder,) if config.get("unfreeze_mm_vision_tower") else ()
    return Source(
        path,
        layout,
        config,
        kept,
        [branch],
        template or prompt_template(kept),
        towers={encoder: tower},
        tuned=tuned,
    )


def prompt_template(llm: Mapping[str, Any]) -> str:
    """What LLaVA's scripts take for each published model, told apart by LLM and vocabulary.

    LLaVA llava/eval/run_llava.py, by names there; LLaVA-NeXT llava/conversation.py for Llama-3 and
    Qwen; Gemma's is its own. Vocabularies are counted in thousands: ports pad them. "" for LLMs
    that neither has.
    """
    by_type = {
        "mistral": "mistral_instruct",
        "qwen2": "qwen_1_5",
        "gemma": "gemma",
        "llama": "vicuna_v1",
    }
    by_vocabulary = {64: "chatml_direct", 128: "llava_llama_3"}
    found = by_type.get(llm.get("model_type", "llama"), "")
    if found == "vicuna_v1":
        return by_vocabulary.get(llm.get("vocab_size", 0) // 1000, found)
    return found


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
    """Normal form of a transformers folder of LLaVA-1.5.

    Its image processor resizes the short edge and crops the centre, where upstream pads to a
    square: the same picture gives other tokens than upstream's folder of the same model. What the
    port computes is what is computed here.
    """
    del towers  # the tower is in the folder
    vision, llm = dict(config["vision_config"]), dict(config["text_config"])
    vision.setdefault("model_type", "clip_vision_model")  # the defaults of LlavaConfig
    llm.setdefault("model_type", "llama")
    for key in ("torch_dtype", "dtype"):
        if key in config:
            llm.setdefault(key, config[key])
    if config.get("tie_word_embeddings"):
        llm["tie_word_embeddings"] = True  # the text's own true holds beside a false one, too
    layer = config.get("vision_feature_layer", -2)
    taps = list(layer) if isinstance(layer, list) else [layer]
    select = config.get("vision_feature_select_strategy", "default")
    branch = {
        "name": vision["model_type"].split("_")[0],
        "encoder": vision,
        "preprocessor": _preprocessor(path, _PROCESSORS[config["model_type"]]),
        "aspect": "crop",
        "code": "transformers",
        "connector": {
            "model_type": "mlp",
            "mm_projector_type": "mlp2x_gelu",
            "act": config.get("projector_hidden_act", "gelu"),
            "bias": config.get("multimodal_projector_bias", True),
            "din": vision.get("hidden_size", 768) * len(taps),
            "dout": llm.get("hidden_size", 4096),
            "groups": [[tap] for tap in taps],
            "drop": 1 if select == "default" else 0,
        },
    }
    _check_processor(path, branch)
    chat = read_chat_template(path)
    return Source(
        path,
        "llava-hf",
        config,
        llm,
        [branch],
        CHAT_TEMPLATE if chat else prompt_template(llm),
        tokenizer=tokenizer_class(config),
        chat_template=chat,
        image_token=_image_token(path),
    )


def _image_token(path: Path) -> str:
    """What stands for a picture, unless the tokenizer says so itself."""
    file = path / "processor_config.json"
    found = read_json(file).get("image_token", IMAGE_TOKEN) if file.is_file() else IMAGE_TOKEN
    if not isinstance(found, str) or not found:
        raise InputError(
            f"{file}: image_token", found=repr(found)[:60], expected="a text", fix="correct it"
        )
    return found


def describe_next(path: Path, config: dict[str, Any], towers: Towers) -> Source:
    """Normal form of a transformers folder of LLaVA-1.6 (LlavaNextForConditionalGeneration).

    What the port computes is what is computed here; upstream's folders have upstream's form. They
    differ in two things. The port's pinpoints are (height, width): of canvases that suit a picture
    equally, as a small square one, it takes the wide one where upstream takes the tall one. And it
    rounds an unpadded side to 7 decimals before it cuts it to whole tokens, so that a row or column
    more may stay.

    Raises:
        InputError: pinpoints of the image processor that are not the model's, or features with the
            class token, which have no place on a grid.
    """
    source = describe_hf(path, config, towers)
    source.llm["tie_word_embeddings"] = bool(config.get("tie_word_embeddings"))  # not the text's
    (branch,) = source.branches
    choice(path, config, "vision_feature_select_strategy", "default", ("default",))
    pinpoints = config.get("image_grid_pinpoints") or PINPOINTS
    images = branch["preprocessor"].get("image_grid_pinpoints") or pinpoints
    if images != pinpoints:
        raise InputError(
            f"{path}: image_grid_pinpoints",
            found=f"{images} in the preprocessor's configuration",
            expected=f"{pinpoints} as in config.json",
            fix="correct one of the files",
        )
    branch["connector"] |= {
        "merge": "spatial_unpad",
        "pinpoints": [[width, height] for height, width in pinpoints],
        "unpad_decimals": 7,
    }
    source.layout = "llava-next-hf"
    return source


PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
"""The default of LlavaNextConfig."""


def _preprocessor(path: Path, kind: str) -> dict[str, Any]:
    """The image processor's settings; `kind` is what transformers takes if they don't name it."""
    found = read_preprocessor(path)
    if not found:
        raise InputError(
            path,
            found="no preprocessor_config.json",
            expected="it, or processor_config.json with an image_processor",
            fix="copy it from the published repository",
        )
    named = found.get("image_processor_type") or found.get("feature_extractor_type")
    return found if named else {**found, "image_processor_type": kind}


_PROCESSOR = {
    "image_processor",  # see `read_preprocessor`
    "patch_size",
    "num_additional_image_tokens",
    "vision_feature_select_strategy",
    "image_token",
    "chat_template",
}
"""Keys of processor_config.json that are used."""

_UNUSED = {"processor_class", "auto_map", "tokenizer", "feature_extractor", "image_seq_length"}
"""Keys of it that LlavaProcessor and LlavaNextProcessor don't read."""


def _check_processor(path: Path, branch: Mapping[str, Any]) -> None:
    """Whether processor_config.json widens a placeholder to as many tokens as the model makes.

    transformers' processor counts them by itself (processing_llava.py, replace_image_token); where
    it counts other than the model, the model refuses every picture.

    Raises:
        InputError: it does, or there is a key that is not known.
    """
    file = path / "processor_config.json"
    found = read_json(file) if file.is_file() else {}
    unknown = sorted(k for k, v in found.items() if k not in _PROCESSOR | _UNUSED and v is not None)
    if unknown:
        raise InputError(
            f"{file}: {unknown[0]}",
            found=repr(found[unknown[0]])[:60],
            expected=f"none of that name, but {', '.join(sorted(_PROCESSOR))}",
            fix="remove the key, or load another checkpoint",
        )
    patch = found.get("patch_size")
    if patch is None:  # then transformers' processor takes no picture, and says nothing of tokens
        return
    vision = branch["encoder"]
    side = from_preprocessor(branch["preprocessor"], aspect=branch["aspect"], name=str(path)).size
    encoder = tables.find(vision, f"{path}: branches.{branch['name']}.encoder").config(
        {**vision, "input_size": side}
    )
    extra = found.get("num_additional_image_tokens") or 0
    dropped = int(found.get("vision_feature_select_strategy") == "default")
    whole = isinstance(patch, int) and isinstance(extra, int) and patch > 0
    count = (side // patch) ** 2 + extra - dropped if whole else None
    expected = encoder.prefix + encoder.tokens - branch["connector"]["drop"]
    if count != expected:
        keys = ("patch_size", "num_additional_image_tokens", "vision_feature_select_strategy")
        raise InputError(
            f"{file}: {', '.join(keys)}",
            found=", ".join(repr(found.get(key)) for key in keys),
            expected=f"values that count {expected} tokens a view of {side} pixels, as the model "
            "by config.json makes",
            fix="correct one of the files",
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
                ("image_newline", "connector", "image_newline"),
            )
        ),
    )


LAYOUTS = (
    Layout("llava", is_upstream, describe_upstream, upstream_names, general=True),
    Layout(
        "llava-hf",
        lambda config: config.get("model_type") == "llava" and "text_config" in config,
        describe_hf,
        hf_names,
    ),
    Layout(
        "llava-next-hf",
        lambda config: config.get("model_type") == "llava_next",
        describe_next,
        hf_names,
    ),
)
