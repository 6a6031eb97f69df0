"""Qwen2-VL and Qwen2.5-VL folders, as transformers reads them: its own, and the hub's older ones.

The LLM's keys stand in text_config, or, in older folders, beside vision_config; the names of
tensors are the hub's (`visual.`, `model.layers.`) or those that transformers has in memory.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from converters import registry
from converters.chat import read_chat_template
from converters.params.table import Arrays, Layered, Names, Table, dense, norm
from converters.preprocessor import NATIVE, from_preprocessor, read_preprocessor
from converters.source import Branch, Layout, Source, tokenizer_class
from converters.towers import Towers
from converters.values import ANY, MOST_ID, PRETRAINED, Unused, Values
from vfjax import InputError
from vfjax.architectures import Inputs, MergerConfig, QwenVL
from vfjax.atomic import read_json
from vfjax.text.chat import CHAT_TEMPLATE
from vfjax.vision.encoders import QwenViTConfig
from vfjax.vision.images import ImageSpec

KINDS = ("qwen2_vl", "qwen2_5_vl")
"""`model_type` of config.json; its tower's and its LLM's end in _vision and _text."""

IMAGE, VIDEO, START, END = (
    ("image_token_id", "<|image_pad|>", 151655),
    ("video_token_id", "<|video_pad|>", 151656),
    ("vision_start_token_id", "<|vision_start|>", 151652),
    ("vision_end_token_id", "<|vision_end|>", 151653),
)
"""Key of config.json, token, default of its id."""

BESIDE: Unused = {
    **PRETRAINED,
    "text_config": ANY,
    "vision_config": ANY,
    "vision_token_id": ANY,  # in published files; nothing reads it
}
"""Keys that are not the LLM's, where its keys stand among them."""

LLM = (
    *("attention_dropout", "hidden_act", "hidden_size", "intermediate_size", "layer_types"),
    *("max_position_embeddings", "max_window_layers", "num_attention_heads", "num_hidden_layers"),
    *("num_key_value_heads", "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta"),
    *("sliding_window", "use_sliding_window", "vocab_size"),
)
"""The LLM's keys, which transformers 4 wrote twice and reads in text_config."""


def describe(folder: Path, config: Values, towers: Towers) -> Source:
    """Normal form of a folder.

    Raises:
        InputError: another tower or LLM than the family's, marks without a row in the vocabulary,
            or processors with other patches than the tower's.
    """
    del towers  # the tower is in the folder
    kind = config.text("model_type")
    vision = section(config, "vision_config", f"{kind}_vision")
    llm = text_config(config, kind)
    where = f"{config.where}: vision_config"
    encoder = registry.find(vision, where).config(vision, where)
    decoder = registry.find(llm, config.where).config(llm, config.where)
    own, gated = Values(vision, where), kind == "qwen2_5_vl"
    ids = {
        one[0]: token_id(folder, config, one, decoder.vocab) for one in (IMAGE, VIDEO, START, END)
    }
    images = read_preprocessor(folder)
    connector = {
        "model_type": "qwen_merger",
        "mm_projector_type": "merger",
        "din": encoder.width,
        "dout": own.whole("out_hidden_size" if gated else "hidden_size", 3584),
        "merge": encoder.merge,
        "rms": gated,
        "start": ids[START[0]],
        "end": ids[END[0]],
        "placeholders": [ids[IMAGE[0]], ids[VIDEO[0]]],
    }
    if gated:
        connector["rate"] = own.number("tokens_per_second", 4)
    if images:
        found, budget = videos(folder, encoder.patch * encoder.merge)
        connector |= {"videos": found} | ({} if budget is None else {"budget": budget})
        for settings, what in ((images, "image"), (found, "video")):
            check_patches(settings, encoder, f"{folder}: {what} processor")
    branch = Branch(kind, vision, images, "crop", connector, code="transformers")
    return normal(folder, "qwen-vl-hf", config, llm, branch, ids[IMAGE[0]])


def normal(
    folder: Path, layout: str, config: Values, llm: dict[str, Any], branch: Branch, image: int
) -> Source:
    """Normal form of a folder with one branch and marks as Qwen-VL's.

    Args:
        folder: of the model.
        layout: its name.
        config: config.json.
        llm: its LLM's config.
        branch: its only one.
        image: id of a picture's token.
    """
    chat = read_chat_template(folder)
    return Source(
        folder,
        layout,
        dict(config.data),
        llm,
        (branch,),
        CHAT_TEMPLATE if chat else "plain",
        tokenizer=tokenizer_class(config.data),
        chat_template=chat,
        image_token=IMAGE[1],
        image_id=image,
    )


