"""Pictures to fixed-shape arrays, on the host, with Pillow and numpy.

Pixels must equal those a model was trained on. Pillow does the resizing because the models were
trained on it: its bicubic (a = -0.5, antialiased) rounds to uint8 after the rows and again after
the columns, which `jax.image.resize` does not do. Sources: Hugging Face's `CLIPImageProcessor`,
`SiglipImageProcessor`, `BitImageProcessor` and `ViTImageProcessor`, and LLaVA's `expand2square`
(`llava/mm_utils.py`).
"""

import io
import os
import struct
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from vfjax.atomic import contents
from vfjax.errors import InputError

MAX_SIDE = 20_000  # a picture with this side or a longer one is refused
MAX_PIXELS = 178_956_970  # as Pillow's guard against decompression bombs
BAND = 512  # rows padded at a time
# What Pillow's decoders are seen to raise on damaged bytes.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    EOFError,
    MemoryError,
    struct.error,
    zlib.error,
)

Convert = Literal["drop", "blend", "none"]
"""How a picture becomes RGB.

"drop" is the authors': `Image.open(f).convert("RGB")`, so that EXIF orientation is not applied and
transparency is dropped; beyond them, 16-bit grey is scaled to 8 bits, where Pillow clips it.

"blend" is transformers 5: a file is turned upright and loses its alpha channel
(image_utils.load_image); a picture in memory is not turned, and is laid on white where it is
transparent (image_transforms.convert_to_rgb); Pillow converts the rest. "none" is the same, but
pictures in memory must be RGB, as for an image processor with do_convert_rgb false.
"""


class File:
    """A decoded picture of a file or of its bytes, not yet converted; of `open_file`.

    Attributes:
        image: Pillow's, its pixels in memory.
        name: what to call it in errors.
        width: in pixels, before it is turned.
        height: so, too.
    """

    def __init__(self, image: Image.Image, name: str):
        """Decodes an opened picture.

        Raises:
            InputError: a broken picture, or a larger one than `open_image` takes.
        """
        _check_size(*image.size, name)
        try:
            image.load()
            image.getexif()
        except _DECODER_ERRORS as error:
            raise _unreadable(name, error) from None
        self.image, self.name = image, name
        self.width, self.height = image.size
        self._rgb: dict[str, Image.Image] = {}

    def rgb(self, convert: Convert) -> Image.Image:
        """As 8-bit RGB; converted once."""
        if convert not in self._rgb:
            self._rgb[convert] = _to_rgb(self.image, self.name, convert, file=True)
        return self._rgb[convert]


Source = str | os.PathLike[str] | bytes | np.ndarray | Image.Image | File


