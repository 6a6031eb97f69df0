"""Transformers' folders of Ovis2 (Ovis2ForConditionalGeneration).

What its processor writes around a picture's tiles are tokens of the folder's tokenizer, in whose
places the model reads the last rows of its visual table; which row by the place of a token's id in
`visual_indicator_token_ids`.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from converters import registry
from converters.formats.onevision import settings
from converters.formats.port import port_source
from converters.params import mlp
from converters.params.table import TRANSPOSE, Names, Rule, Table, norm
from converters.preprocessor import PROCESSOR, read_preprocessor
from converters.source import Layout, Source, tokenizer_class
from converters.tokenizer import load_tokenizer
from converters.towers import Towers
from converters.values import ANY, DEEPEST, MOST_ID, PRETRAINED, Values
from vfjax import InputError
from vfjax.architectures import Ovis2, VocabularyConfig
from vfjax.architectures.base import PatchEncoder
from vfjax.architectures.ovis2 import Choice
from vfjax.atomic import JSON, read_json
from vfjax.vision.images import ImageSpec

TILES = 256
"""Most tiles of a picture."""

ATOM = "<IMG_ATOM>"
"""What stands for a visual token."""

MARKS = ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
"""What the processor writes, in the order of `Ovis2.marks`."""

WORDS = 1 << 24
"""Most rows of the visual table."""


def read(hf: Values) -> VocabularyConfig:
    """From `din`, `dout`, `vocab`, `marks`, `stride` and `choice`.

    Raises:
        InputError: no word is left beside the marks.
    """
    words, marks = hf.whole("vocab", most=WORDS), hf.whole("marks", least=len(MARKS))
    if marks >= words:
        raise hf.error("vocab", f"more than the {marks} marks")
    return VocabularyConfig(
        hf.whole("din"),
        hf.whole("dout"),
        words=words,
        marks=marks,
        stride=hf.whole("stride", most=DEEPEST),
        choice=hf.choice("choice", get_args(Choice)),
    )


def path(
    hf: Values, images: ImageSpec, encoder: PatchEncoder, connector: VocabularyConfig
) -> Ovis2:
    """Tiles of a picture.

    Raises:
        InputError: a view's patches are no multiple of the stride.
    """
    side = math.isqrt(encoder.tokens)
    if side % connector.stride:
        raise hf.error("stride", f"a divisor of {side}, the patches a side of a view")
    start, whole, column, row, end = hf.wholes("order", least=0, most=connector.marks - 1)
    return Ovis2(
        encoder,
        connector,
        images,
        least=hf.whole("least", most=TILES),
        most=hf.whole("most", most=TILES),
        covering=hf.flag("covering"),
        marks=(start, whole, column, row, end),
    )


TABLE = Table(
    types=("ovis2",),
    read=read,
    unused={},
    path=path,
    recorded=mlp.recorded,
    rules=(
        Rule("head_linear.weight", "head/kernel", TRANSPOSE),
        *norm("head_norm", "norm"),
        Rule("table.weight", "table"),
    ),
)


def describe(folder: Path, config: Values, towers: Towers) -> Source:
    """Normal form of a folder.

    Raises:
        InputError: sizes that don't fit one another, settings of the processors that are not the
            model's, or a tokenizer without the marks.
    """
    del towers  # the tower is in the folder
    config = config.over(DEFAULTS)
    vision = {"model_type": "ovis2_vision", **config.mapping("vision_config")}
    llm = {"model_type": "qwen2", **config.mapping("text_config")}
    for key in ("torch_dtype", "dtype"):
        if key in config:
            llm.setdefault(key, config.any(key))
    llm["tie_word_embeddings"] = config.flag("tie_word_embeddings")  # the text's own is not read
    encoder, decoder = (
        registry.find(part, f"{config.where}: {key}").config(part, f"{config.where}: {key}")
        for key, part in (("vision_config", vision), ("text_config", llm))
    )
    for key, size in (("hidden_size", decoder.width), ("vocab_size", decoder.vocab)):
        if config.whole(key, most=WORDS) != size:
            raise config.error(key, f"{size}, as text_config has it")
    head = Values(vision, f"{config.where}: vision_config").over(VISION)
    stride = head.whole("hidden_stride", most=DEEPEST)
    marks = head.whole("num_visual_indicator_tokens", least=len(MARKS))
    side = math.isqrt(encoder.tokens)
    if side % stride:
        raise head.error("hidden_stride", f"a divisor of {side}, the patches a side of a view")
    images, tiling = _images(folder, (side // stride) ** 2)
    branch = {
        "name": "ovis2",
        "encoder": vision,
        "preprocessor": images,
        "aspect": "crop",
        "code": "transformers",
        "connector": {
            "model_type": "ovis2",
            "din": encoder.width * stride**2,
            "dout": decoder.width,
            "vocab": head.whole("vocab_size", least=marks + 1, most=WORDS),
            "marks": marks,
            "stride": stride,
            "choice": head.choice("tokenize_function", get_args(Choice)),
            "order": _order(folder, config, marks),
            **tiling,
        },
    }
    source = port_source(folder, "ovis2-hf", config, branch, llm)
    return dataclasses.replace(source, image_token="<image>", written=True)


DEFAULTS: Mapping[str, JSON] = {
    "hidden_size": 1536,
    "image_token_id": 151665,
    "tie_word_embeddings": True,
    "visual_indicator_token_ids": [151666, 151667, 151668, 151669, 151670],
    "vocab_size": 151643,
}
"""Of Ovis2Config."""

VISION: Mapping[str, JSON] = {
    "hidden_stride": 1,
    "num_visual_indicator_tokens": 5,
    "tokenize_function": "softmax",
    "vocab_size": 16384,
}
"""Of Ovis2VisionConfig, what the connector reads."""

TILING: Mapping[str, JSON] = {
    "crop_to_patches": False,
    "max_patches": 12,
    "min_patches": 1,
    "use_covering_area_grid": True,
}
"""Settings of Ovis2ImageProcessor alone."""


def _images(folder: Path, tokens: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The image processor's settings, and the connector's keys about tiles.

    Args:
        folder: the model's.
        tokens: of a view, which transformers' processor must count, too.

    Raises:
        InputError: it counts others, or there is a setting that is not known.
    """
    found, where = dict(read_preprocessor(folder)), f"{folder}: image processor"
    own = {key: value for key in TILING if (value := found.pop(key, None)) is not None}
    tiles = Values(own, where).over(TILING)
    images = settings(found, where, "Ovis2") if found else {}
    file = folder / "processor_config.json"
    values = Values(read_json(file) if file.is_file() else {}, str(file), {"image_seq_length": 256})
    if images and values.whole("image_seq_length") != tokens:
        raise values.error("image_seq_length", f"{tokens}, the tokens of a view by config.json")
    values.done({**PROCESSOR, "image_token": ANY})
    most = tiles.whole("max_patches", most=TILES)
    return images, {
        "least": tiles.whole("min_patches", most=TILES),
        "most": most if tiles.flag("crop_to_patches") else 1,
        "covering": tiles.flag("use_covering_area_grid"),
    }


