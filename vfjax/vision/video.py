"""Videos as several pictures at one placeholder, on the host.

Zero-shot video of Dense Connector (arXiv 2405.13800; DenseConnector llava/eval/video): frames are
read as pictures, one after another; of the visual tokens of a frame, each few are pooled into one.
"""

import dataclasses
import io
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from vfjax.atomic import contents, store_of
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
        times: when each frame is shown, in seconds from the start; None: not known.
        duration: of the whole video, in seconds; None: not known.
    """

    frames: tuple[Image.Image, ...]
    pool: int = 2
    times: tuple[float, ...] | None = None
    duration: float | None = None

    def __post_init__(self) -> None:
        if self.times is not None and len(self.times) != len(self.frames):
            raise InputError(
                "video",
                found=f"{counted(len(self.times), 'time')} of {counted(len(self.frames), 'frame')}",
                expected="as many of one as of the other",
                fix="pass the time of each frame, or no times",
            )
        if self.duration is not None and not 0 < self.duration < float("inf"):
            raise InputError(
                "video",
                found=f"a duration of {self.duration} seconds",
                expected="a positive number",
                fix="correct it, or leave it out",
            )
        if not self.frames or self.pool < 1:
            raise InputError(
                "video",
                found=f"{counted(len(self.frames), 'frame')}, pool {self.pool}",
                expected="at least one of each",
                fix="pass frames, and pool=1 to keep all tokens",
            )


Choose = Callable[[int, float], Sequence[int] | np.ndarray]
"""(frames of a video, how many are shown a second) -> which of them stand for it, ascending."""


def open_video(
    source: str | os.PathLike[str] | Sequence[Source],
    *,
    frames: int = 8,
    pool: int = 2,
    rate: float | None = None,
    choose: Choose | None = None,
) -> Video:
    """Frames that stand for a video; see `vfjax.vision.tiling.frame_indices`.

    Args:
        source: a file that PyAV reads (extra "video"), or all frames as pictures.
        frames: how many are taken.
        pool: see `Video`.
        rate: frames that are shown a second; of a file what it says on average.
        choose: in place of `frames`, which are taken; an architecture whose model was trained with
            a rule of its own has it as `choose`.

    Raises:
        InputError: PyAV is not installed, the file is missing, corrupt or without pictures, a frame
            can't be read, the rate is not positive, or `choose` is given and it is not known.
    """
    if rate is not None and not 0 < rate < float("inf"):
        raise InputError(
            "video",
            found=f"rate {rate}",
            expected="a positive number of frames a second",
            fix="correct rate, or leave it out",
        )
    if not isinstance(source, str | os.PathLike):
        wanted = _wanted(len(source), frames, rate, choose)
        pictures = [open_image(source[i], name=f"frame {i}") for i in wanted]
        total = len(source)
    else:
        total, own = _scan(source)
        rate = own if rate is None else rate
        wanted = _wanted(total, frames, rate, choose)
        found: dict[int, Image.Image] = {}
        for i, (_, frame) in enumerate(_decode(source)):
            if i in wanted:
                found[i] = frame.to_image()
            if i == wanted[-1]:
                break
        pictures = [found[i] for i in wanted]
    if rate is None:
        return Video(tuple(pictures), pool)
    return Video(tuple(pictures), pool, tuple(i / rate for i in wanted), total / rate)


def _wanted(total: int, frames: int, rate: float | None, choose: Choose | None) -> list[int]:
    if choose is None or not total:
        return frame_indices(total, frames).tolist()
    if rate is None:
        raise InputError(
            "video",
            found="frames without their rate",
            expected="how many are shown a second, by which some are chosen",
            fix="pass rate=",
        )
    return [int(i) for i in choose(total, rate)]


def _scan(path: str | os.PathLike[str]) -> tuple[int, float | None]:
    """Frames of a file, and how many are shown a second, if it says so.

    They are counted by decoding: what headers say is often missing or wrong.
    """
    count, rate = 0, None
    for stream, _ in _decode(path):
        count, rate = count + 1, stream.average_rate
    return count, float(rate) if rate else None


def _decode(path: str | os.PathLike[str]) -> Iterator[tuple[Any, Any]]:
    """A file's first video stream, and each of its frames, in the order of time."""
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
        data = name if store_of(path) is None else io.BytesIO(contents(path))
        with av.open(data, "r", metadata_errors="replace") as container:
            if not container.streams.video:
                raise InputError(
                    name, found="no pictures", expected="a video stream", fix="check the file"
                )
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for frame in container.decode(stream):
                yield stream, frame
    except av.FFmpegError as error:
        raise InputError(
            name,
            found=f"a file that can't be decoded ({error.strerror})",
            expected="a whole video",
            fix="replace the file",
        ) from None
