"""InternVL folders: transformers' port, and its authors' `internvl_chat`, of InternVL 1.5 to 3.5.

The authors' image processing is code (internvl_chat/internvl/train/dataset.py): the
preprocessor_config.json of their folders is read by nothing.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters import registry
from converters.chat import read_chat_template
from converters.formats.onevision import check_video, settings
from converters.formats.port import HF, port_names, port_parts
from converters.params import mlp
from converters.params.table import Names, Table, dense, norm
from converters.preprocessor import PROCESSOR, from_preprocessor, read_preprocessor
from converters.source import Branch, Layout, Source, tokenizer_class
from converters.towers import Towers
from converters.values import ANY, DEEPEST, PRETRAINED, Unused, Values
from vfjax import InputError
from vfjax.architectures import Combine, InternVL, MLPConfig, PixelShuffleConfig
from vfjax.architectures.base import PatchEncoder
from vfjax.atomic import JSON, read_json
from vfjax.text.chat import CHAT_TEMPLATE
from vfjax.text.prompts import TEMPLATES
from vfjax.vision.images import ImageSpec

TILES = 1000
"""Most tiles of a picture."""

CONTEXT, START, END = "<IMG_CONTEXT>", "<img>", "</img>"
"""What stands for a visual token, and before and behind those of a picture."""


def read(hf: Values) -> PixelShuffleConfig:
    """Blocks of patches, normed and projected."""
    factor = hf.whole("factor", most=DEEPEST)
    din = hf.whole("din")
    if din % factor**2:
        raise hf.error("din", f"a multiple of {factor**2}, the patches of a block")
    return PixelShuffleConfig(
        MLPConfig(din, hf.whole("dout"), act=hf.activation("act", "gelu")),
        Combine((mlp.group(hf),), drop=1),
        factor,
        transposed=hf.flag("transposed", False),
    )


def path(
    hf: Values, images: ImageSpec, encoder: PatchEncoder, connector: PixelShuffleConfig
) -> InternVL:
    """Tiles of a picture.

    Raises:
        InputError: patches that are no whole blocks.
    """
    side = math.isqrt(encoder.tokens)
    if side % connector.factor or not side:
        raise InputError(
            f"{hf.where}: downsample_ratio",
            found=f"blocks of {connector.factor} patches a side, of {side} of a tile",
            expected="whole blocks",
            fix="correct config.json, or the size of the image processor",
        )
    words = hf.names("words")
    return InternVL(
        encoder,
        connector,
        images,
        least=hf.whole("least", most=TILES),
        most=hf.whole("most", most=TILES),
        thumbnail=hf.flag("thumbnail"),
        ordered=hf.flag("ordered"),
        words=(words[0], words[1]),
    )


TABLE = Table(
    types=("internvl",),
    read=read,
    unused={},
    path=path,
    recorded=mlp.recorded,
    rules=(
        *norm("0", "norm"),
        *dense("1", "projector/layers/0"),
        *dense("3", "projector/layers/1"),
    ),
)
"""Named by their places in the authors' Sequential, `mlp1`."""


def factor_of(config: Values) -> int:
    """Patches a side of a block, 1 / `downsample_ratio`.

    Raises:
        InputError: it is no whole number.
    """
    ratio = config.number("downsample_ratio", 0.5)
    if not 0 < ratio <= 1 or not (1 / ratio).is_integer():
        raise config.error("downsample_ratio", "1, or 1 by a whole number, as 0.5")
    return int(1 / ratio)