def with_dtype(config: Values, llm: dict[str, Any]) -> dict[str, Any]:
    """An LLM's config with the dtype of the whole model's where it says none."""
    found = {key: config.any(key) for key in ("torch_dtype", "dtype") if key in config}
    return {**llm, **found, **llm}


def section(config: Values, key: str, kind: str) -> dict[str, Any]:
    """A section with its `model_type`, which older files lack, or have the whole model's."""
    found = dict(config.mapping(key, None) or {})
    if found.get("model_type") in (None, config.text("model_type")):
        found["model_type"] = kind
    if found["model_type"] != kind:
        raise InputError(
            f"{config.where}: {key}: model_type",
            found=repr(found["model_type"])[:60],
            expected=repr(kind),
            fix="this combination is not supported",
        )
    return found


def text_config(config: Values, kind: str) -> dict[str, Any]:
    """The LLM's config."""
    if config.any("text_config") is None:
        keys = (IMAGE[0], VIDEO[0], START[0], END[0], *BESIDE)
        llm = {**config.rest(keys), "model_type": f"{kind}_text"}
    else:
        llm = section(config, "text_config", f"{kind}_text")
        llm.pop("architectures", None)  # the whole model's
        config.rest([key for key in config.data if key not in LLM])
    llm = with_dtype(config, llm)
    if config.flag("tie_word_embeddings", False, null=True):
        llm["tie_word_embeddings"] = True  # the text's own true holds beside a false one, too
    return llm


def token_id(folder: Path, config: Values, token: tuple[str, str, int], rows: int) -> int:
    """The id of a token: by the tokenizer, which writes the marks, or else by config.json.

    That a picture's is the same in both is checked where a tokenizer is loaded.

    Raises:
        InputError: a video's is not; or an id beyond the vocabulary.
    """
    key, text, default = token
    found = config.whole(key, default, least=0, most=MOST_ID)
    file = folder / "tokenizer.json"
    if token != IMAGE and file.is_file():
        added = read_json(file).get("added_tokens") or ()
        own = next((x["id"] for x in added if x.get("content") == text), found)
        if token == VIDEO and own != found:
            raise config.error(key, f"{own}, the tokenizer's id of {text}")
        found = own
    if found >= rows:
        raise InputError(
            f"{config.where}: {key}",
            found=str(found),
            expected=f"an id below {rows}, the vocabulary's size",
            fix="correct it",
        )
    return found


VIDEOS = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 28 * 28 * 768},
}
"""Defaults of Qwen2VLVideoProcessor, which is else as the image processor."""

FRAMES = (
    *("cap_pixels_per_frame", "do_sample_frames", "fps", "max_frames", "max_video_tokens"),
    *("min_frames", "num_frames", "return_metadata", "video_metadata", "video_processor_type"),
)
"""Its own keys. Which frames are shown is not its choice here: `vfjax.open_video` takes them."""


def video_processor(folder: Path) -> dict[str, Any]:
    """Settings of a folder's video processor.

    video_processing_utils.py, get_video_processor_dict: in processor_config.json, else in a file of
    its own, else as pictures are.

    Raises:
        InputError: a key of processor_config.json that is not known.
    """
    file = folder / "processor_config.json"
    whole = Values(read_json(file) if file.is_file() else {}, str(file))
    found = whole.mapping("video_processor", None)
    whole.done(dict.fromkeys(PROCESSOR, ANY))
    beside = [folder / name for name in ("video_preprocessor_config.json", OTHER)]
    if other := next((path for path in beside if path.is_file()), None):
        found = read_json(other) if found is None else found
    return dict(found or {})


