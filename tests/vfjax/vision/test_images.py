"""Pixel values against upstream recordings and transformers, and pictures nobody wants."""

import io
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vfjax.errors import InputError
from vfjax.vision import images
from vfjax.vision.images import ImageSpec, open_image, preprocess

HALF = (0.5, 0.5, 0.5)
SMALL = ImageSpec(
    size=14, edge=16, resize="shortest", aspect="crop", mean=(0.48, 0.46, 0.41), std=HALF
)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng((seed, width, height))
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def encode(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("resize", ["shortest", "squash"])
def test_padding_in_bands_equals_padding_the_square(monkeypatch, resize):
    monkeypatch.setattr(images, "BAND", 7)
    spec = ImageSpec(
        size=28,
        edge=32,
        resize=resize,
        aspect="pad",
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=HALF,
    )
    crop = ImageSpec(**{**vars(spec), "aspect": "crop"})
    for size in [(1, 1), (50, 50), (32, 32), (32, 20), (99, 40), (40, 99), (7, 301), (301, 1)]:
        image = noise(*size)
        square = Image.new("RGB", (max(size), max(size)), (122, 116, 104))
        square.paste(image, ((max(size) - size[0]) // 2, (max(size) - size[1]) // 2))
        np.testing.assert_array_equal(preprocess(image, spec), preprocess(square, crop), str(size))


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 700),
    height=st.integers(1, 700),
    aspect=st.sampled_from(["pad", "crop"]),
    resize=st.sampled_from(["shortest", "squash"]),
)
def test_every_size_gives_one_shape(width, height, aspect, resize):
    spec = ImageSpec(**{**vars(SMALL), "aspect": aspect, "resize": resize})
    out = preprocess(Image.new("RGB", (width, height), (200, 10, 90)), spec)
    assert out.shape == (14, 14, 3)
    assert np.isfinite(out).all()


def test_jax_resize_is_no_substitute_for_pillow():
    """The reason Pillow stays: JAX's cubic does not round to uint8 between and after the passes."""
    image = noise(61, 47)
    ours = np.asarray(image.resize((20, 20), Image.Resampling.BICUBIC)).astype(np.float32)
    pixels = np.asarray(image).astype(np.float32)
    theirs = np.asarray(jax.image.resize(pixels, (20, 20, 3), "cubic"))
    difference = np.abs(ours - np.clip(theirs, 0, 255))
    assert difference.max() > 0.4  # of 255; tolerance on pixels is 2e-6 of about 1
    assert np.mean(difference > 1e-3) > 0.9


def test_exif_orientation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    assert open_image(encode(noise(8, 4), "JPEG", exif=exif.tobytes())).size == (8, 4)


def test_transparency_is_dropped_not_blended():
    image = Image.new("RGBA", (2, 2), (200, 100, 50, 0))
    assert open_image(encode(image, "PNG")).getpixel((0, 0)) == (200, 100, 50)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_pixel_formats(mode: str):
    image = noise(5, 3).convert(mode)
    opened = open_image(image)
    assert opened.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(opened), np.asarray(image.convert("RGB")))


def test_16_bit_grey_is_scaled():
    values = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    opened = np.asarray(open_image(encode(Image.fromarray(values), "PNG")))
    np.testing.assert_array_equal(opened[0, :, 0], np.round(values[0] / 257))
    assert opened.shape == (1, 6, 3)


def test_path_bytes_array_and_image_are_the_same(tmp_path: Path):
    image = noise(9, 6)
    image.save(tmp_path / "a.png")
    sources = [tmp_path / "a.png", str(tmp_path / "a.png"), np.asarray(image), image]
    sources.append((tmp_path / "a.png").read_bytes())
    for source in sources:
        np.testing.assert_array_equal(np.asarray(open_image(source)), np.asarray(image))


def test_photos_with_several_pictures_in_one_jpeg():
    photo = encode(noise(8, 6), "MPO", save_all=True, append_images=[noise(4, 3)])
    assert Image.open(io.BytesIO(photo)).n_frames == 2
    assert open_image(photo).size == (8, 6)


def grey_png(width: int, height: int) -> bytes:
    return encode(Image.new("1", (width, height)), "PNG")


def one_line(error: pytest.ExceptionInfo, *words: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["0 bytes"]),
        (b"not a picture", ["unreadable", "UnidentifiedImageError"]),
        (encode(noise(64, 64), "PNG")[:700], ["unreadable"]),
        (encode(noise(64, 64), "JPEG")[:700], ["unreadable", "truncated"]),
        (grey_png(20_000, 20_000), ["more than 178956970 pixels", "scale the picture down"]),
        (grey_png(20_000, 2), ["20000x2", "sides under 20000"]),
        (grey_png(2, 20_000), ["2x20000"]),
        (
            encode(noise(8, 8), "GIF", save_all=True, append_images=[noise(8, 8, seed=1)]),
            ["GIF with 2 frames", "save the frame"],
        ),
    ],
    ids=["empty", "text", "cut_png", "cut_jpeg", "huge", "wide", "tall", "animation"],
)
def test_bad_files(tmp_path: Path, content: bytes, words: list[str]):
    path = tmp_path / "photo.png"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        open_image(path)
    one_line(error, "photo.png", *words)


def test_missing_file_and_folder(tmp_path: Path):
    with pytest.raises(InputError) as error:
        open_image(tmp_path / "none.jpg")
    one_line(error, "none.jpg", "No such file")
    with pytest.raises(InputError) as error:
        open_image(tmp_path)
    one_line(error, "found a folder")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (np.zeros((0, 0, 3), np.uint8), ["0x0"]),
        (np.zeros((4, 0, 3), np.uint8), ["0x4"]),
        (np.zeros((4, 4, 3), np.float32), ["float32[4, 4, 3]", "uint8"]),
        (np.zeros((4, 4), np.uint8), ["uint8[4, 4]"]),
        (np.zeros((1, 20_000, 3), np.uint8), ["20000x1"]),
        (Image.new("RGB", (0, 0)), ["0x0"]),
        (None, ["NoneType", "a path"]),
        (Image.new("F", (4, 4)), ["mode F"]),
        (Image.new("I", (4, 4)), ["mode I"]),
    ],
)
def test_bad_arrays_and_images(source, words: list[str]):
    with pytest.raises(InputError) as error:
        open_image(source, name="frame 3")
    one_line(error, "frame 3", *words)


@pytest.mark.filterwarnings("ignore")  # Pillow's remarks on the damage
@settings(max_examples=150, deadline=None)
@given(data=st.data(), kind=st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"]))
def test_damaged_files_give_a_picture_or_one_line(data, kind: str):
    content = bytearray(encode(noise(12, 9), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "MAX_PIXELS", 10**6)  # a damaged header may claim any size
        try:
            assert open_image(bytes(content)).mode == "RGB"
        except InputError as error:
            assert "\n" not in str(error)


def test_endless_strip():
    strip = Image.new("RGB", (2, 19_000))
    spec = ImageSpec(size=336, edge=336, resize="shortest", aspect="crop", mean=HALF, std=HALF)
    with pytest.raises(InputError, match="strip of 2x19000.*pad it"):
        preprocess(strip, spec)
    padded = ImageSpec(**{**vars(spec), "aspect": "pad"})
    assert preprocess(strip.crop((0, 0, 2, 4000)), padded).shape == (336, 336, 3)
