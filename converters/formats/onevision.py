"""LLaVA-OneVision folders: transformers' port, and its authors' (LLaVA-NeXT's `llava_qwen`).

Both show a lone picture in tiles, several of a row padded to squares, and a video's frames squashed
(`vfjax.architectures.onevision`); the port rounds an unpadded side to 7 decimals before it cuts it
to whole tokens. The authors' tower is SigLIP without its last layer.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from converters import registry
from converters.formats import dense_connector, llava
from converters.formats.llava import (
    upstream_branch,
    upstream_names,
    upstream_pinpoints,
    upstream_source,
    upstream_tower,
)
from converters.formats.port import (
    HF,
    class_names,
    hf_names,
    port_parts,
    port_source,
    write_port,
)
from converters.params import mlp
from converters.params.table import Table
from converters.preprocessor import (
    IDLE,
    PROCESSOR,
    defaulted,
    image_settings,
    read_preprocessor,
)
from converters.source import KEEP, Layout, Made, New, Source, Writer, Written
from converters.towers import PREPROCESSOR, Prefixes, Towers
from converters.values import ANY, REQUIRED, Unused, Values
from vfjax import InputError
from vfjax.architectures import ProjectorConfig
from vfjax.architectures.base import PatchEncoder
from vfjax.architectures.onevision import OneVision
from vfjax.atomic import JSON, read_json
from vfjax.errors import cut
from vfjax.model import ModelConfig
from vfjax.text.prompts import IMAGE_TOKEN
from vfjax.vision.images import ImageSpec

VIEWS = 1000
"""Most N of "anyres_max_N"."""


def read(hf: Values) -> ProjectorConfig:
    """A projector on hidden states, and a newline."""
    return ProjectorConfig(mlp.projector(hf), mlp.combine(hf), newline=True)


def path(
    hf: Values, images: ImageSpec, encoder: PatchEncoder, connector: ProjectorConfig
) -> OneVision:
    """Tiles on `pinpoints`, of `most` views' tokens at most.

    Raises:
        InputError: views whose tokens are no square.
    """
    made = OneVision(
        encoder,
        connector,
        images,
        pinpoints=hf.pairs("pinpoints"),
        merge="spatial_unpad",
        decimals=hf.whole("unpad_decimals", None, least=0),
        most=hf.whole("most", most=VIEWS),
    )
    if made.side**2 != made.patches or connector.combine.axis == "tokens":
        raise InputError(
            hf.where,
            found=f"{made.patches} tokens a view",
            expected="a square of them: all patches, and no class token",
            fix="correct vision_feature_select_strategy",
        )
    return made


TABLE = Table(
    types=("onevision",),
    read=read,
    unused={},
    path=path,
    recorded=mlp.recorded,
    rules=mlp.TABLE.rules,
)


def limit(values: Values, key: str, default: str = REQUIRED) -> int:
    """N of a value "anyres_max_N".

    Raises:
        InputError: it has another form.
    """
    found = re.fullmatch(r"anyres_max_(\d+)", values.text(key, default))
    if found is None or not 0 < int(found[1]) <= VIEWS:
        raise values.error(key, f'"anyres_max_N", N up to {VIEWS}')
    return int(found[1])


def describe(folder: Path, config: Values, towers: Towers) -> Source:
    """Normal form of the authors' folder.

    Of several pictures its training and evaluation show each as one padded view; so it is here.

    Raises:
        InputError: an aspect other than "anyres_max_N", a way to merge, pool or end videos that no
            published model has.
    """
    tower = upstream_tower(folder, config, towers)
    most = limit(config, "image_aspect_ratio")
    config.choice("mm_patch_merge_type", ("spatial_unpad",))
    config.choice("mm_newline_position", ("one_token",), "one_token")
    config.choice("mm_spatial_pool_mode", ("bilinear",), "bilinear")
    if config.whole("mm_spatial_pool_stride", 2) != 2:
        raise config.error("mm_spatial_pool_stride", "2, by which its video is pooled")
    branch = upstream_branch(config.put({"image_aspect_ratio": "square"}), tower)
    branch["connector"] |= {
        "model_type": "onevision",
        "pinpoints": _pinpoints(config, branch),
        "most": most,
    }
    if dense_connector.is_siglip(tower.config):  # siglip_encoder.py: fixed there
        layers = registry.find(tower.config, str(folder)).config(tower.config).layers
        branch["connector"] |= {"groups": [[layers - 1]], "drop": 0}
    source = upstream_source(
        *(folder, "llava-onevision", config, branch, tower),
        llm="qwen2",
        known="LlavaQwenForCausalLM",
        own=UNUSED,
    )
    if "mm_vision_tower" in (config.text("mm_tunable_parts", None) or "").split(","):
        return dataclasses.replace(source, tuned=tuple(source.towers))
    return source


def _pinpoints(config: Values, branch: Mapping[str, Any]) -> list[list[int]]:
    """(width, height) of each canvas; "(1x1),...,(6x6)" counts tiles, from the first to the last.

    LLaVA-NeXT llava/mm_utils.py, process_anyres_image.
    """
    text = config.any("image_grid_pinpoints")
    grids = re.findall(r"\((\d{1,3})x(\d{1,3})\)", text) if isinstance(text, str) else []
    if not grids:
        return upstream_pinpoints(config)
    side = branch["encoder"]["image_size"]
    (left, top), (right, bottom) = (tuple(map(int, grids[at])) for at in (0, -1))
    return [
        [side * cols, side * rows]
        for cols in range(left, right + 1)
        for rows in range(top, bottom + 1)
    ]


def new_config(made: Made) -> dict[str, Any]:
    """Keys of a new model's config.json: grids up to 6 x 6, as the published models have them."""
    most = made.options.get("most", 9)
    return {
        "model_type": "llava_qwen",
        "architectures": ["LlavaQwenForCausalLM"],
        "image_aspect_ratio": f"anyres_max_{most}",
        "image_grid_pinpoints": "(1x1),...,(6x6)",
        "mm_newline_position": "one_token",
        "mm_patch_merge_type": "spatial_unpad",
        "mm_spatial_pool_mode": "bilinear",
        "mm_spatial_pool_stride": 2,
    }


