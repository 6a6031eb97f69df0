"""Pixels through the settings of published preprocessors."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.numpy import load_file

from converters.preprocessor import from_preprocessor, read_preprocessor
from vfjax.errors import InputError
from vfjax.vision.images import open_file, open_image, preprocess

CLIP = {"image_processor_type": "CLIPImageProcessor"}


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng((seed, width, height))
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "case",
    [
        "llava15_mlp2x",
        "llava15_gqa",
        "dc_sti",
        "dc_sci",
        "dc_dci",
        "dc_sti_siglip",
        "dc_dci_siglip",
    ],
)
def test_pixels_equal_upstream(shared: Path, case: str):
    folder = shared / "golden" / case
    aspect = json.loads((folder / "config.json").read_text())["image_aspect_ratio"]
    config = json.loads((folder / "vision_tower_preprocessor_config.json").read_text())
    spec = from_preprocessor(config, aspect=aspect)
    inputs, outputs = (
        load_file(folder / "inputs.safetensors"),
        load_file(folder / "outputs.safetensors"),
    )
    keys = [k for k in inputs if k.startswith("s") and ".image" in k]
    assert keys
    for key in keys:
        sample, _, place = key.partition(".image")
        recorded = outputs[f"{sample}.pixel_values"].reshape(-1, 3, spec.size, spec.size)
        ours = preprocess(inputs[key], spec)
        assert ours.dtype == np.float32
        np.testing.assert_allclose(
            ours, recorded[int(place)].transpose(1, 2, 0), rtol=0, atol=2e-6, err_msg=key
        )


DINOV2 = {
    "image_processor_type": "BitImageProcessor",
    "size": {"shortest_edge": 32},
    "crop_size": {"height": 28, "width": 28},
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
PROCESSORS = {
    "CLIPImageProcessorPil": {**CLIP, "size": {"shortest_edge": 28}, "crop_size": 28},
    "SiglipImageProcessorPil": {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": 28, "width": 28},
    },
    "BitImageProcessorPil": DINOV2,
    "ViTImageProcessorPil": {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 28, "width": 28},
    },
}
DINOV3 = {
    "image_processor_type": "DINOv3ViTImageProcessorFast",
    "size": {"height": 28, "width": 28},
    "default_to_square": True,
    "crop_size": None,
    "do_center_crop": None,
    "data_format": "channels_first",
    "device": None,
    "resample": 2,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
"""With the keys of the published file."""
NEXT = {
    "image_processor_type": "LlavaNextImageProcessor",
    "aspect_ratio_setting": "anyres",
    "size": {"shortest_edge": 28},
    "crop_size": {"height": 28, "width": 28},
    "image_grid_pinpoints": [[28, 56]],
    "do_pad": True,
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_equal_transformers(name: str):
    config = PROCESSORS[name]
    theirs = getattr(transformers, name)(**config)
    spec = from_preprocessor(config, aspect="crop")
    rng = np.random.default_rng(1)
    sizes = [(1, 1), (1, 97), (97, 1), (28, 28), (32, 32), (29, 28), (640, 427), (333, 500)]
    sizes += [tuple(rng.integers(1, 300, 2)) for _ in range(40)]
    for size in sizes:
        image = noise(*size)
        expected = theirs(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        np.testing.assert_array_equal(preprocess(image, spec), expected, err_msg=str(size))


def dinov3(image: Image.Image) -> np.ndarray:
    """The arithmetic of transformers' DINOv3ViTImageProcessor: rescale, resize floats, normalise.

    torchvision, which the class needs, resizes tensors by torch's interpolate.
    """
    x = torch.from_numpy(np.asarray(image).transpose(2, 0, 1) * (1 / 255)).float()[None]
    x = torch.nn.functional.interpolate(x, (28, 28), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(DINOV3[key])[:, None, None] for key in ("image_mean", "image_std"))
    return ((x - mean) / std)[0].numpy().transpose(1, 2, 0)


def test_pixels_of_dinov3():
    """Where nothing is resized the same; elsewhere another rounding to 255 steps, of both axes."""
    spec = from_preprocessor(DINOV3, aspect="crop")
    same = noise(28, 28)
    np.testing.assert_allclose(preprocess(same, spec), dinov3(same), rtol=0, atol=1e-6)
    step = 1 / (255 * np.array(DINOV3["image_std"]))
    for size in [(1, 1), (97, 3), (640, 427), (333, 500), (29, 28), (20, 50)]:
        steps = np.abs(preprocess(noise(*size), spec) - dinov3(noise(*size))) / step
        assert steps.max() < 1.01, size
        assert steps.mean() < 0.4, size


def test_defaults_of_dinov3():
    kind = {"image_processor_type": "DINOv3ViTImageProcessor"}
    spec = from_preprocessor(kind, aspect="crop")
    size = {"height": 224, "width": 224}
    assert spec == from_preprocessor({**DINOV3, "size": size}, aspect="crop")
    assert spec == from_preprocessor({**kind, "size": 224}, aspect="crop")
    assert (spec.size, spec.edge, spec.resize) == (224, 224, "squash")


def test_tiles_of_llava_next():
    """What becomes of a tile is CLIP's; pinpoints are the model's."""
    sizes = {key: NEXT[key] for key in ("size", "crop_size")}
    expected = from_preprocessor({**CLIP, **sizes}, aspect="crop")
    assert from_preprocessor(NEXT, aspect="crop") == expected


@pytest.mark.parametrize("name", PROCESSORS)
def test_missing_keys_mean_what_transformers_means(name: str):
    theirs = getattr(transformers, name)()
    kind = {"image_processor_type": name.removesuffix("Pil")}
    assert from_preprocessor(kind, aspect="crop") == from_preprocessor(
        theirs.to_dict(), aspect="crop"
    )


@pytest.mark.parametrize(
    ("size", "edge", "resize"),
    [
        ({"size": 30, "crop_size": 28}, 30, "shortest"),
        ({"size": {"shortest_edge": 30}, "crop_size": [28, 28]}, 30, "shortest"),
        (
            {"size": {"height": 30, "width": 30}, "crop_size": {"height": 28, "width": 28}},
            30,
            "squash",
        ),
        ({"size": [28, 28], "do_center_crop": False}, 28, "squash"),
    ],
)
def test_ways_to_write_a_size(size: dict, edge: int, resize: str):
    spec = from_preprocessor({**CLIP, **size}, aspect="pad")
    assert (spec.size, spec.edge, spec.resize, spec.aspect) == (28, edge, resize, "pad")


def test_an_integer_is_a_square_to_vit():
    spec = from_preprocessor(
        {"feature_extractor_type": "ViTFeatureExtractor", "size": 32}, aspect="crop"
    )
    assert (spec.size, spec.resize, spec.resample) == (32, "squash", 2)


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({}, "image_processor_type"),
        ({"image_processor_type": "ConvNextImageProcessor"}, "image_processor_type"),
        ({**CLIP, "do_pad": True}, "do_pad"),
        ({**CLIP, "crop_pct": 0.9}, "crop_pct"),
        ({**CLIP, "do_resize": False}, "do_resize"),
        ({**CLIP, "do_normalize": False}, "do_normalize"),
        ({**CLIP, "do_center_crop": False}, "do_center_crop"),
        ({**CLIP, "crop_size": 300}, "crop_size"),
        ({**CLIP, "crop_size": {"height": 224, "width": 200}}, "crop_size"),
        ({**CLIP, "size": {"shortest_edge": 224, "longest_edge": 500}}, "size"),
        ({**CLIP, "size": "224"}, "size"),
        ({**CLIP, "resample": "bicubic"}, "resample"),
        ({**CLIP, "rescale_factor": "1/255"}, "rescale_factor"),
        ({**CLIP, "image_mean": [0.5]}, "image_mean"),
        ({**CLIP, "image_std": [0.5, 0.0, 0.5]}, "image_std"),
        ({"image_processor_type": "SiglipImageProcessor", "size": 224}, "size"),
        ({**NEXT, "crop_size": 14}, "crop_size"),
        ({**DINOV3, "default_to_square": False}, "default_to_square"),
    ],
)
def test_settings_that_would_change_pixels_are_refused(config: dict, key: str):
    with pytest.raises(InputError) as error:
        from_preprocessor(config, aspect="crop", name="tower.json")
    assert str(error.value).startswith(f"tower.json: {key}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["do_resize", "do_rescale", "do_normalize", "do_center_crop"])
def test_a_switch_of_null_is_off(tmp_path: Path, key: str):
    """Of what is switched off, pixels are others: not squares, not scaled."""
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**CLIP, key: None}))
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    picture = noise(300, 250)
    pixels = theirs(picture, return_tensors="np").pixel_values[0]
    usual = transformers.CLIPImageProcessorPil()(picture, return_tensors="np").pixel_values[0]
    assert pixels.shape != usual.shape or np.abs(pixels - usual).max() > 0.1
    with pytest.raises(InputError, match=f"{key}: found (None|False), expected true"):
        from_preprocessor({**CLIP, key: None}, aspect="crop")


def test_settings_switched_off_are_accepted():
    config = {
        **CLIP,
        "do_pad": False,
        "pad_size": None,
        "image_mean": None,
        "processor_class": "CLIPProcessor",
    }
    assert from_preprocessor(config, aspect="crop") == from_preprocessor(CLIP, aspect="crop")


def test_which_file_wins(tmp_path: Path):
    """An image processor in processor_config.json before an older file, as in transformers."""
    old, new = {**CLIP, "image_mean": [0.5] * 3}, {**CLIP, "image_mean": [0.1, 0.2, 0.3]}
    processor, alone = tmp_path / "processor_config.json", tmp_path / "preprocessor_config.json"
    for nested in ({"image_processor": new}, {"image_processor": None}, {"patch_size": 14}):
        alone.write_text(json.dumps(old))
        processor.write_text(json.dumps(nested))
        theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path)
        found = from_preprocessor(read_preprocessor(tmp_path), aspect="crop")
        assert found.mean == tuple(theirs.image_mean)
    alone.unlink()
    assert read_preprocessor(tmp_path) == {}
    processor.write_text(json.dumps({"image_processor": new}))
    assert read_preprocessor(tmp_path) == new


def of_mode(mode: str) -> Image.Image:
    """A picture of each kind that Pillow has."""
    rng = np.random.default_rng(len(mode))
    picture = noise(40, 30).convert("RGBA")
    picture.putalpha(Image.fromarray(rng.integers(0, 256, (30, 40), dtype=np.uint8)))
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, (30, 40)).astype(np.uint16))
    if mode == "P with transparency":
        picture = noise(40, 30).quantize(16)
        picture.info["transparency"] = 3
        return picture
    if mode == "RGB with transparency":
        picture = Image.new("RGB", (40, 30), (1, 2, 3))
        picture.paste(noise(20, 30))
        picture.info["transparency"] = (1, 2, 3)
        return picture
    if mode == "PA":
        return picture.convert("RGB").quantize(8).convert("PA")
    return picture.convert("LA").convert(mode) if mode == "1" else picture.convert(mode)


MODES = ["RGB", "RGBA", "LA", "L", "1", "P", "PA", "CMYK", "YCbCr", "I;16", "I", "F"]
FILES = {"RGB": "jpg", "L": "jpg", "RGBA": "png", "LA": "png", "I;16": "png", "CMYK": "jpg"}
FILES |= {"P with transparency": "png", "RGB with transparency": "png"}
MODES += ["P with transparency", "RGB with transparency"]


@pytest.mark.parametrize("kind", ["CLIP", "Llava", "Siglip", "LlavaNext"])
def test_pictures_of_all_modes_equal_transformers(tmp_path: Path, kind: str):
    """In memory: laid on white, not turned. In a file: turned, transparency dropped."""
    config = {"image_processor_type": f"{kind}ImageProcessor"}
    theirs = getattr(transformers, f"{kind}ImageProcessorPil")()
    if kind == "LlavaNext":
        theirs.image_grid_pinpoints = [[224, 224]]
    spec = from_preprocessor(config, aspect="crop", code="transformers")

    def check(ours, given, what: object) -> None:
        # The first view of LlavaNext is the whole picture, squashed.
        pixels = theirs(given, return_tensors="np").pixel_values[0]
        if kind == "LlavaNext":
            ours = open_image(ours, convert=spec.convert).resize((224, 224), 3)
            pixels = pixels[0]
        found = preprocess(ours, spec).transpose(2, 0, 1)
        np.testing.assert_allclose(found, pixels, rtol=0, atol=2e-6, err_msg=str(what))

    for mode in MODES:
        picture = of_mode(mode)
        exif = picture.getexif()
        exif[0x112] = 6
        picture.info["exif"] = exif.tobytes()
        check(picture, picture, mode)
    for n, array in enumerate(np.random.default_rng(0).integers(0, 256, (2, 30, 40, 4))):
        array = array.astype(np.uint8)
        for given in (array, array[..., :3], array[..., :1])[n:]:
            check(given, given, given.shape)
    for mode, suffix in FILES.items():
        for turn in (1, 6, 8, 2):
            path = tmp_path / f"{mode} {turn}.{suffix}"
            picture = of_mode(mode)
            exif = Image.Exif()
            exif[0x112] = turn
            picture.save(path, exif=exif)
            check(path, str(path), path)
            check(open_file(path.read_bytes()), str(path), path)


@pytest.mark.parametrize("convert", [False, None])
def test_pictures_that_are_not_converted(tmp_path: Path, convert: bool | None):
    """With do_convert_rgb false transformers fails on all but RGB, by its number of means."""
    config = {**CLIP, "image_processor_type": "CLIPImageProcessorPil", "do_convert_rgb": convert}
    spec = from_preprocessor(config, aspect="crop", code="transformers")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    assert type(theirs) is transformers.CLIPImageProcessorPil
    picture = noise(40, 30)
    found = preprocess(picture, spec).transpose(2, 0, 1)
    pixels = theirs(picture, return_tensors="np").pixel_values[0]
    np.testing.assert_allclose(found, pixels, rtol=0, atol=2e-6)
    for mode in ("RGBA", "L"):
        with pytest.raises(ValueError):
            theirs(of_mode(mode), return_tensors="np")
        with pytest.raises(InputError, match=f"found a picture of mode {mode}, expected RGB"):
            preprocess(of_mode(mode), spec)
    data = io.BytesIO()
    of_mode("L").save(data, "PNG")
    assert preprocess(data.getvalue(), spec).shape == (224, 224, 3)


def test_padding_of_the_port_of_llava():
    config = {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    spec = from_preprocessor(config, aspect="crop", code="transformers")
    theirs = transformers.LlavaImageProcessorPil(do_pad=True)
    for picture in (noise(41, 30), noise(30, 95), noise(33, 33)):
        pixels = theirs(picture, return_tensors="np").pixel_values[0]
        found = preprocess(picture, spec).transpose(2, 0, 1)
        np.testing.assert_allclose(found, pixels, rtol=0, atol=2e-6)
