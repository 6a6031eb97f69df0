"""LLaVA-1.5 and 1.6 folders: upstream's (LLaVA llava/model), and transformers' in all spellings.

A folder is read as the code that its config.json is for reads it. Upstream pads pictures of
LLaVA-1.5 with their mean colour; transformers' port crops them. Of LLaVA-1.6, whose ports are
nearly the same, see `converters.formats.llava_next`.
"""

import ast
import contextlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from converters import registry
from converters.chat import read_chat_template
from converters.params.mlp import MERGES
from converters.params.table import LM, Names
from converters.preprocessor import from_preprocessor, read_preprocessor
from converters.source import Branch, Layout, New, Source, tokenizer_class
from converters.towers import Prefixes, Tower, Towers
from converters.values import ANY, DEEPEST, PRETRAINED, Unused, Values
from vfjax import InputError
from vfjax.atomic import read_json
from vfjax.text.chat import CHAT_TEMPLATE
from vfjax.text.prompts import IMAGE_TOKEN

MODELS = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}
"""Upstream's `model_type` -> its LLM's."""

OWN = (
    "architectures",
    "image_aspect_ratio",
    "image_grid_pinpoints",
    "unfreeze_mm_vision_tower",
    "vision_tower",
)
"""Keys of upstream's config that are read here, beside those that begin with mm_."""

UNUSED: Unused = {
    "_name_or_path": ANY,
    "add_faster_video": (False, None),
    "auto_map": ANY,
    "faster_token_stride": ANY,
    "freeze_mm_mlp_adapter": ANY,
    "freeze_mm_vision_resampler": ANY,
    "image_crop_resolution": ANY,  # of ways to crop that no checkpoint names
    "image_grid_pinpoints": ANY,  # without "anyres"
    "image_split_resolution": ANY,
    "mm_patch_merge_type": ANY,  # without "anyres"
    "mm_projector_lr": ANY,
    "mm_resampler_type": (None,),
    "mm_tunable_parts": ANY,
    "mm_use_im_patch_token": (False, None),
    "mm_use_im_start_end": (False, None),
    "mm_vision_tower_lr": ANY,
    "pos_skipping_range": ANY,
    "pretrain_mm_mlp_adapter": ANY,  # where training began
    "s2": (False, None),
    "s2_scales": ANY,  # without s2
    "sep_image_conv_front": (False,),
    "tokenizer_model_max_length": ANY,
    "tokenizer_padding_side": ANY,
    "tune_mm_mlp_adapter": ANY,
    "tune_mm_vision_resampler": ANY,
    "use_mm_proj": ANY,
    "use_pos_skipping": (False, None),
    "vision_tower_pretrained": ANY,
}
"""Other keys that are not the LLM's. Refused: tokens around pictures and within (mm_use_im_*), S2
features, positions that skip, frames that are left out."""

_PROCESSORS = {"llava": "LlavaImageProcessor", "llava_next": "LlavaNextImageProcessor"}
"""`model_type` of transformers' folders -> the image processor of files that don't name one."""