def _order(folder: Path, config: Values, marks: int) -> list[int]:
    """`Ovis2.marks`; without a tokenizer as the published models have them.

    Raises:
        InputError: a token lacks, or config.json has another id.
    """
    ids = config.wholes("visual_indicator_token_ids", least=0, most=MOST_ID)
    if not len(MARKS) <= len(ids) <= marks:
        raise config.error("visual_indicator_token_ids", f"{len(MARKS)} to {marks} ids")
    image = config.whole("image_token_id", least=0, most=MOST_ID)
    tokenizer = load_tokenizer(folder, tokenizer_class(config.data))
    if tokenizer is None:
        return list(range(len(MARKS)))
    rows = {token: row for row, token in enumerate(ids)}  # the last of equal ones counts
    known = tokenizer.added_tokens_encoder
    for name in (ATOM, *MARKS):
        token = known.get(name)
        if token is None or (token != image if name == ATOM else token not in rows):
            key = "image_token_id" if name == ATOM else "visual_indicator_token_ids"
            raise InputError(
                f"{folder}: tokenizer",
                found=f"no special token {name}" if token is None else f"id {token} of {name}",
                expected=f"{image if name == ATOM else list(ids)}, as config.json has it by {key}",
                fix="take both files from one repository",
            )
    return [rows[known[name]] for name in MARKS]


def names(source: Source) -> Names:
    """Names of the hub, which are those of transformers in memory and on disk."""
    branch = f"branches.{source.branches[0].name}"
    return (
        ("model.language_model.", "llm", "model."),
        ("lm_head.", "llm", "lm_head."),
        ("model.vision_tower.transformer.", f"{branch}.encoder", ""),
        ("model.vision_tower.", f"{branch}.connector", ""),
        ("model.visual_embeddings_table.", f"{branch}.connector", "table."),
    )


LAYOUTS = (
    Layout(
        "ovis2-hf",
        lambda config: config.get("model_type") == "ovis2",
        describe,
        names,
        unused=PRETRAINED,
    ),
)
