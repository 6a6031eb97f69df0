"""Hugging Face image processors' settings -> `vfjax.vision.images.ImageSpec`."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from converters.values import ANY, MOST, Unused, Values, is_number
from vfjax import InputError
from vfjax.atomic import JSON, read_json
from vfjax.errors import cut
from vfjax.vision.images import Convert, ImageSpec

PROCESSOR: Unused = {
    "auto_map": ANY,
    "chat_template": ANY,
    "feature_extractor": ANY,
    "image_processor": ANY,
    "processor_class": ANY,
    "tokenizer": ANY,
}
"""Keys of processor_config.json that are read elsewhere, or by no class."""

IDLE: Unused = {
    "crop_size": (None,),
    "data_format": ANY,
    "default_to_square": ANY,  # of a size that is one number
    "device": ANY,
    "disable_grouping": ANY,
    "do_center_crop": (None, False),
    "do_pad": ANY,  # of a batch, with views that are not read
    "do_sample_frames": ANY,  # frames are chosen before
    "feature_extractor_type": ANY,
    "pad_size": ANY,
    "processor_class": ANY,
    "return_metadata": ANY,
    "return_tensors": ANY,
    "video_metadata": ANY,
}
"""Settings of image and video processors of tiles, without effect on pixels at these values."""

_HALF = (0.5, 0.5, 0.5)
_SWITCHES = {"do_resize": True, "do_rescale": True, "do_normalize": True}
_CLIP = {
    **_SWITCHES,
    "do_center_crop": True,
    "size": {"shortest_edge": 224},
    "crop_size": 224,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
_SIGLIP = {
    **_SWITCHES,
    "do_center_crop": False,
    "size": {"height": 224, "width": 224},
    "crop_size": None,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "image_mean": _HALF,
    "image_std": _HALF,
}
_DINOV3 = {
    **_SIGLIP,
    "resample": 2,
    "image_mean": (0.485, 0.456, 0.406),
    "image_std": (0.229, 0.224, 0.225),
    "default_to_square": True,
}
# LlavaNext's pinpoints are read with the model's config; do_pad is about tiles that fill a batch.
_LLAVA = {**_CLIP, "do_pad": False}
_LLAVA_NEXT = {**_CLIP, "do_pad": True, "image_grid_pinpoints": None, "aspect_ratio_setting": ""}
# What transformers assumes for keys a preprocessor_config.json lacks.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "CLIP": _CLIP,
    "Bit": _CLIP,
    "Siglip": _SIGLIP,
    "ViT": {**_SIGLIP, "resample": 2},
    "DINOv3ViT": _DINOV3,
    "Llava": _LLAVA,
    "LlavaNext": _LLAVA_NEXT,
}
_NATIVE: dict[str, Any] = {
    **_SWITCHES,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "image_mean": _CLIP["image_mean"],
    "image_std": _CLIP["image_std"],
    "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
    "patch_size": 14,
    "merge_size": 2,
}
"""Qwen2VLImageProcessor's, which keeps a picture about its size."""

_FILTERS = {
    "DINOv3ViT": ((2,), "2, bilinear: of floats other filters give other values than of bytes"),
    "LlavaNext": ((3,), "3, bicubic, with which pictures are laid on their canvas"),
}
"""Kinds that have one `resample` alone."""

_NO_EFFECT = {
    "image_processor_type",
    "feature_extractor_type",
    "processor_class",
    "data_format",
    "device",
    "disable_grouping",
    "image_seq_length",
    "return_tensors",
    "_valid_processor_keys",
}


def read_preprocessor(folder: Path) -> dict[str, Any]:
    """The settings that transformers 5 reads in a folder; empty if it has none.

    An image processor inside processor_config.json, which it writes, comes before
    preprocessor_config.json (image_processing_base.py, get_image_processor_dict).
    """
    if (folder / "processor_config.json").is_file():
        nested = read_json(folder / "processor_config.json").get("image_processor")
        if isinstance(nested, dict):
            return nested
    file = folder / "preprocessor_config.json"
    return read_json(file) if file.is_file() else {}


