"""Pictures from strangers: few formats, few pixels, nothing decoded before both are known."""

import io
from pathlib import Path

from PIL import Image

from vfjax import InputError
from vfjax.vision.images import File

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""Formats of pictures that are decoded; Pillow knows others, some of which run programs."""

STRIP = 50
"""Long side by short side at most: a crop resizes the whole of a strip to its short side."""


def read_picture(source: bytes | Path, where: str, pixels: int) -> File:
    """A picture, for each model to convert as it does.

    Args:
        source: its file, or the bytes of one.
        where: what to call it in errors.
        pixels: at most.

    Raises:
        InputError: no picture, another format, too many pixels, a strip, several frames.
    """
    try:
        with Image.open(
            io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS
        ) as image:
            _check(image, where, pixels)
            return File(image, where)
    except InputError:
        raise
    except Exception as error:  # Pillow's decoders raise all kinds
        raise InputError(
            where,
            found=f"no picture ({type(error).__name__})",
            expected=f"one of {', '.join(FORMATS)}",
            fix="send another file",
        ) from None


def _check(image: Image.Image, where: str, pixels: int) -> None:
    width, height = image.size
    found, expected = "", ""
    if width * height > pixels:
        found, expected = f"{width}x{height} pixels", f"at most {pixels}"
    elif max(width, height) > STRIP * min(width, height):
        found = f"a strip of {width}x{height} pixels"
        expected = f"a long side of at most {STRIP} short ones"
    elif getattr(image, "is_animated", False) and image.format != "MPO":
        found, expected = f"an animated {image.format}", "one picture"
    if found:
        raise InputError(where, found=found, expected=expected, fix="scale or crop it")