@dataclass(frozen=True)
class ImageSpec:
    """All that fixes a member's preprocessing; hashable.

    Attributes:
        size: side of the model's square input, in pixels; "native": what both sides are multiples
            of.
        edge: what the picture is resized to before the centre crop of `size`: its shortest edge
            or, for "squash", both. DINOv2: 256, cropped to 224.
        resize: "shortest" keeps the aspect (CLIP, DINOv2), "squash" does not (SigLIP); "native" is
            about the picture's own size (Qwen2-VL), see `vfjax.vision.native`.
        aspect: "pad" first puts the picture on a square of one colour (LLaVA-1.5), "crop" loses
            what is outside the centre crop.
        mean, std: per channel, of pixels times `rescale`.
        resample: Pillow filter: 0 nearest, 1 lanczos, 2 bilinear, 3 bicubic, 4 box, 5 hamming.
        rescale: factor on uint8 pixels.
        convert: how a picture becomes RGB, see `Convert`.
        pixels: of "native" the fewest and the most that a picture has once it is resized, about.
        border: of "pad" the colour around the picture, in shares of 255; None: the mean.
    """

    size: int
    edge: int
    resize: Literal["shortest", "squash", "native"]
    aspect: Literal["pad", "crop"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: int = 3
    rescale: float = 1 / 255
    convert: Convert = "drop"
    pixels: tuple[int, int] = (0, 0)
    border: tuple[float, float, float] | None = None


def open_image(
    source: Source, *, name: str | None = None, convert: Convert = "drop"
) -> Image.Image:
    """Reads a picture as 8-bit RGB.

    Args:
        source: path, encoded bytes, uint8[h, w, 3] or Pillow image, or a `File`.
        name: what to call the picture in errors; by default its path.
        convert: see `Convert`; with "blend" an array may have 1 or 4 channels.

    Returns:
        An RGB image with its pixels in memory.

    Raises:
        InputError: missing, empty, unreadable, truncated or animated file, a side of `MAX_SIDE`
            or more, more than `MAX_PIXELS`, an array or pixel format without a known range, a
            picture in memory that is not RGB where `convert` is "none".
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, name or "image array", convert)
    if isinstance(source, Image.Image):
        return _to_rgb(source, name or "image", convert, file=False)
    return open_file(source, name=name).rgb(convert)


def open_file(source: str | os.PathLike[str] | bytes | File, *, name: str | None = None) -> File:
    """Decodes a picture, so that each branch of a model can convert it as its own code does.

    Args:
        source: path or encoded bytes.
        name: what to call it in errors; by default its path.

    Raises:
        InputError: as `open_image`, but for what only the conversion tells.
    """
    if isinstance(source, File):
        return source
    if isinstance(source, bytes):
        return _from_bytes(source, name or "image bytes")
    if not isinstance(source, str | os.PathLike):
        raise InputError(
            name or "image",
            found=f"a {type(source).__name__}",
            expected="a path, bytes, uint8 array or Pillow image",
            fix="convert it",
        )
    name = name or os.fspath(source)
    try:
        data = contents(source)
    except OSError as error:
        raise InputError(
            name, found=error.strerror, expected="an image file", fix="check the path"
        ) from None
    return _from_bytes(data, name)


def _from_bytes(data: bytes, name: str) -> File:
    if not data:
        raise InputError(name, found="0 bytes", expected="an image", fix="replace the file")
    try:
        image = Image.open(io.BytesIO(data))
        frames = getattr(image, "n_frames", 1)
    except Image.DecompressionBombError:
        raise _too_large(name, f"more than {MAX_PIXELS} pixels") from None
    except _DECODER_ERRORS as error:
        raise _unreadable(name, error) from None
    # Phones write several pictures into one JPEG ("MPO"), of which the first is the photo.
    if frames > 1 and image.format != "MPO":
        raise InputError(
            name,
            found=f"{image.format} with {frames} frames",
            expected="one picture",
            fix="save the frame you mean as a file of its own",
        )
    return File(image, name)


def _from_array(array: np.ndarray, name: str, convert: Convert) -> Image.Image:
    channels = array.shape[2] if array.ndim == 3 else 0
    if array.dtype != np.uint8 or channels not in ((1, 3, 4) if convert == "blend" else (3,)):
        more = ", or 1 or 4 channels" if convert == "blend" else ""
        raise InputError(
            name,
            found=f"{array.dtype}{list(array.shape)}",
            expected=f"uint8[height, width, 3]{more}",
            fix="convert it",
        )
    _check_size(array.shape[1], array.shape[0], name)
    if channels == 1:
        array = np.repeat(array, 3, axis=-1)
    if channels == 4:  # rounded as transformers does, which is not Pillow's rounding
        alpha = array[..., 3:] / 255
        array = np.round(alpha * array[..., :3] + (1 - alpha) * 255).astype(np.uint8)
    return Image.fromarray(array)


def _to_rgb(image: Image.Image, name: str, convert: Convert, *, file: bool) -> Image.Image:
    _check_size(*image.size, name)
    try:
        image.load()
        if convert != "drop":
            return _as_transformers(image, name, convert, file=file)
        if image.mode == "RGB":
            return image
        if image.mode.startswith("I;16"):
            grey = (np.asarray(image).astype(np.uint32) + 128) // 257  # 65535 / 255, rounded
            return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
        if image.mode not in ("I", "F"):
            return image.convert("RGB")
    except _DECODER_ERRORS as error:
        raise _unreadable(name, error) from None
    raise InputError(
        name,
        found=f"32-bit pixels (mode {image.mode}) of unknown range",
        expected="8 or 16 bits a channel",
        fix="scale them to 8 bits",
    )


def _as_transformers(image: Image.Image, name: str, convert: Convert, *, file: bool) -> Image.Image:
    """See `Convert`."""
    if file:  # a colour that stands for transparency is remembered, and laid on white below
        image = ImageOps.exif_transpose(image).convert("RGB")
    if convert == "none" and image.mode != "RGB":
        raise InputError(
            name,
            found=f"a picture of mode {image.mode}",
            expected="RGB: the image processor's do_convert_rgb is false",
            fix="convert it",
        )
    if convert == "blend" and (
        "A" in image.getbands() or image.info.get("transparency") is not None
    ):
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def _check_size(width: int, height: int, name: str) -> None:
    if width < 1 or height < 1:
        raise InputError(
            name, found=f"{width}x{height} pixels", expected="at least 1x1", fix="replace it"
        )
    if max(width, height) >= MAX_SIDE or width * height > MAX_PIXELS:
        raise _too_large(name, f"{width}x{height} pixels")


def _too_large(name: str, found: str) -> InputError:
    limit = f"sides under {MAX_SIDE} and at most {MAX_PIXELS} pixels in all"
    return InputError(name, found=found, expected=limit, fix="scale the picture down")


def _unreadable(name: str, error: Exception) -> InputError:
    return InputError(
        name,
        found=f"an unreadable picture ({type(error).__name__}: {error})",
        expected="an intact image in a format Pillow reads",
        fix="replace the file",
    )


def preprocess(image: Source, spec: ImageSpec) -> np.ndarray:
    """Makes the pixel values a vision tower expects.

    Args:
        image: anything `open_image` takes.
        spec: the tower's preprocessing.

    Returns:
        float32[size, size, 3], whatever the picture's size: ((uint8 * rescale) - mean) / std, the
        product in float64, the rest in float32.

    Raises:
        InputError: as `open_image`; or a strip so long that resizing its short edge to `edge`
            would pass `MAX_PIXELS`.
    """
    image = open_image(image, convert=spec.convert)
    if spec.aspect == "pad":
        image = _pad_and_resize(image, spec)
    else:
        image = image.resize(_resized(image.size, spec), spec.resample)
    left, top = (image.width - spec.size) // 2, (image.height - spec.size) // 2
    pixels = np.asarray(image)[top : top + spec.size, left : left + spec.size]
    return normalised(pixels, spec)


def normalised(pixels: np.ndarray, spec: ImageSpec) -> np.ndarray:
    """The model's values float32[..., 3] of uint8[..., 3] pixels, as of `preprocess`."""
    # A look-up of the 256 possible values: the same numbers as the arithmetic, much sooner.
    table = _pixel_values(spec)
    out = np.empty(pixels.shape, np.float32)
    for channel in range(3):
        out[..., channel] = table[channel][pixels[..., channel]]
    return out


@lru_cache(maxsize=64)
def _pixel_values(spec: ImageSpec) -> np.ndarray:
    """float32[3, 256]: the model's value of every uint8 value, by channel."""
    rescaled = (np.arange(256, dtype=np.float64) * spec.rescale).astype(np.float32)
    mean, std = (np.array(values, np.float32)[:, None] for values in (spec.mean, spec.std))
    return (rescaled - mean) / std


def _resized(size: tuple[int, int], spec: ImageSpec) -> tuple[int, int]:
    """(width, height) before the crop; the long edge is truncated as in transformers."""
    if spec.resize == "squash":
        return spec.edge, spec.edge
    short, long = sorted(size)
    long = int(spec.edge * long / short)
    if spec.edge * long > MAX_PIXELS:
        raise InputError(
            "image",
            found=f"a strip of {size[0]}x{size[1]} pixels",
            expected=f"at most {MAX_PIXELS} pixels once its short edge is {spec.edge}",
            fix="cut it, or pad it to a square",
        )
    return (spec.edge, long) if size[0] <= size[1] else (long, spec.edge)


def _pad_and_resize(image: Image.Image, spec: ImageSpec) -> Image.Image:
    """Pads to a square of one colour and resizes that to `edge`.

    Pillow resizes all rows, then all columns. Doing the two passes by hand, the rows in bands,
    gives the same bytes without ever holding the square, which for a long strip is gigabytes.
    """
    colour = tuple(int(255 * share) for share in spec.border or spec.mean)
    width, height = image.size
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    rows = Image.new("RGB", (spec.edge, side), colour)
    for y in range(0, height, BAND):
        band = Image.new("RGB", (side, min(BAND, height - y)), colour)
        band.paste(image.crop((0, y, width, y + band.height)), (left, 0))
        rows.paste(band.resize((spec.edge, band.height), spec.resample), (0, top + y))
    return rows.resize((spec.edge, spec.edge), spec.resample)