def describe(folder: Path, config: Values, towers: Towers) -> Source:
    """Normal form of the authors' folder.

    Raises:
        InputError: a template, an LLM or a setting that is not supported.
    """
    del towers  # the tower is in the folder
    vision = {"model_type": "intern_vit_6b", **config.mapping("vision_config")}
    llm = _llm(config)
    size = config.whole("force_image_size", None) or vision.get("image_size", 224)
    encoder = registry.find(vision, f"{config.where}: vision_config").config(
        {**vision, "input_size": size}, f"{config.where}: vision_config"
    )
    decoder = registry.find(llm, f"{config.where}: llm_config").config(
        llm, f"{config.where}: llm_config"
    )
    template = config.choice("template", INTERNVL)
    own = re.search(r"system\|?>?\n(.*?)<\|", TEMPLATES[template].head)
    if (message := config.text("system_message", None)) and (own is None or message != own[1]):
        raise config.error("system_message", f"that of template {template!r}, or none")
    factor, tiled = factor_of(config), config.flag("dynamic_image_size", False)
    pad = config.flag("pad2square", False) and not tiled  # tiles are squares
    branch = Branch(
        name="intern",
        encoder=vision,
        preprocessor={
            "image_processor_type": "SiglipImageProcessor",
            "size": {"height": size, "width": size},
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
        },
        aspect="pad" if pad else "crop",
        connector={
            "model_type": "internvl",
            "din": encoder.width * factor**2,
            "dout": decoder.width,
            "groups": [[_select(config, encoder.layers)]],
            "factor": factor,
            "transposed": config.choice("ps_version", ("v1", "v2"), "v1") == "v1",
            "least": config.whole("min_dynamic_patch", 1, most=TILES) if tiled else 1,
            "most": config.whole("max_dynamic_patch", 6, most=TILES) if tiled else 1,
            "thumbnail": config.flag("use_thumbnail", False),
            "ordered": False,
            "words": [START, END],
        },
    )
    return Source(
        folder,
        "internvl-chat",
        dict(config.data),
        llm,
        (branch,),
        template,
        image_token=CONTEXT,
    )


INTERNVL = ("Hermes-2", "internlm2-chat", "internvl2_5", "internvl_zh", "phi3-chat")
"""Their templates (internvl_chat/internvl/conversation.py)."""

