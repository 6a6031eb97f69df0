"""LLaVA-1.5 and 1.6 folders of its authors ("upstream": LLaVA llava/model).

A folder is read as the code that its config.json is for reads it; transformers' folders are in
`converters.formats.port` and `converters.formats.llava_next`.
"""

import ast
import contextlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from converters import registry
from converters.params.mlp import MERGES
from converters.params.table import LM, Names
from converters.source import Branch, Layout, New, Source
from converters.towers import Prefixes, Tower, Towers
from converters.values import ANY, DEEPEST, Unused, Values

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


LAYOUTS = (
    Layout("llava", is_upstream, describe_upstream, upstream_names, unused=UNUSED, general=True),
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