def videos(folder: Path, unit: int) -> tuple[dict[str, Any], int | None]:
    """How videos are prepared, and how many pixels one has at most, None for no limit.

    Raises:
        InputError: as of `video_processor`; another video processor, or frames that are not resized
            bicubically.
    """
    values = Values(video_processor(folder), f"{folder}: video processor")
    if values.text("video_processor_type", None) not in (None, "Qwen2VLVideoProcessor"):
        raise values.error("video_processor_type", "Qwen2VLVideoProcessor")
    if values.any("resample", 3) not in (3, None):
        raise values.error("resample", "3, bicubic")
    budget = values.whole("max_video_tokens", 128000)
    capped = values.flag("cap_pixels_per_frame", False, null=True)
    own = {  # null turns a switch off, and is nothing else
        key: value
        for key, value in values.data.items()
        if key not in FRAMES and (value is not None or key.startswith("do_"))
    }
    return {**VIDEOS, **own}, int(budget * unit * unit * 0.9) if capped else None


OTHER = "preprocessor_config.json"

PROCESSOR = (
    *("auto_map", "chat_template", "feature_extractor", "image_processor", "image_token"),
    *("processor_class", "tokenizer", "video_token"),
)
"""Other keys of processor_config.json, read elsewhere or not by its class."""


def check_patches(settings: Mapping[str, Any], encoder: QwenViTConfig, where: str) -> None:
    """Raises InputError where a processor's patches are not those of the tower."""
    values = Values(settings, where)
    for key, default, expected in (
        ("patch_size", 14, encoder.patch),
        ("temporal_patch_size", 2, encoder.time),
        ("merge_size", 2, encoder.merge),
    ):
        if values.whole(key, default) != expected:
            raise values.error(key, f"{expected}, as the tower's")


def read(hf: Values) -> MergerConfig:
    """From `din`, `dout`, `merge` and `rms`."""
    return MergerConfig(hf.whole("din"), hf.whole("dout"), hf.whole("merge"), hf.flag("rms"))


def path(hf: Values, images: ImageSpec, encoder: Layered, connector: MergerConfig) -> QwenVL:
    """Pictures about their size, videos as `videos` says.

    Raises:
        InputError: settings of a processor that makes squares.
    """
    assert isinstance(encoder, QwenViTConfig)
    return QwenVL(
        encoder,
        connector,
        images,
        **shown(hf, images),
        rate=hf.number("rate", None),
        budget=hf.whole("budget", None, most=1 << 40),
    )


def shown(hf: Values, images: ImageSpec) -> dict[str, Any]:  # arguments of several types
    """How videos are prepared, and the marks: arguments of the architecture.

    Raises:
        InputError: settings of a processor that makes squares.
    """
    videos = from_preprocessor(
        hf.mapping("videos"), aspect="crop", code="transformers", name=f"{hf.where}: videos"
    )
    if not images.resize == videos.resize == "native":
        raise InputError(
            f"{hf.where}: preprocessor",
            found="pictures of one fixed size",
            expected=NATIVE,
            fix="take the preprocessor_config.json of the published repository",
        )
    return {
        "videos": videos,
        "start": hf.whole("start", least=0, most=MOST_ID),
        "end": hf.whole("end", least=0, most=MOST_ID),
        "placeholders": hf.wholes("placeholders", least=0, most=MOST_ID),
    }


def recorded(config: object, inputs: Inputs, stages: Arrays) -> Arrays:
    """Stages under transformers' names; patches are one sequence there, too."""
    del config
    return {**stages, "pixel_values": np.asarray(inputs.pixels)}


MERGER = (
    *norm("ln_q", "norm"),
    *dense("mlp.0", "fc1"),
    *dense("mlp.2", "fc2"),
)
"""Of a norm and two layers behind it."""

TABLE = Table(
    types=("qwen_merger",),
    read=read,
    unused={"mm_projector_type": ANY},
    ids={"start": True, "end": True, "placeholders": False},
    path=path,
    recorded=recorded,
    rules=MERGER,
)


def names(source: Source) -> Names:
    """Names of the hub, and of transformers 5 in memory."""
    branch = f"branches.{source.branches[0].name}"
    return (
        *(
            (f"{start}visual.{old}", f"{branch}.{part}", "")
            for start in ("model.", "")
            for old, part in (("merger.", "connector"), ("", "encoder"))
        ),
        ("model.language_model.", "llm", "model."),
        ("language_model.", "llm", "model."),
        ("model.", "llm", "model."),
        ("lm_head.", "llm", "lm_head."),
    )


LAYOUTS = (
    Layout(
        "qwen-vl-hf",
        lambda config: config.get("model_type") in KINDS,
        describe,
        names,
        unused=BESIDE,
    ),
)
