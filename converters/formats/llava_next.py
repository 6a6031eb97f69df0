"""Transformers' folders of LLaVA-1.6 (LlavaNext)."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from converters.formats.port import (
    HF,
    class_names,
    describe_hf,
    hf_names,
    write_port,
)
from converters.preprocessor import image_settings
from converters.source import KEEP, Layout, Source, Writer, Written
from converters.towers import PREPROCESSOR, Towers
from converters.values import Values
from vfjax import InputError
from vfjax.architectures import LlavaNext
from vfjax.model import ModelConfig
from vfjax.text.prompts import IMAGE_TOKEN


def describe_next(path: Path, config: Values, towers: Towers) -> Source:
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
    llm = {**source.llm, "tie_word_embeddings": config.flag("tie_word_embeddings", False)}
    (branch,) = source.branches
    config.choice("vision_feature_select_strategy", ("default",), "default")
    pinpoints = [list(pair) for pair in config.pairs("image_grid_pinpoints", None) or PINPOINTS]
    images = branch.preprocessor.get("image_grid_pinpoints") or pinpoints
    if images != pinpoints:
        raise InputError(
            f"{path}: image_grid_pinpoints",
            found=f"{images} in the preprocessor's configuration",
            expected=f"{pinpoints} as in config.json",
            fix="correct one of the files",
        )
    connector = {
        **branch.connector,
        "merge": "spatial_unpad",
        "pinpoints": [[width, height] for height, width in pinpoints],
        "unpad_decimals": 7,
    }
    branches = (dataclasses.replace(branch, connector=connector),)
    # The text's own tie_word_embeddings counts for nothing.
    return dataclasses.replace(source, layout="llava-next-hf", llm=llm, branches=branches)


PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
"""The default of LlavaNextConfig."""


def write(source: Source, model: ModelConfig, ids: Sequence[int]) -> Written:
    """A LLaVA-1.6 as LlavaNextForConditionalGeneration's folder; see `converters.source.Writer`.

    Its pinpoints stand in the order of the model's, so that of canvases that suit a picture equally
    the same one is taken.

    Raises:
        InputError: tiles that are put together otherwise, or as `write_port`.
    """
    made: Any = model.branches[0].architecture  # a LlavaNext
    if made.merge != "spatial_unpad":
        raise InputError(
            f"{source.path}: mm_patch_merge_type",
            found=repr(made.merge),
            expected="'spatial_unpad', as LlavaNextForConditionalGeneration puts tiles together",
            fix=KEEP,
        )
    written = write_port(source, model, ids, "LlavaNext", "llava_next", made.connector)
    pinpoints = [[height, width] for width, height in made.pinpoints]
    images = {**image_settings(made.images), "do_pad": True, "image_grid_pinpoints": pinpoints}
    return dataclasses.replace(
        written,
        config={**written.config, "image_grid_pinpoints": pinpoints},
        files={**written.files, PREPROCESSOR: {**images, **class_names("LlavaNext")}},
    )


LAYOUTS = (
    Layout(
        "llava-next-hf",
        lambda config: config.get("model_type") == "llava_next",
        describe_next,
        hf_names,
        unused={**HF, "use_image_newline_parameter": (True,)},
        writer=Writer("hf", (LlavaNext,), write, (IMAGE_TOKEN,)),
    ),
)
