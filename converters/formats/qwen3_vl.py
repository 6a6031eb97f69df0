"""Qwen3-VL folders, the hub's and those of transformers 5, as transformers reads them."""

from pathlib import Path
from typing import Any

from converters import registry
from converters.formats.qwen_vl import (
    BESIDE,
    END,
    IMAGE,
    START,
    VIDEO,
    check_patches,
    normal,
    recorded,
    section,
    shown,
    token_id,
    video_processor,
    with_dtype,
)
from converters.params.table import Layered, Names, Table, dense, norm
from converters.preprocessor import read_preprocessor
from converters.source import Branch, Layout, Source
from converters.towers import Towers
from converters.values import ANY, Values
from vfjax.architectures import DeepMergersConfig, Frames, Qwen3VL
from vfjax.vision.encoders import QwenViTConfig
from vfjax.vision.images import ImageSpec

KIND = "qwen3_vl"
"""`model_type` of config.json; its tower's and its LLM's end in _vision and _text."""


def describe(folder: Path, config: Values, towers: Towers) -> Source:
    """Normal form of a folder.

    Raises:
        InputError: another tower or LLM than the family's, layers of DeepStack that the tower has
            not, marks without a row in the vocabulary, or processors with other patches than the
            tower's.
    """
    del towers  # the tower is in the folder
    where = f"{config.where}: vision_config"
    vision, llm = section(config, "vision_config", f"{KIND}_vision"), _llm(config)
    encoder = registry.find(vision, where).config(vision, where)
    decoder = registry.find(llm, config.where).config(llm, config.where)
    own = Values(vision, where)
    layers = own.wholes("deepstack_visual_indexes", (8, 16, 24), least=0)
    if list(layers) != sorted({*layers} & {*range(encoder.layers)}):
        raise own.error(
            "deepstack_visual_indexes", f"numbers of the {encoder.layers} layers, ascending"
        )
    tokens = (IMAGE, VIDEO, START, END)
    image, video, start, end = (token_id(folder, config, x, decoder.vocab) for x in tokens)
    images = read_preprocessor(folder)
    connector = {
        "model_type": "qwen3_mergers",
        "mm_projector_type": "mergers",
        "din": encoder.width,
        "dout": own.whole("out_hidden_size", 3584),
        "merge": encoder.merge,
        "layers": list(layers),
        "start": start,
        "end": end,
        "placeholders": [image, video],
    }
    if images:
        connector |= _videos(folder, encoder)
        check_patches(images, encoder, f"{folder}: image processor")
    branch = Branch(KIND, vision, images, "crop", connector, code="transformers")
    return normal(folder, "qwen3-vl-hf", config, llm, branch, image)


def _llm(config: Values) -> dict[str, Any]:
    """The LLM's config; whether the head is tied says the whole model's alone."""
    config.mapping("text_config")  # without it another model, of the class's defaults, is meant
    llm = section(config, "text_config", f"{KIND}_text")
    llm.pop("architectures", None)  # the whole model's
    return with_dtype(config, llm) | {
        "tie_word_embeddings": config.flag("tie_word_embeddings", False, null=True)
    }


VIDEOS = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 32 * 32 * 768},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "patch_size": 16,
}
"""Defaults of Qwen3VLVideoProcessor, which is else as the image processor."""

FRAMES = (
    *("cap_pixels_per_frame", "do_sample_frames", "fps", "max_frames", "max_video_tokens"),
    *("min_frames", "num_frames", "return_metadata", "video_metadata", "video_processor_type"),
    *("max_pixels", "min_pixels"),  # of other processors; `size` alone is read
)
"""Keys that are its own. Whether frames are chosen at all is left to `vfjax.open_video`."""


def _videos(folder: Path, encoder: QwenViTConfig) -> dict[str, Any]:
    """How videos are prepared and frames chosen, of a connector's config.

    Raises:
        InputError: another video processor, other patches than the tower's, frames that are not
            resized bicubically, or two ways to choose them.
    """
    where = f"{folder}: video processor"
    found = video_processor(folder).items()
    given = {k: v for k, v in found if v is not None or k.startswith("do_")}  # null: off
    values = Values(given, where)
    if values.text("video_processor_type", None) not in (None, "Qwen3VLVideoProcessor"):
        raise values.error("video_processor_type", "Qwen3VLVideoProcessor")
    if values.whole("resample", 3) != 3:
        raise values.error("resample", "3, bicubic")
    unit = encoder.patch * encoder.merge
    videos = {**VIDEOS, **{k: v for k, v in given.items() if k not in FRAMES}}
    check_patches(videos, encoder, where)
    capped, most = values.flag("cap_pixels_per_frame", False), values.whole("max_video_tokens", 768)
    count = values.whole("num_frames", None)
    if count is not None and "fps" in values:
        raise values.error("num_frames", "null beside fps, or fps null")
    frames = {
        "count": count,
        "rate": values.number("fps", 2.0, least=1e-9),
        "least": values.whole("min_frames", 4),
        "most": values.whole("max_frames", 768),
    }
    return {"videos": videos, "limit": most * unit**2 if capped else None, "frames": frames}


def read(hf: Values) -> DeepMergersConfig:
    """From `din`, `dout`, `merge` and `layers`."""
    layers = hf.wholes("layers", least=0)
    return DeepMergersConfig(hf.whole("din"), hf.whole("dout"), hf.whole("merge"), layers=layers)


def path(hf: Values, images: ImageSpec, encoder: Layered, connector: DeepMergersConfig) -> Qwen3VL:
    """Pictures about their size, videos as `videos`, `limit` and `frames` say.

    Raises:
        InputError: settings of a processor that makes squares.
    """
    assert isinstance(encoder, QwenViTConfig)
    frames = hf.section("frames")
    film = Frames(
        frames.whole("count", None),
        frames.number("rate"),
        frames.whole("least"),
        frames.whole("most"),
    )
    limit = hf.whole("limit", None, most=1 << 50)
    return Qwen3VL(encoder, connector, images, **shown(hf, images), limit=limit, film=film)


TABLE = Table(
    types=("qwen3_mergers",),
    read=read,
    unused={"mm_projector_type": ANY},
    ids={"start": True, "end": True, "placeholders": False},
    path=path,
    recorded=recorded,
    rules=(
        *norm("merger.norm", "norm"),
        *dense("merger.linear_fc1", "fc1"),
        *dense("merger.linear_fc2", "fc2"),
        *norm("deepstack_merger_list.{}.norm", "deep/{}/norm"),
        *dense("deepstack_merger_list.{}.linear_fc1", "deep/{}/fc1"),
        *dense("deepstack_merger_list.{}.linear_fc2", "deep/{}/fc2"),
    ),
)


def names(source: Source) -> Names:
    """Names of the hub and of transformers 5."""
    branch = f"branches.{source.branches[0].name}"
    return (
        *(
            (f"model.visual.{part}", f"{branch}.connector", part)
            for part in ("merger.", "deepstack_merger_list.")
        ),
        ("model.visual.", f"{branch}.encoder", ""),
        ("model.language_model.", "llm", "model."),
        ("lm_head.", "llm", "lm_head."),
    )


LAYOUTS = (
    Layout(
        "qwen3-vl-hf",
        lambda config: config.get("model_type") == KIND,
        describe,
        names,
        unused=BESIDE,
    ),
)
