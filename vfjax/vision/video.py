"""Videos as several pictures at one placeholder, on the host.

Zero-shot video of Dense Connector (arXiv 2405.13800; DenseConnector llava/eval/video): frames are
read as pictures, one after another; of the visual tokens of a frame, each few are pooled into one.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image

from vfjax.errors import InputError, counted
from vfjax.vision.images import Source, open_image
from vfjax.vision.tiling import frame_indices


@dataclasses.dataclass(frozen=True)
class Video:
    """A video for one `<image>` placeholder.

    Attributes:
        frames: RGB pictures in the order of time.
        pool: visual tokens of a frame, one after another, of which the largest values are kept as
            one token; a remainder is dropped (torch MaxPool1d). 1 keeps all tokens.
    """

    frames: tuple[Image.Image, ...]
    pool: int = 2

    def __post_init__(self) -> None:
        if not self.frames or self.pool < 1:
            raise InputError(
                "video",
                found=f"{counted(len(self.frames), 'frame')}, pool {self.pool}",
                expected="at least one of each",
                fix="pass frames, and pool=1 to keep all tokens",
            )


def open_video(
    source: str | os.PathLike[str] | Sequence[Source], *, frames: int = 8, pool: int = 2
) -> Video:
    """Frames that stand for a video; see `vfjax.vision.tiling.frame_indices`.

    Args:
        source: a file that PyAV reads (extra "video"), or all frames as pictures.
        frames: how many are taken.
        pool: see `Video`.

    Raises:
        InputError: PyAV is not installed, the file is missing, corrupt or without pictures, or a
            frame can't be read.
    """
    if not isinstance(source, str | os.PathLike):
        indices = frame_indices(len(source), frames)
        return Video(tuple(open_image(source[i], name=f"frame {i}") for i in indices), pool)
    wanted = frame_indices(_count(source), frames)
    found: dict[int, Image.Image] = {}
    for i, frame in enumerate(_decode(source)):
        if i in wanted:
            found[i] = frame.to_image()
        if i == wanted[-1]:
            break
    return Video(tuple(found[i] for i in wanted), pool)


def _count(path: str | os.PathLike[str]) -> int:
    """Frames of a file, counted by decoding: what headers say is often missing or wrong."""
    return sum(1 for _ in _decode(path))


def _decode(path: str | os.PathLike[str]) -> Iterator[Any]:
    """The frames of a file's first video stream, in the order of time."""
    try:
        import av
    except ImportError:
        raise InputError(
            "video", found="no PyAV", expected="it", fix="pip install 'vfjax[video]'"
        ) from None
    name = os.fspath(path)
    if not os.path.isfile(name):
        raise InputError(name, found="no file", expected="a video", fix="check the path")
    try:
        with av.open(name, metadata_errors="replace") as container:
            if not container.streams.video:
                raise InputError(
                    name, found="no pictures", expected="a video stream", fix="check the file"
                )
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            yield from container.decode(stream)
    except av.FFmpegError as error:
        raise InputError(
            name,
            found=f"a file that can't be decoded ({error.strerror})",
            expected="a whole video",
            fix="replace the file",
        ) from None
