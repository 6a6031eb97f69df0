"""LLaVA-1.5 and 1.6 folders of its authors ("upstream": LLaVA llava/model).

A folder is read as the code that its config.json is for reads it; transformers' folders are in
`converters.formats.port` and `converters.formats.llava_next`.
"""

import ast
import contextlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from converters import registry
from converters.params.mlp import MERGES
from converters.params.table import LM, Names
from converters.preprocessor import image_settings
from converters.source import KEEP, Branch, Layout, New, Source, Writer, Written
from converters.towers import PREPROCESSOR, Prefixes, Tower, Towers
from converters.values import ANY, DEEPEST, Unused, Values
from vfjax import InputError
from vfjax.architectures import Llava, LlavaNext, ProjectorConfig
from vfjax.model import ModelConfig
from vfjax.vision.images import ImageSpec

MODELS = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}
"""Upstream's `model_type` -> its LLM's."""

UPSTREAM = {
    "llama": ("llava_llama", "LlavaLlamaForCausalLM"),
    "mistral": ("llava_mistral", "LlavaMistralForCausalLM"),
}
"""`model_type` of an LLM -> upstream's, and its class."""

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


def write(source: Source, model: ModelConfig, ids: Sequence[int]) -> Written:
    """A LLaVA-1.5 or 1.6 as its authors' folder; see `converters.source.Writer`.

    The tower is in the checkpoint, which its code reads where it was tuned, and so said to be; its
    configs are beside.

    Raises:
        InputError: an LLM of another type than the authors'.
    """
    del ids  # pictures have no token
    made: Any = model.branches[0].architecture  # a Llava or LlavaNext
    kind = source.llm["model_type"]
    if kind not in UPSTREAM:
        raise InputError(
            f"{source.path}: llm",
            found=f"an LLM of type {kind!r}",
            expected=f"one of {', '.join(UPSTREAM)}, for which LLaVA's code has a class",
            fix=KEEP,
        )
    name, architecture = UPSTREAM[kind]
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": name,
        "image_aspect_ratio": "pad" if made.images.aspect == "pad" else "square",
        "unfreeze_mm_vision_tower": True,
    }
    if pinpoints := getattr(made, "pinpoints", ()):
        config["image_aspect_ratio"] = "anyres"
        config["image_grid_pinpoints"] = [list(point) for point in pinpoints]
        config["mm_patch_merge_type"] = made.merge
    return write_upstream(source, model, made.connector, config)


def write_upstream(
    source: Source,
    model: ModelConfig,
    connector: ProjectorConfig,
    own: Mapping[str, Any],
) -> Written:
    """What the authors' folders of several families have in common.

    Args:
        source: the model's normal form.
        model: its config.
        connector: of the only branch.
        own: keys of config.json that are the family's.

    Raises:
        InputError: several layers are read of the tower.
    """
    branch, combine = source.branches[0], connector.combine
    if len(combine.taps) > 1:
        raise InputError(
            f"{source.path}: {branch.part('connector')}",
            found=f"hidden states {', '.join(map(str, combine.taps))} of the tower",
            expected="one, as LLaVA's mm_vision_select_layer says",
            fix=KEEP,
        )
    projector, encoder = connector.projector, model.branches[0].architecture.encoders["encoder"]
    deep = "linear" if projector.layers == 1 else f"mlp{projector.layers}x_gelu"
    tower = source.table(branch.part("encoder"))
    config = {
        **_before_5(source.llm),
        "hidden_size": model.llm.width,
        "mm_hidden_size": encoder.width,
        "mm_projector_type": deep,
        "mm_vision_select_feature": "patch" if combine.drop else "cls_patch",
        "mm_vision_select_layer": combine.taps[0],
        "mm_vision_tower": branch.encoder.get("_name_or_path") or "vision_tower",
        "tie_word_embeddings": model.llm.tied,
        "use_mm_proj": True,
        **own,
    }
    shown = "vision_model." if ("vision_model.", "") in tower.prefixes else ""
    lone = (("model.mm_projector.", "0."),) if projector.layers == 1 else ()
    return Written(
        config,
        prefixes={
            "llm": (("", ""),),
            branch.part("encoder"): ((f"model.vision_tower.vision_tower.{shown}", ""),),
            branch.part("connector"): (
                ("model.image_newline", "image_newline"),
                *lone,
                ("model.mm_projector.", ""),
            ),
        },
        files={
            "vision_tower/config.json": {**branch.encoder, "model_type": tower.types[0]},
            f"vision_tower/{PREPROCESSOR}": tower_settings(model.branches[0].architecture.images),
        },
    )


def tower_settings(images: ImageSpec) -> dict[str, Any]:
    """preprocessor_config.json of a tower whose pictures are prepared so."""
    kind = "Siglip" if images.resize == "squash" and images.size == images.edge else "CLIP"
    return {**image_settings(images), "image_processor_type": f"{kind}ImageProcessor"}


def _before_5(llm: Mapping[str, Any]) -> dict[str, Any]:
    """An LLM's config with the keys of transformers 4, which the authors' code runs with."""
    out = {key: value for key, value in llm.items() if key != "rope_parameters"}
    rotary = dict(llm.get("rope_parameters") or {})
    if rotary and not out.get("rope_scaling"):
        if (theta := rotary.pop("rope_theta", None)) is not None:
            out["rope_theta"] = theta
        scaled = rotary.get("rope_type", "default") != "default"
        out["rope_scaling"] = rotary if scaled else None
    if "dtype" in out:
        out["torch_dtype"] = out.pop("dtype")
    return out


LAYOUTS = (
    Layout(
        "llava",
        is_upstream,
        describe_upstream,
        upstream_names,
        unused=UNUSED,
        general=True,
        writer=Writer("llava", (Llava, LlavaNext), write),
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