def new_prefixes(source: Source) -> Prefixes:
    """Prefixes of a new connector's tensors, see `converters.source.New`."""
    return (("model.image_newline", "image_newline"), *llava.new_prefixes(source))


NEW = (
    New(
        "onevision",
        ("projector", "select", "most"),
        describe,
        new_config,
        new_prefixes,
        llms=("qwen2",),
    ),
)


UNUSED: Unused = {**llava.UNUSED, "image_token_index": ANY}
"""On the authors' keys. (Videos' `add_faster_video` is refused.)"""

PINPOINTS = [[384 * rows, 384 * cols] for rows in range(1, 7) for cols in range(1, 7)]
"""The default of LlavaOnevisionConfig."""

IMAGES = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "size": {"height": 384, "width": 384},
    "resample": 3,
    "rescale_factor": 1 / 255,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
"""Defaults of LlavaOnevisionImageProcessor, and of its video processor."""

SETTINGS: Unused = {
    **IDLE,
    "fps": ANY,
    "image_processor_type": ANY,
    "initial_shift": ANY,
    "num_frames": ANY,
    "video_processor_type": ANY,
}
"""Other settings of both, without effect on a picture's pixels at these values."""


def settings(
    found: Mapping[str, Any], where: str, family: str = "LlavaOnevision"
) -> dict[str, Any]:
    """An image or video processor's settings, as those of SigLIP's, which resizes as they do.

    Args:
        found: the settings.
        where: what to call them in errors.
        family: whose image processor it is.

    Raises:
        InputError: a setting that is not followed.
    """
    values = Values(found, where)
    kind = values.text("image_processor_type", None)
    if kind and not re.fullmatch(f"{family}ImageProcessor(Fast|Pil)?", kind):
        raise values.error("image_processor_type", f"{family}ImageProcessor")
    out = defaulted(values, IMAGES)
    if out["resample"] != 3:
        raise values.error("resample", "3, bicubic, with which pictures are laid on their canvas")
    values.any("image_grid_pinpoints")
    values.done(SETTINGS)
    return {"image_processor_type": "SiglipImageProcessor", **out}