LLMS = {
    "InternLM2ForCausalLM": "internlm2",
    "LlamaForCausalLM": "llama",
    "Phi3ForCausalLM": "phi3",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
"""First of the LLM's `architectures`, by which the authors' code chooses -> its `model_type`."""


def _llm(config: Values) -> dict[str, Any]:
    """The LLM's config.

    Raises:
        InputError: an LLM that is not supported.
    """
    section = config.section("llm_config")
    names = section.names("architectures")
    if not names or names[0] not in LLMS:
        fix = "this LLM is not supported"
        raise section.error("architectures", f"first one of {', '.join(LLMS)}", fix)
    return {**section.data, "model_type": LLMS[names[0]]}


def _select(config: Values, layers: int) -> int:
    return config.whole("select_layer", -1, least=-layers - 1, most=layers)


def names(source: Source) -> Names:
    """The authors' names."""
    branch = f"branches.{source.branches[0].name}"
    return (
        ("vision_model.", f"{branch}.encoder", ""),
        ("mlp1.", f"{branch}.connector", ""),
        *((f"language_model.{old}", "llm", new) for old, new in source.table("llm").prefixes),
    )


def describe_hf(folder: Path, config: Values, towers: Towers) -> Source:
    """Normal form of a transformers folder (InternVLForConditionalGeneration).

    Raises:
        InputError: features with the class token, which are no square, or settings of the
            processors that are not the model's.
    """
    del towers  # the tower is in the folder
    config = config.over(DEFAULTS)
    config.choice("vision_feature_select_strategy", ("default",))
    if not isinstance(config.any("vision_feature_layer"), int):
        raise config.error("vision_feature_layer", "one layer")
    parts, llm = port_parts(config, vision="internvl_vision", text="qwen2")
    llm["tie_word_embeddings"] = config.flag("tie_word_embeddings")  # the text's own is not read
    factor, old = factor_of(config), parts["connector"]
    found = dict(read_preprocessor(folder))
    own = {key: value for key in TILING if (value := found.pop(key, None)) is not None}
    images = settings(found, f"{folder}: image processor", "GotOcr2") if found else {}
    tiles = Values(own, f"{folder}: image processor").over(TILING)
    tokenizer = folder / "tokenizer_config.json"
    known = Values(read_json(tokenizer) if tokenizer.is_file() else {}, str(tokenizer))
    branch = Branch(
        name="internvl",
        encoder=parts["encoder"],
        preprocessor=images,
        aspect="crop",
        code="transformers",
        connector={
            "model_type": "internvl",
            "act": old["act"],
            "din": old["din"] * factor**2,
            "dout": old["dout"],
            "groups": old["groups"],
            "factor": factor,
            "least": tiles.whole("min_patches", most=TILES),
            "most": tiles.whole("max_patches", most=TILES),
            "thumbnail": True,
            "ordered": True,
            "words": [_named(known, "start", START), _named(known, "end", END)],
        },
    )
    if images:
        _check_processor(folder, branch, factor)
    chat = read_chat_template(folder)
    return Source(
        folder,
        "internvl-hf",
        dict(config.data),
        llm,
        (branch,),
        CHAT_TEMPLATE if chat else "internvl2_5",
        tokenizer=tokenizer_class(config.data),
        chat_template=chat,
        image_token=_named(known, "context", CONTEXT),
        image_id=151667,
    )


def _named(tokenizer: Values, name: str, default: str) -> str:
    """A token that a tokenizer_config.json names, by itself or among its extra special tokens."""
    key, extra = f"{name}_image_token", tokenizer.any("extra_special_tokens")
    found = tokenizer.any(key) or (extra.get(key) if isinstance(extra, Mapping) else None)
    if isinstance(found, Mapping):
        found = found.get("content")
    if found is not None and not (isinstance(found, str) and found):
        raise tokenizer.error(key, "a text")
    return found or default


DEFAULTS: Mapping[str, JSON] = {
    "tie_word_embeddings": True,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
}
"""Of InternVLConfig."""

TILING: Mapping[str, JSON] = {"crop_to_patches": None, "max_patches": 12, "min_patches": 1}
"""Settings of GotOcr2ImageProcessor alone; InternVLProcessor asks for tiles whatever it says."""


def _check_processor(folder: Path, branch: Branch, factor: int) -> None:
    """Whether transformers' processor counts the tokens that the model makes, of the same pixels.

    Raises:
        InputError: it does not, or there is a key that is not known.
    """
    file = folder / "processor_config.json"
    values = Values(read_json(file) if file.is_file() else {}, str(file))
    where = f"{folder}: image processor"
    images = from_preprocessor(
        branch.preprocessor, aspect=branch.aspect, code=branch.code, name=where
    )
    side = images.size
    encoder = registry.find(branch.encoder, str(folder)).config(
        {**branch.encoder, "input_size": side}
    )
    if math.isqrt(encoder.tokens) % factor:
        return  # no whole blocks, which `path` refuses
    count = encoder.tokens // factor**2
    if values.whole("image_seq_length", 256) != count:
        raise values.error("image_seq_length", f"{count}, the tokens of a tile of {side} pixels")
    check_video(folder, values, branch.preprocessor, "InternVL")
    values.done(PROCESSOR)


def hf_names(source: Source) -> Names:
    """Names of the hub, and of transformers in memory."""
    return port_names(
        source,
        ("vision_tower.", "encoder", ""),
        ("multi_modal_projector.layer_norm.", "connector", "0."),
        ("multi_modal_projector.linear_1.", "connector", "1."),
        ("multi_modal_projector.linear_2.", "connector", "3."),
    )


def is_authors(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of the authors' code."""
    return config.get("model_type") == "internvl_chat"


CHAT: Unused = {
    **PRETRAINED,
    "_name_or_path": ANY,
    "hidden_size": ANY,  # llm_config says it
    "image_fold": (None,),
    "max_dynamic_patch": ANY,  # without dynamic_image_size
    "min_dynamic_patch": ANY,
    "tie_word_embeddings": ANY,  # so, too
    "use_backbone_lora": (0, None),  # adapters that are not merged
    "use_llm_lora": (0, None),
}
"""Keys of InternVLChatConfig without effect."""

LAYOUTS = (
    Layout("internvl-chat", is_authors, describe, names, unused=CHAT),
    Layout(
        "internvl-hf",
        lambda config: config.get("model_type") == "internvl",
        describe_hf,
        hf_names,
        unused=HF,
    ),
)
