"""Each setting of transformers' image processors and of LLaVA's processors, changed by itself.

As in test_keys.py: refused by a line that names it, or the pixels are those of the class (its
variant for Pillow; of DINOv3, which has none, see `Dinov3`).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.image_processing_utils import BatchFeature

from converters import open_source
from converters.preprocessor import from_preprocessor
from tests.checkpoints import hf_llava_folder, llava_next_folder, write_json
from tests.keys import same, show
from vfjax import InputError
from vfjax.architectures import LlavaNext, MLPConfig, ProjectorConfig
from vfjax.vision.encoders import CLIPConfig
from vfjax.vision.images import ImageSpec, open_image, preprocess


class Dinov3(transformers.ViTImageProcessorPil):
    """DINOv3ViTImageProcessor's order: floats are resized, by torch as torchvision does."""

    image_mean = (0.485, 0.456, 0.406)
    image_std = (0.229, 0.224, 0.225)

    def _preprocess(self, images: list[np.ndarray], size: Any, **settings: Any) -> BatchFeature:
        assert not settings["do_center_crop"]
        if settings["resample"] != 2 or not size.height:
            raise ValueError("torch has no other filter, or this test no other size")
        out = []
        for x in images:
            if settings["do_rescale"]:
                x = self.rescale(x, settings["rescale_factor"])
            if settings["do_resize"]:
                x = torch.from_numpy(x).float()[None]
                x = torch.nn.functional.interpolate(
                    x, (size.height, size.width), mode="bilinear", antialias=True
                )[0].numpy()
            if settings["do_normalize"]:
                x = self.normalize(x, settings["image_mean"], settings["image_std"])
            out.append(x)
        return BatchFeature({"pixel_values": np.array(out)})


SHORTEST = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
SQUARE = {"size": {"height": 28, "width": 28}}
PINPOINTS = [[28, 56], [56, 28]]
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "CLIP": (transformers.CLIPImageProcessorPil, SHORTEST),
    "Bit": (transformers.BitImageProcessorPil, SHORTEST),
    "Siglip": (transformers.SiglipImageProcessorPil, SQUARE),
    "ViT": (transformers.ViTImageProcessorPil, SQUARE),
    "DINOv3ViT": (Dinov3, SQUARE),
    "Llava": (transformers.LlavaImageProcessorPil, SHORTEST),
    "LlavaNext": (
        transformers.LlavaNextImageProcessorPil,
        {**SHORTEST, "image_grid_pinpoints": PINPOINTS},
    ),
}
"""Kind -> transformers' class, small sizes."""

SIZES: tuple[Any, ...] = (
    20,
    32,
    [32, 32],
    [32, 28],
    {"height": 32, "width": 32},
    {"height": 32, "width": 28},
    {"height": 20, "width": 20},
    {"shortest_edge": 32},
    {"shortest_edge": 20},
    {"shortest_edge": 28, "longest_edge": 40},
    {"longest_edge": 40},
    {"max_height": 40, "max_width": 30},
)
SWITCH = (True, False, None)
VALUES: dict[str, tuple[Any, ...]] = {
    "crop_pct": (0.9,),
    "crop_size": SIZES,
    "data_format": ("channels_first", "channels_last"),
    "default_to_square": SWITCH,
    "device": ("cpu",),
    "disable_grouping": SWITCH,
    "do_center_crop": SWITCH,
    "do_convert_rgb": SWITCH,
    "do_flip_channel_order": SWITCH,
    "do_normalize": SWITCH,
    "do_pad": SWITCH,
    "do_reduce_labels": SWITCH,
    "do_rescale": SWITCH,
    "do_resize": SWITCH,
    "image_grid_pinpoints": ([[56, 56]],),
    "image_mean": ([0.1, 0.2, 0.3], [0.5] * 3, 0.5, [0.5], None),
    "image_seq_length": (5,),
    "image_std": ([0.1, 0.2, 0.3], [0.5] * 3, 0.5, [0.5], None),
    "input_data_format": ("channels_first", "channels_last"),
    "offset": (True,),
    "pad_size": ({"height": 40, "width": 40},),
    "resample": (*range(6), None),
    "rescale_factor": (1 / 127.5, 1, 2.0, None),
    "return_tensors": ("np", "pt"),
    "size": SIZES,
    "size_divisor": (32,),
    "use_square_size": (True,),
}
"""Setting, of these classes or of others -> values."""

rng = np.random.default_rng(0)
PICTURES = [
    Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    for size in [(30, 41), (95, 33), (5, 9), (28, 28)]
]


def theirs(kind: str, settings: Mapping[str, Any]) -> list[np.ndarray]:
    """Pixels of each picture; raises what transformers raises."""
    processor = KINDS[kind][0](**settings)
    pixels = [processor(picture, return_tensors="np").pixel_values[0] for picture in PICTURES]
    return [np.moveaxis(x, -3, -1) for x in pixels]