def describe_hf(folder: Path, config: Values, towers: Towers) -> Source:
    """Normal form of a transformers folder (LlavaOnevisionForConditionalGeneration).

    Raises:
        InputError: pinpoints, limits or settings of the processors that are not the model's.
    """
    del towers  # the tower is in the folder
    found = read_preprocessor(folder)
    pinpoints = [list(pair) for pair in config.pairs("image_grid_pinpoints", None) or PINPOINTS]
    images = found.get("image_grid_pinpoints") or PINPOINTS
    if found and images != pinpoints:
        raise InputError(
            f"{folder}: image_grid_pinpoints",
            found=f"{cut(repr(images))} in the preprocessor's configuration",
            expected=f"{cut(repr(pinpoints))} as in config.json",
            fix="correct one of the files",
        )
    defaults: dict[str, JSON] = {
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }
    branch, llm = port_parts(config.over(defaults), vision="siglip_vision_model", text="qwen2")
    branch["preprocessor"] = settings(found, f"{folder}: image processor") if found else {}
    branch["connector"] |= {
        "model_type": "onevision",
        "pinpoints": [[width, height] for height, width in pinpoints],
        "unpad_decimals": 7,
        "most": limit(config, "vision_aspect_ratio", "anyres_max_9"),
    }
    if found:
        _check_processor(folder, branch)
    return port_source(folder, "llava-onevision-hf", config, branch, llm, image_id=151646)


def _check_processor(folder: Path, branch: Mapping[str, Any]) -> None:
    """Whether transformers' processor counts the tokens that the model makes, of the same pixels.

    Raises:
        InputError: it does not, or there is a key that is not known.
    """
    file = folder / "processor_config.json"
    values = Values(read_json(file) if file.is_file() else {}, str(file))
    connector = branch["connector"]
    most = limit(values, "vision_aspect_ratio", "anyres_max_9")
    if most != connector["most"]:
        raise values.error("vision_aspect_ratio", f"anyres_max_{connector['most']}, as the model's")
    vision = Values(branch["encoder"], str(folder))
    tokens = (vision.whole("image_size") // vision.whole("patch_size")) ** 2 + connector["drop"]
    count = values.whole("num_image_tokens", None)
    select = values.choice("vision_feature_select_strategy", ("default", "full"), None)
    if count is not None and count - (select == "default") != tokens - connector["drop"]:
        raise values.error(
            "num_image_tokens",
            f"{tokens}, and vision_feature_select_strategy as config.json has it: the tokens of a "
            "view that the model makes",
        )
    check_video(folder, values, branch["preprocessor"])
    values.done({**PROCESSOR, "image_token": ANY, "video_token": ANY})


def check_video(
    folder: Path, values: Values, images: Mapping[str, Any], family: str = "LlavaOnevision"
) -> None:
    """Whether a folder's video processor prepares frames as its image processor does pictures.

    Args:
        folder: of transformers.
        values: its processor_config.json.
        images: `settings` of the image processor.
        family: whose video processor it is.

    Raises:
        InputError: it does not, or is another one.
    """
    video = values.mapping("video_processor", None)
    beside = folder / "video_preprocessor_config.json"
    if video is None and beside.is_file():
        video = read_json(beside)
    if video is None:
        return
    name = Values(video, f"{folder}: video processor")
    if name.text("video_processor_type", None) not in (None, f"{family}VideoProcessor"):
        raise name.error("video_processor_type", f"{family}VideoProcessor")
    for key, value in settings(video, name.where).items():
        if key != "do_convert_rgb" and not _same(value, images[key]):  # frames are RGB
            raise InputError(
                f"{folder}: video processor: {key}",
                found=cut(repr(value)),
                expected=f"{cut(repr(images[key]))}, as the image processor's",
                fix="correct one of them",
            )


def _same(one: object, other: object) -> bool:
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-12)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return list(one) == list(other)
    return one == other


