"""Transformers' folders of LLaVA-1.5, and what those of other families share with them.

Upstream pads pictures of LLaVA-1.5 with their mean colour; the port crops them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from converters import registry
from converters.chat import read_chat_template
from converters.formats.llava import prompt_template
from converters.params.table import Names
from converters.preprocessor import from_preprocessor, image_settings, read_preprocessor
from converters.source import KEEP, Branch, Layout, Source, Writer, Written, tokenizer_class
from converters.towers import PREPROCESSOR, Towers
from converters.values import ANY, PRETRAINED, Unused, Values
from vfjax import InputError
from vfjax.architectures import Llava, ProjectorConfig
from vfjax.atomic import read_json
from vfjax.errors import counted
from vfjax.model import ModelConfig
from vfjax.text.chat import CHAT_TEMPLATE
from vfjax.text.prompts import IMAGE_TOKEN

_PROCESSORS = {"llava": "LlavaImageProcessor", "llava_next": "LlavaNextImageProcessor"}
"""`model_type` of transformers' folders -> the image processor of files that don't name one."""


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


def write(source: Source, model: ModelConfig, ids: Sequence[int]) -> Written:
    """A LLaVA-1.5 as LlavaForConditionalGeneration's folder; see `converters.source.Writer`.

    Its image processor pads as the authors' code does: do_pad.

    Raises:
        InputError: what is read of the tower, or the projector, is none of the class's.
    """
    made: Any = model.branches[0].architecture  # a Llava
    written = write_port(source, model, ids, "Llava", "llava", made.connector)
    images = {**image_settings(made.images), "do_pad": made.images.aspect == "pad"}
    return dataclasses.replace(
        written, files={**written.files, PREPROCESSOR: {**images, **class_names("Llava")}}
    )


def class_names(family: str) -> dict[str, str]:
    """What preprocessor_config.json says of a family's processors."""
    return {
        "image_processor_type": f"{family}ImageProcessor",
        "processor_class": f"{family}Processor",
    }


def write_port(
    source: Source,
    model: ModelConfig,
    ids: Sequence[int],
    family: str,
    kind: str,
    connector: ProjectorConfig,
) -> Written:
    """What the ports of LLaVA's families have in common; without preprocessor_config.json.

    Args:
        source: the model's normal form.
        model: its config.
        ids: the picture token's first.
        family: how the names of its classes begin.
        kind: its `model_type`.
        connector: of the only branch.

    Raises:
        InputError: what is read of the tower, or the projector, is none of the class's.
    """
    branch = source.branches[0]
    encoder: Any = model.branches[0].architecture.encoders["encoder"]  # with patches on a grid
    where, combine, projector = (
        f"{source.path}: {branch.part('connector')}",
        connector.combine,
        connector.projector,
    )
    if projector.layers != 2:
        raise InputError(
            where,
            found=f"a projector of {counted(projector.layers, 'layer')}",
            expected=f"two, as {family}ForConditionalGeneration has",
            fix=KEEP,
        )
    if combine.axis != "channels" or combine.side or any(group[1:] for group in combine.groups):
        raise InputError(
            where,
            found="a Dense Connector: means of layers, or tokens of several",
            expected=f"hidden states side by side, as {family}ForConditionalGeneration reads",
            fix=KEEP,
        )
    taps = [group[0] for group in combine.groups]
    select = "default" if combine.drop else "full"
    table, tower = source.table("llm"), source.table(branch.part("encoder"))
    config = {
        "architectures": [f"{family}ForConditionalGeneration"],
        "model_type": kind,
        "image_token_index": ids[0],
        "multimodal_projector_bias": projector.bias,
        "projector_hidden_act": projector.act,
        "text_config": {**source.llm, "architectures": [table.architecture]},
        "tie_word_embeddings": model.llm.tied,
        "vision_config": {
            **branch.encoder,
            **tower_name(source),
            "model_type": tower.types[0],
            **({"vision_use_head": False} if tower.types[0] == "siglip_vision_model" else {}),
        },
        "vision_feature_layer": taps if taps[1:] else taps[0],
        "vision_feature_select_strategy": select,
    }
    shown = "vision_model." if ("vision_model.", "") in tower.prefixes else ""
    processor = {
        "processor_class": f"{family}Processor",
        "image_token": IMAGE_TOKEN,
        "num_additional_image_tokens": encoder.prefix,
        "patch_size": encoder.patch,
        "vision_feature_select_strategy": select,
    }
    return Written(
        config,
        prefixes={
            "llm": (("language_model.model.", "model."), ("language_model.lm_head.", "lm_head.")),
            branch.part("encoder"): ((f"vision_tower.{shown}", ""),),
            branch.part("connector"): (
                ("multi_modal_projector.linear_1.", "0."),
                ("multi_modal_projector.linear_2.", "2."),
                ("image_newline", "image_newline"),
            ),
        },
        files={"processor_config.json": processor},
    )


def tower_name(source: Source) -> dict[str, str]:
    """What the authors' config.json calls the tower, where transformers keeps such names."""
    name = source.config.get("mm_vision_tower")
    return {"_name_or_path": name} if isinstance(name, str) and not Path(name).is_absolute() else {}


LAYOUTS = (
    Layout(
        "llava-hf",
        lambda config: config.get("model_type") == "llava" and "text_config" in config,
        describe_hf,
        hf_names,
        unused=HF,
        writer=Writer("hf", (Llava,), write, (IMAGE_TOKEN,)),
    ),
)