def defaulted(values: Values, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A processor's settings; null asks for the default, but turns a switch off."""
    return {
        key: default if found is None and not isinstance(default, bool) else found
        for key, default in defaults.items()
        for found in [values.any(key, default)]
    }


def from_preprocessor(
    config: Mapping[str, JSON],
    *,
    aspect: Literal["pad", "crop"],
    code: Literal["authors", "transformers"] = "authors",
    name: str = "preprocessor_config.json",
) -> ImageSpec:
    """Reads a Hugging Face image processor's settings.

    DINOv3's processor resizes floats, all others the 8-bit picture. Here DINOv3's is resized as the
    others': a pixel differs by the rounding, less than one of its 255 steps.

    Args:
        config: content of a `preprocessor_config.json` of a CLIP, SigLIP, BiT (DINOv2), ViT (DINO),
            DINOv3 or LLaVA-NeXT processor, of the latter what becomes of a tile; keys it lacks have
            transformers' defaults, so have null values of keys that are no switches.
        aspect: from the model's own config (LLaVA's `image_aspect_ratio`), not in this file; but
            LlavaImageProcessor's do_pad is one.
        code: whose code the model's folder is for, see `vfjax.vision.images.Convert`.
        name: what to call the file in errors.

    Raises:
        InputError: an unknown processor, a setting this code does not follow, a value of the wrong
            kind, or settings under which the output would not be one fixed square.
    """
    if re.fullmatch(NATIVE, str(config.get("image_processor_type"))):
        return _native(config, code, name)
    kind = _kind(config, name)
    settings = dict(_DEFAULTS[kind])
    rgb = config.get("do_convert_rgb", kind != "ViT")
    for key, value in config.items():
        if key in settings:
            switch = isinstance(settings[key], bool)  # null turns it off
            settings[key] = settings[key] if value is None and not switch else value
        elif key == "do_convert_rgb":
            continue
        elif key not in _NO_EFFECT and value is not None and value is not False:
            raise _unsupported(name, key, value, "no such setting")
    for key in _SWITCHES:
        if settings[key] is not True:
            raise _unsupported(name, key, settings[key], "true")
    if settings.get("default_to_square", True) is not True:
        raise _unsupported(name, "default_to_square", settings["default_to_square"], "true")
    values = Values(settings, name)
    filters, say = _FILTERS.get(kind, (range(6), "a Pillow filter, 0 to 5"))
    resample = values.whole("resample", least=0)
    if resample not in filters:
        raise _unsupported(name, "resample", resample, say)
    values.flag("do_center_crop", null=True)
    values.flag("do_pad", False, null=True)
    if rgb is not None and not isinstance(rgb, bool):
        raise _unsupported(name, "do_convert_rgb", rgb, "true or false")
    edge, resize = _edge(settings["size"], kind, name)
    size = edge
    if settings["do_center_crop"]:
        if settings["crop_size"] is None:
            raise _unsupported(name, "crop_size", None, "one, as do_center_crop is true")
        size = _square(settings["crop_size"], name, "crop_size")
        if size > edge:
            raise _unsupported(name, "crop_size", size, f"at most the resized edge, {edge}")
    elif resize == "shortest":
        raise _unsupported(name, "do_center_crop", False, "true, or a square size")
    if kind == "LlavaNext" and size != edge:
        raise _unsupported(name, "crop_size", size, f"the resized edge, {edge}")
    if kind == "Llava" and settings["do_pad"]:
        aspect = "pad"
    convert: Convert = "drop"
    if code == "transformers":
        convert = "blend" if rgb else "none"  # null is false there
    return ImageSpec(
        size=size,
        edge=edge,
        resize=resize,
        aspect=aspect,
        mean=_channels(settings["image_mean"], name, "image_mean", -math.inf),
        std=_channels(settings["image_std"], name, "image_std", 0.0),
        resample=resample,
        rescale=values.number("rescale_factor"),
        convert=convert,
    )


def image_settings(images: ImageSpec) -> dict[str, Any]:
    """Settings of an image processor of transformers', without its name."""
    squash = images.resize == "squash"
    edges = ("height", "width") if squash else ("shortest_edge",)
    return {
        "do_convert_rgb": True,
        "do_resize": True,
        "size": dict.fromkeys(edges, images.edge),
        "resample": images.resample,
        "do_center_crop": not squash or images.size != images.edge,
        "crop_size": dict.fromkeys(("height", "width"), images.size),
        "do_rescale": True,
        "rescale_factor": images.rescale,
        "do_normalize": True,
        "image_mean": list(images.mean),
        "image_std": list(images.std),
    }


NATIVE = "Qwen2(_5_)?VLImageProcessor(Fast|Pil)?"
"""Image processors that keep a picture about its size, a pattern."""


def _native(config: Mapping[str, Any], code: str, name: str) -> ImageSpec:
    """`from_preprocessor` of those in `NATIVE`; min_pixels and max_pixels stand before `size`.

    Raises:
        InputError: a setting that is missing, of the wrong type or not supported; fewest pixels
            above the most.
    """
    switches = (*_SWITCHES, "do_convert_rgb")
    given = {key: x for key, x in config.items() if x is not None or key in switches}
    values = Values(given, name).over(_NATIVE)
    for key in _SWITCHES:
        if values.any(key) is not True:
            raise _unsupported(name, key, values.any(key), "true")
    size = Values(values.mapping("size"), f"{name}: size")
    least, most = (
        values.whole(old, None, most=_AREA) or size.whole(key, most=_AREA)
        for old, key in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge"))
    )
    for key in ("min_pixels", "max_pixels", "shortest_edge", "longest_edge"):
        size.any(key)
    size.done({})
    if least > most:
        raise _unsupported(name, "size", dict(size.data), "fewest pixels of at most the most")
    unit = values.whole("patch_size") * values.whole("merge_size")
    rgb = values.flag("do_convert_rgb", True, null=True)
    made = ImageSpec(
        size=unit,
        edge=unit,
        resize="native",
        aspect="crop",
        mean=_channels(values.any("image_mean"), name, "image_mean", -math.inf),
        std=_channels(values.any("image_std"), name, "image_std", 0.0),
        resample=values.whole("resample", least=0, most=5),
        rescale=values.number("rescale_factor"),
        convert="drop" if code == "authors" else "blend" if rgb else "none",
        pixels=(least, most),
    )
    values.done({**dict.fromkeys(_NO_EFFECT, ANY), **_NATIVE_UNUSED})
    return made


_AREA = 1 << 40
"""Most pixels that a limit may say."""

_NATIVE_UNUSED: Unused = {
    "crop_size": (None,),
    "default_to_square": ANY,
    "do_center_crop": (None, False),
    "do_pad": (None, False),
    "temporal_patch_size": ANY,  # the format compares it with the model's
}


def _unsupported(name: str, key: str, found: object, expected: str) -> InputError:
    fix = "correct the file, or describe the preprocessing with an ImageSpec"
    return InputError(f"{name}: {cut(key)}", found=cut(repr(found)), expected=expected, fix=fix)


def _kind(config: Mapping[str, JSON], name: str) -> str:
    found = config.get("image_processor_type") or config.get("feature_extractor_type")
    ends = ("ImageProcessor", "ImageProcessorFast", "ImageProcessorPil", "FeatureExtractor")
    for kind in _DEFAULTS:
        if found in [kind + end for end in ends]:
            return kind
    known = f"an image processor of {', '.join(_DEFAULTS)}, by a preprocessor_config.json"
    raise _unsupported(name, "image_processor_type", found, known)


def _edge(size: object, kind: str, name: str) -> tuple[int, Literal["shortest", "squash"]]:
    """An integer is a shortest edge to CLIP and BiT, a square to ViT, an error to SigLIP."""
    if isinstance(size, Mapping) and set(size) == {"shortest_edge"}:
        return _square(size["shortest_edge"], name, "size"), "shortest"
    if isinstance(size, int) and not isinstance(size, bool):
        if kind == "Siglip":
            raise _unsupported(name, "size", size, '{"height", "width"}')
        square = kind in ("ViT", "DINOv3ViT")
        return _square(size, name, "size"), "squash" if square else "shortest"
    return _square(size, name, "size"), "squash"


def _square(size: object, name: str, key: str) -> int:
    """One side from 224, [224, 224] or {"height": 224, "width": 224}."""
    if isinstance(size, Mapping) and set(size) == {"height", "width"}:
        size = [size["height"], size["width"]]
    if isinstance(size, list | tuple) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= MOST:
        raise _unsupported(name, key, size, "one positive whole number or a square")
    return size


def _channels(value: object, name: str, key: str, above: float) -> tuple[float, float, float]:
    given = value if isinstance(value, list | tuple) else ()
    if len(given) != 3 or not all(is_number(v) and v > above for v in given):
        raise _unsupported(name, key, value, f"three numbers above {above}")
    red, green, blue = (float(v) for v in given)
    return red, green, blue