def is_upstream(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of LLaVA's code or of code that grew from it."""
    return config.get("model_type") in MODELS and "text_config" not in config


def describe_upstream(path: Path, config: Values, towers: Towers) -> Source:
    """Normal form of an upstream folder; the tower is the separate one unless it was tuned."""
    tower = upstream_tower(path, config, towers)
    branch = upstream_branch(config, tower)
    return upstream_source(path, "llava", config, branch, tower)


def upstream_pinpoints(config: Values) -> list[list[int]]:
    """(width, height) of each canvas: of a list, or of its text, which mm_utils.py reads, too."""
    key = "image_grid_pinpoints"
    found = config.any(key)
    if isinstance(found, str):
        with contextlib.suppress(SyntaxError, ValueError, MemoryError, RecursionError):
            config = config.put({key: ast.literal_eval(found)})
    return [list(pair) for pair in config.pairs(key)]


def upstream_tower(path: Path, config: Values, towers: Towers) -> Tower:
    """The tower that an upstream config names."""
    name = config.text("mm_vision_tower", None) or config.text("vision_tower", None)
    return towers.find(path, name or config.text("mm_vision_tower"))


def select_layer(config: Values) -> int:
    """The hidden state that is the plain feature."""
    return config.whole("mm_vision_select_layer", -2, least=-DEEPEST, most=DEEPEST)


def upstream_branch(config: Values, tower: Tower) -> dict[str, Any]:
    """The branch of an upstream folder, one layer through a projector.

    Raises:
        InputError: an image_aspect_ratio, merge or feature that upstream does not have.
    """
    aspect = config.choice("image_aspect_ratio", ("pad", "square", "anyres"), "square")
    select = config.choice("mm_vision_select_feature", ("patch", "cls_patch"), "patch")
    connector = {
        "model_type": "mlp",
        "mm_projector_type": config.text("mm_projector_type", "linear"),
        "din": config.whole("mm_hidden_size"),
        "dout": config.whole("hidden_size"),
        "groups": [[select_layer(config)]],
        "drop": 1 if select == "patch" else 0,
    }
    if aspect == "anyres":
        connector["merge"] = config.choice("mm_patch_merge_type", MERGES, "flat")
        connector["pinpoints"] = upstream_pinpoints(config)
    return {
        "name": tower.config["model_type"].split("_")[0],
        "encoder": tower.config,
        "preprocessor": tower.preprocessor,
        "aspect": "pad" if aspect == "pad" else "crop",
        "connector": connector,
    }


def upstream_source(
    path: Path,
    layout: str,
    config: Values,
    branch: dict[str, Any],
    tower: Tower,
    *,
    others: Mapping[str, Tower] | None = None,
    llm: str = "",
    template: str = "",
    own: Iterable[str] = (),
    known: str = "",
) -> Source:
    """An upstream folder's normal form.

    Args:
        path: the folder.
        layout: its name.
        config: its config.json.
        branch: its only one.
        tower: the branch's.
        others: those of its other encoders, by their names.
        llm: `model_type` of the LLM, by default upstream's.
        template: name of the prompt template, by default upstream's, see `prompt_template`.
        own: more keys that are not the LLM's.
        known: class that `architectures` may name, beside those after the LLM's.
    """
    kept = config.rest({*OWN, *UNUSED, *own}, "mm_")
    kept["model_type"] = llm or MODELS[config.text("model_type")]
    table = registry.find(kept, str(path))
    _check_class(config, table.architecture, known)
    table.config(kept, config.where)  # by its keys in this file
    start = f"branches.{branch['name']}"
    towers = {f"{start}.{name}": x for name, x in {"encoder": tower, **(others or {})}.items()}
    tuned = config.flag("unfreeze_mm_vision_tower", False, null=True)
    return Source(
        path,
        layout,
        dict(config.data),
        kept,
        (Branch(**branch),),
        template or prompt_template(kept),
        towers=towers,
        tuned=(f"{start}.encoder",) if tuned else (),
    )


def _check_class(config: Values, llm: str, known: str) -> None:
    """Checks that `architectures`, if given, names a class around the LLM of the `model_type`."""
    for name in config.names("architectures"):
        if not re.fullmatch(f"(Llava|MGM|MiniGemini)?{llm}", name) and name != known:
            raise config.error(
                "architectures",
                f"Llava{llm} or the like",
                f"{name.removesuffix(LM)} is not supported as {config.text('model_type')!r}",
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
    branch = f"branches.{source.branches[0].name}"
    return (
        ("model.mm_projector.weight", f"{branch}.connector", "0.weight"),
        ("model.mm_projector.bias", f"{branch}.connector", "0.bias"),
        ("model.mm_projector.", f"{branch}.connector", ""),
        ("model.image_newline", f"{branch}.connector", "image_newline"),
        ("model.vision_tower.vision_tower.vision_model.", f"{branch}.encoder", ""),
        ("model.vision_tower.vision_tower.", f"{branch}.encoder", ""),
        ("", "llm", ""),
    )


def describe_hf(path: Path, config: Values, towers: Towers) -> Source:
    """Normal form of a transformers folder of LLaVA-1.5.

    Its image processor resizes the short edge and crops the centre, where upstream pads to a
    square: the same picture gives other tokens than upstream's folder of the same model. What the
    port computes is what is computed here.
    """
    del towers  # the tower is in the folder
    branch, llm = port_parts(config)
    branch["preprocessor"] = _preprocessor(path, _PROCESSORS[config.text("model_type")])
    _check_processor(path, branch)
    return port_source(path, "llava-hf", config, branch, llm)


def port_parts(
    config: Values, *, vision: str = "clip_vision_model", text: str = "llama"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The branch of a transformers folder, one tower and a projector, and its LLM's config.

    Args:
        config: config.json.
        vision: `model_type` of a tower that it does not name.
        text: of an LLM.
    """
    tower, llm = dict(config.mapping("vision_config")), dict(config.mapping("text_config"))
    tower.setdefault("model_type", vision)
    llm.setdefault("model_type", text)
    for key in ("torch_dtype", "dtype"):
        if key in config:
            llm.setdefault(key, config.any(key))
    if config.flag("tie_word_embeddings", False):
        llm["tie_word_embeddings"] = True  # the text's own true holds beside a false one, too
    encoder, decoder = (
        registry.find(part, f"{config.where}: {key}").config(part, f"{config.where}: {key}")
        for key, part in (("vision_config", tower), ("text_config", llm))
    )
    taps = _taps(config, encoder.layers)
    select = config.choice("vision_feature_select_strategy", ("default", "full"), "default")
    branch = {
        "name": tower["model_type"].split("_")[0],
        "encoder": tower,
        "aspect": "crop",
        "code": "transformers",
        "connector": {
            "model_type": "mlp",
            "mm_projector_type": "mlp2x_gelu",
            "act": config.activation("projector_hidden_act", "gelu"),
            "bias": config.flag("multimodal_projector_bias", True),
            "din": encoder.width * len(taps),
            "dout": decoder.width,
            "groups": [[tap] for tap in taps],
            "drop": 1 if select == "default" else 0,
        },
    }
    return branch, llm


def port_source(
    path: Path,
    layout: str,
    config: Values,
    branch: dict[str, Any],
    llm: dict[str, Any],
    *,
    image_id: int = 32000,
) -> Source:
    """A transformers folder's normal form.

    Args:
        path: the folder.
        layout: its name.
        config: its config.json.
        branch: its only one.
        llm: its LLM's config.
        image_id: the picture token's where config.json does not say it, by its class.
    """
    chat = read_chat_template(path)
    return Source(
        path,
        layout,
        dict(config.data),
        llm,
        (Branch(**branch),),
        CHAT_TEMPLATE if chat else prompt_template(llm),
        tokenizer=tokenizer_class(config.data),
        chat_template=chat,
        image_token=_image_token(path),
        image_id=image_id,
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


def _taps(config: Values, layers: int) -> list[int]:
    """The hidden states that are read of a tower: `vision_feature_layer`, one or several."""
    key, least = "vision_feature_layer", -layers - 1
    if isinstance(config.any(key), list):
        if found := config.wholes(key, least=least, most=layers):
            return list(found)
        raise config.error(key, "at least one layer")
    return [config.whole(key, -2, least=least, most=layers)]


HF: Unused = {
    **PRETRAINED,
    "ignore_index": ANY,  # of the loss
    "image_seq_length": ANY,  # the towers' sizes say it
    "image_token_id": ANY,  # pictures stand where -200 does
    "image_token_index": ANY,
    "vocab_size": ANY,  # text_config says it
}
"""Keys of LlavaConfig and LlavaNextConfig without effect."""


def _preprocessor(path: Path, kind: str) -> dict[str, Any]:
    """The image processor's settings; `kind` is what transformers takes if they don't name it.

    None without a file: an LLM alone is merged without.
    """
    found = read_preprocessor(path)
    if not found:
        return {}
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
    if not branch["preprocessor"]:
        return
    side = from_preprocessor(branch["preprocessor"], aspect=branch["aspect"], name=str(path)).size
    encoder = registry.find(vision, f"{path}: branches.{branch['name']}.encoder").config(
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
    return port_names(
        source,
        ("vision_tower.vision_model.", "encoder", ""),
        ("vision_tower.", "encoder", ""),
        ("multi_modal_projector.linear_1.", "connector", "0."),
        ("multi_modal_projector.linear_2.", "connector", "2."),
        ("image_newline", "connector", "image_newline"),
    )


def port_names(source: Source, *own: tuple[str, str, str]) -> Names:
    """Names of a port whose LLM is `language_model`, of the hub and of transformers in memory.

    Args:
        source: with one branch.
        own: (prefix in the folder, part of the branch, prefix in its table), perhaps behind
            "model.".
    """
    branch = f"branches.{source.branches[0].name}"
    return (
        ("language_model.model.", "llm", "model."),
        ("language_model.lm_head.", "llm", "lm_head."),
        ("model.language_model.", "llm", "model."),
        ("lm_head.", "llm", "lm_head."),
        *(
            (start + old, f"{branch}.{part}", new)
            for start in ("", "model.")
            for old, part, new in own
        ),
    )


LAYOUTS = (
    Layout("llava", is_upstream, describe_upstream, upstream_names, unused=UNUSED, general=True),
    Layout(
        "llava-hf",
        lambda config: config.get("model_type") == "llava" and "text_config" in config,
        describe_hf,
        hf_names,
        unused=HF,
    ),
)


def own_prefixes(source: Source, names: Names) -> Prefixes:
    """Of a layout's names those of a connector whose table has prefixes of its own."""
    connector = source.branches[0].part("connector")
    return tuple((old, new) for old, part, new in names if new and part == connector)


def new_prefixes(source: Source) -> Prefixes:
    """Prefixes of a new projector's tensors, see `converters.source.New`."""
    lone = source.branches[0].connector["mm_projector_type"] == "linear"
    return (("model.mm_projector.", "0." if lone else ""),)


NEW = (New("mlp", ("projector", "select"), describe_upstream, lambda made: {}, new_prefixes),)
