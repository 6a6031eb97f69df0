"""LLaVA-OneVision-1.5 folders, as their own code reads them (ds/llavaonevision1_5).

The processor is Qwen2.5-VL's with patches of one frame (ds/merge_model.py).
"""

from pathlib import Path

from converters import registry
from converters.formats.qwen_vl import (
    END,
    IMAGE,
    MERGER,
    START,
    VIDEO,
    check_patches,
    normal,
    recorded,
    shown,
    token_id,
    videos,
    with_dtype,
)
from converters.params.table import Layered, Names, Table
from converters.preprocessor import read_preprocessor
from converters.source import Branch, Layout, Source
from converters.towers import Towers
from converters.values import ANY, PRETRAINED, Values
from vfjax.architectures import MergerConfig, OneVision15
from vfjax.vision.encoders import QwenViTConfig
from vfjax.vision.images import ImageSpec

KIND = "llavaonevision1_5"
"""`model_type` of config.json."""


def describe(folder: Path, config: Values, towers: Towers) -> Source:
    """Normal form of a folder.

    Raises:
        InputError: marks without a row in the vocabulary, or an image processor with other patches
            than the tower's.
    """
    del towers  # the tower is in the folder
    where = f"{config.where}: vision_config"
    vision = {"model_type": "rice_vit", **config.mapping("vision_config")}
    llm = {"model_type": "LLaVAOneVision1_5_text", **config.mapping("text_config")}
    llm.pop("architectures", None)  # the whole model's
    llm = with_dtype(config, llm)
    encoder = registry.find(vision, where).config(vision, where)
    decoder = registry.find(llm, config.where).config(llm, f"{config.where}: text_config")
    own = Values(vision, where)
    tokens = (IMAGE, VIDEO, START, END)
    image, video, start, end = (token_id(folder, config, x, decoder.vocab) for x in tokens)
    images = read_preprocessor(folder)
    connector = {
        "model_type": "rice_merger",
        "mm_projector_type": "merger",
        "din": encoder.width,
        "dout": own.whole("text_hidden_size", 2560),
        "merge": encoder.merge,
        "eps": own.number("layer_norm_eps", 1e-5),
        "start": start,
        "end": end,
        "placeholders": [image, video],
    }
    if images:
        check_patches(images, encoder, f"{folder}: image processor")
        found, _ = videos(folder, encoder.patch * encoder.merge)
        films = found.get("temporal_patch_size", 2) == encoder.time
        connector |= {"videos": found, "films": films}
    branch = Branch("rice", vision, images, "crop", connector, code="transformers")
    return normal(folder, "onevision15", config, llm, branch, image)


def read(hf: Values) -> MergerConfig:
    """From `din`, `dout`, `merge` and `eps`."""
    return MergerConfig(hf.whole("din"), hf.whole("dout"), hf.whole("merge"), eps=hf.number("eps"))


def path(hf: Values, images: ImageSpec, encoder: Layered, connector: MergerConfig) -> OneVision15:
    """Pictures about their size, and so videos, if `films` says that there are.

    Raises:
        InputError: settings of a processor that makes squares.
    """
    assert isinstance(encoder, QwenViTConfig)
    return OneVision15(encoder, connector, images, **shown(hf, images), films=hf.flag("films"))


TABLE = Table(
    types=("rice_merger",),
    read=read,
    unused={"mm_projector_type": ANY},
    ids={"start": True, "end": True, "placeholders": False},
    path=path,
    recorded=recorded,
    rules=MERGER,
)


def names(source: Source) -> Names:
    """Names of the hub."""
    branch = f"branches.{source.branches[0].name}"
    return (
        ("model.visual.merger.", f"{branch}.connector", ""),
        ("model.visual.", f"{branch}.encoder", ""),
        ("model.language_model.", "llm", "model."),
        ("lm_head.", "llm", "lm_head."),
    )


LAYOUTS = (
    Layout(
        "onevision15",
        lambda config: config.get("model_type") == KIND,
        describe,
        names,
        unused={
            **PRETRAINED,
            "text_config": ANY,
            "vision_config": ANY,
            "auto_map": ANY,  # of the authors' code, which is not run
            "vision_token_id": ANY,
            "vocab_size": ANY,  # text_config says it
            "tie_word_embeddings": ANY,  # so, too (transformers 4.53, tie_weights)
        },
    ),
)