def ours(kind: str, spec: ImageSpec) -> list[np.ndarray]:
    if kind != "LlavaNext":
        return [preprocess(picture, spec) for picture in PICTURES]
    clip = CLIPConfig(patch=spec.size, image_size=spec.size)
    pinpoints = tuple((w, h) for h, w in PINPOINTS)
    path = LlavaNext(clip, ProjectorConfig(MLPConfig(8, 8)), spec, pinpoints=pinpoints)
    opened = [open_image(picture, convert=spec.convert) for picture in PICTURES]
    return [path.show([picture]).inputs.pixels[:3] for picture in opened]


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_has_a_fate(kind: str, capsys: pytest.CaptureFixture[str]):
    known = KINDS[kind][0].valid_kwargs.__annotations__.keys()
    assert not known - VALUES.keys()
    base = {"image_processor_type": f"{kind}ImageProcessor", **KINDS[kind][1]}
    whole = from_preprocessor(base, aspect="crop", code="transformers")
    before = theirs(kind, base)
    fates: dict[str, str] = {}
    for key, value in ((key, value) for key, values in VALUES.items() for value in values):
        if key == "image_grid_pinpoints" and kind == "LlavaNext":
            continue  # see below
        settings = {**base, key: value}
        try:
            spec = from_preprocessor(settings, aspect="crop", code="transformers", name="x")
        except InputError as error:
            assert key in str(error), (value, str(error))
            fates.setdefault(key, "refused")
            continue
        try:
            expected = theirs(kind, settings)
        except Exception:  # transformers takes no such value
            continue
        if spec == whole:
            assert same(expected, before, 1e-6), f"{key}: {value!r} is read past"
            if fates.get(key) != "used":
                fates[key] = "without effect"
            continue
        # DINOv3's are rounded to 255 steps here
        step = 1.01 * spec.rescale / min(spec.std) if kind == "DINOv3ViT" else 2e-6
        for found, right in zip(ours(kind, spec), expected, strict=True):
            assert found.shape == right.shape, (key, value)
            assert np.abs(found - right).max() <= step * max(1, np.abs(right).max()), (key, value)
        fates[key] = "used"
    assert show(f"{kind}ImageProcessor", fates, capsys)["used"] > 3
    assert VALUES.keys() - fates.keys() <= (
        {"image_grid_pinpoints"} if kind == "LlavaNext" else set()
    )


def test_pinpoints_are_those_of_the_model(tmp_path: Path):
    """Transformers' processor goes by its own, its model by config.json: one must fail."""
    llava_next_folder(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    write_json(file, json.loads(file.read_text()) | {"image_grid_pinpoints": [[56, 56]]})
    with pytest.raises(InputError, match="image_grid_pinpoints"):
        open_source(tmp_path)


PROCESSOR: dict[str, tuple[Any, ...]] = {
    "audio_tokenizer": ({"a": 1}, None),
    "chat_template": ("{{ messages[0]['content'] }}", None),
    "image_seq_length": (576, 5, None),
    "image_token": ("<picture>", "<image>"),
    "num_additional_image_tokens": (0, 1, 2, None),
    "patch_size": (7, 14, 4, None),
    "processor_class": ("LlavaNextProcessor", None),
    "size": ({"height": 5, "width": 5},),
    "vision_feature_select_strategy": ("default", "full", None),
}
"""Key of processor_config.json -> values."""


@pytest.mark.parametrize("kind", ["Llava", "LlavaNext"])
def test_every_key_of_a_processor_has_a_fate(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """What it widens a placeholder to is what the model makes, or it is refused."""
    {"Llava": hf_llava_folder, "LlavaNext": llava_next_folder}[kind](tmp_path)
    images = KINDS[kind][0].from_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    inputs = images(PICTURES[0], return_tensors="np")
    base = {
        "patch_size": 7,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
        "image_token": "<image>",
    }
    processor_class = getattr(transformers, f"{kind}Processor")
    whole = processor_class(images, tokenizer, **base).replace_image_token(inputs, 0)
    fates: dict[str, str] = {}
    for key, value in ((key, value) for key, values in PROCESSOR.items() for value in values):
        keys = {**base, key: value}
        write_json(tmp_path / "processor_config.json", keys)
        try:
            source = open_source(tmp_path)
        except InputError as error:
            assert key in str(error), (value, str(error))
            fates.setdefault(key, "refused")
            continue
        theirs = processor_class(images, tokenizer, **keys)
        if keys["patch_size"] is not None:  # else it takes no picture
            found = theirs.replace_image_token(inputs, 0)
            assert found.count(theirs.image_token) == whole.count("<image>"), keys
        assert source.image_token == theirs.image_token
        assert source.chat_template == (theirs.chat_template or "")
        changed = key in ("image_token", "chat_template", "patch_size")
        fates.setdefault(key, "used" if changed else "without effect")
    assert show(f"{kind}Processor", fates, capsys)["refused"] > 2
    assert fates.keys() == PROCESSOR.keys()