def write_hf(source: Source, model: ModelConfig, ids: Sequence[int]) -> Written:
    """A LLaVA-OneVision as LlavaOnevisionForConditionalGeneration's folder; see `Writer`.

    Raises InputError as `converters.formats.port.write_port`.
    """
    made: Any = model.branches[0].architecture  # a OneVision
    family = "LlavaOnevision"
    written = write_port(source, model, ids, family, "llava_onevision", made.connector)
    pinpoints = [[height, width] for width, height in made.pinpoints]
    images = image_settings(made.images)
    for key in ("crop_size", "do_center_crop"):
        del images[key]
    aspect, select = f"anyres_max_{made.most}", written.config["vision_feature_select_strategy"]
    processor = {
        "processor_class": f"{family}Processor",
        "image_token": IMAGE_TOKEN,
        "num_image_tokens": made.side**2 + made.connector.combine.drop,
        "video_token": VIDEO_TOKEN,
        "vision_aspect_ratio": aspect,
        "vision_feature_select_strategy": select,
    }
    own = {"do_pad": True, "image_grid_pinpoints": pinpoints, **class_names(family)}
    video = {"video_processor_type": f"{family}VideoProcessor"}
    return dataclasses.replace(
        written,
        config={
            **written.config,
            "image_grid_pinpoints": pinpoints,
            "video_token_index": ids[1],
            "vision_aspect_ratio": aspect,
        },
        files={
            "processor_config.json": processor,
            PREPROCESSOR: {**images, **own},
            "video_preprocessor_config.json": {**images, **video},
        },
    )


VIDEO_TOKEN = "<video>"


def write(source: Source, model: ModelConfig, ids: Sequence[int]) -> Written:
    """A LLaVA-OneVision as its authors' folder; see `converters.source.Writer`.

    Their code drops the last layer of a SigLIP and reads the one before it: the tower's config says
    one layer more than there are.

    Raises:
        InputError: an LLM of another type than Qwen2, or a tower of which other layers are read.
    """
    del ids  # pictures have no token
    made: Any = model.branches[0].architecture  # a OneVision
    kind = source.llm["model_type"]
    if kind != "qwen2":
        raise InputError(
            f"{source.path}: llm",
            found=f"an LLM of type {kind!r}",
            expected="qwen2, for which the authors' code has a class",
            fix=KEEP,
        )
    config = {
        "architectures": ["LlavaQwenForCausalLM"],
        "model_type": "llava_qwen",
        "image_aspect_ratio": f"anyres_max_{made.most}",
        "image_grid_pinpoints": [list(point) for point in made.pinpoints],
        "mm_newline_position": "one_token",
        "mm_patch_merge_type": "spatial_unpad",
        "mm_spatial_pool_mode": "bilinear",
        "mm_spatial_pool_stride": 2,
        "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
    }
    written = llava.write_upstream(source, model, made.connector, config)
    tower = written.files[TOWER]
    if dense_connector.is_siglip(tower):
        deeper = {**tower, "num_hidden_layers": made.encoder.layers + 1}
        return dataclasses.replace(written, files={**written.files, TOWER: deeper})
    return written


TOWER = "vision_tower/config.json"


def is_upstream(config: Mapping[str, JSON]) -> bool:
    """Whether a config.json is of LLaVA-NeXT's code around Qwen2, which some call "llava"."""
    named = config.get("architectures") == ["LlavaQwenForCausalLM"]
    kinds = ("llava_qwen", "llava") if named else ("llava_qwen",)
    return config.get("model_type") in kinds and "text_config" not in config


LAYOUTS = (
    Layout(
        "llava-onevision",
        is_upstream,
        describe,
        upstream_names,
        unused=UNUSED,
        writer=Writer("llava", (OneVision,), write),
    ),
    Layout(
        "llava-onevision-hf",
        lambda config: config.get("model_type") == "llava_onevision",
        describe_hf,
        hf_names,
        unused={
            **HF,
            "use_image_newline_parameter": (True,),
            "video_token_id": ANY,
            "video_token_index": ANY,
        },
        writer=Writer("hf", (OneVision,), write_hf, (IMAGE_TOKEN, VIDEO_TOKEN)),
    ),
)
