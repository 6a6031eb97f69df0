"""Idefics3 (arXiv 2408.12637) and SmolVLM (arXiv 2504.05299): a picture in tiles and whole.

A picture is enlarged to a longest edge, stretched to whole tiles and cut; the whole stands last. In
the text each tile has marks before it, its row and column, and rows end in newlines. Tokens of
r x r patches are joined on channels. Of a video each frame is one view, with its time before it.
transformers' Idefics3 and SmolVLM: models, image and video processors, processors.
"""

import dataclasses
import datetime
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from vfjax.architectures.base import (
    Branch,
    Inputs,
    OneEncoder,
    PatchEncoder,
    Prepared,
    Rows,
    Run,
    Size,
    bucket,
    stacked,
)
from vfjax.architectures.boxes import NOWHERE, WHOLE, cells, cut
from vfjax.architectures.pixel_shuffle import PixelShuffleConfig
from vfjax.errors import InputError
from vfjax.vision import native
from vfjax.vision.images import ImageSpec, normalised, preprocess
from vfjax.vision.video import Video

Array = jax.Array
Ids = tuple[int, ...]

LARGEST = 4096
"""The longest edge that a picture is enlarged to."""


@dataclasses.dataclass(frozen=True)
class Marks:
    """Token ids of what stands around a picture's tiles.

    Attributes:
        edge: before every tile's mark, and behind the whole.
        tiles: mark of each tile, by rows of the largest grid, which is a square.
        line: behind a row of tiles.
        last: behind the last one.
        whole: mark of the whole picture.
    """

    edge: Ids
    tiles: tuple[Ids, ...]
    line: Ids
    last: Ids
    whole: Ids


@dataclasses.dataclass(frozen=True)
class Film:
    """How videos are read.

    Attributes:
        edge: longest edge that a frame is resized to before it is stretched to a tile.
        tile: side of that tile; one that is not the pictures' is refused where a video is shown.
        frames: that are read of a video, at most; None: the folder does not say.
        rate: frames of a second that are read; None: the folder does not say.
    """

    edge: int
    tile: int
    frames: int | None = None
    rate: float | None = None

    def choose(self, total: int, rate: float) -> np.ndarray:
        """Which of `total` frames are read, of which `rate` are shown a second.

        SmolVLMVideoProcessor's `sample_frames`: of a long video a second at each end is left out.

        Raises:
            InputError: the folder does not say how many.
        """
        if self.frames is None or self.rate is None:
            raise InputError(
                "video",
                found="a video processor without num_frames and fps",
                expected="them, by which frames are chosen",
                fix="add them to the folder, or pass frames= in place of choose=",
            )
        duration = total / rate
        count = max(min(round(self.rate * duration), self.frames), 1)
        first, last = 0, total - 1
        if duration - 2 > self.frames * self.rate:
            first, last = int(rate), min(int(total - rate), last)
            if first >= last:
                first, last = 0, total - 1
        return np.unique(np.linspace(first, last, count, dtype=int))


@dataclasses.dataclass(frozen=True)
class Idefics(OneEncoder):
    """Tiles of a picture, and the whole.

    Attributes:
        encoder: config of the encoder.
        connector: config of the connector.
        images: of a tile.
        longest: edge that a picture is enlarged or shrunk to.
        split: whether a picture is tiled; otherwise it is one view, stretched to a tile.
        marks: in the text.
        film: how videos are read; None: the model's own code reads none, frames are shown as
            pictures without tiles.
    """

    encoder: PatchEncoder
    connector: PixelShuffleConfig
    images: ImageSpec
    longest: int
    split: bool
    marks: Marks
    film: Film | None = None

    @property
    def side(self) -> int:
        """Tokens a side of a view."""
        return math.isqrt(self.encoder.tokens) // self.connector.factor

    @property
    def most(self) -> int:
        """Tiles a side of a picture, at most."""
        return largest_grid(self.longest, self.images.size) if self.split else 0

    @property
    def tokens(self) -> int:
        """Tokens of a picture, at most, marks included."""
        return len(self.run((self.most, self.most)))

    def prepare(self, rows: Rows, slots: int | None = None) -> Prepared:
        """Inputs: pixels float32[t, s, s, 3], all views of all pictures; see `Architecture`."""
        views: list[np.ndarray] = []
        runs: list[Run] = []
        for each in (media for row in rows for media in row):
            first = len(views)
            if isinstance(each, Video):
                views += [self._frame(image) for image in each.frames]
                run = self.shown(each)
            else:
                grid = self.grid(each.size)
                views += [preprocess(view, self.images) for view in self._views(each, grid)]
                run = self.run(grid)
            runs.append(dataclasses.replace(run, indices=run.indices + first * self.side**2))
        count = bucket(len(views)) if slots is None else slots * (self.most**2 + 1)
        inputs = Inputs(stacked(views, count, self.images.size))
        return Prepared(inputs, runs, count * self.side**2)

    def regions(self, size: Size) -> np.ndarray:
        """See `Architecture.regions`; marks have no place."""
        grid = self.grid(size)
        whole = cells(WHOLE, self.side**2)
        tiles = [cells(box, self.side**2) for box in cut(WHOLE, grid)] if grid[0] else []
        run = self.run(grid)
        seen = np.concatenate([*tiles, whole])[run.indices[:, 0]]
        return np.where(run.text[:, None] < 0, seen, NOWHERE)

    def grid(self, size: Size) -> Size:
        """Columns and rows of a picture's tiles; (0, 0): the whole alone."""
        if not self.split:
            return 0, 0
        tile = self.images.size
        width, height = canvas(resized(size, self.longest), tile)
        return (0, 0) if width == height == tile else (width // tile, height // tile)

    def run(self, grid: Size) -> Run:
        """A picture's tokens and marks, indices from its first view."""
        (cols, rows), marks = grid, self.marks
        parts: list[Ids | np.ndarray] = []
        for row in range(rows):
            for col in range(cols):
                view = self._view(row * cols + col)
                parts += [marks.edge, marks.tiles[row * self.most + col], view]
            parts.append(marks.last if row + 1 == rows else marks.line)
        last = self._view(rows * cols)
        return Run.interleaved([*parts, marks.edge, marks.whole, last, marks.edge])

    def shown(self, video: Video) -> Run:
        """A video's tokens and marks, indices from its first frame; texts are words of the run."""
        marks, views = self.marks, [self._view(k) for k in range(len(video.frames))]
        frames = [(marks.edge, marks.whole, view, marks.edge) for view in views]
        if self.film is None:
            return Run.interleaved([part for frame in frames for part in frame])
        if self.film.tile != self.images.size:
            raise InputError(
                "video",
                found=f"frames of {self.film.tile} pixels, by the folder's video processor",
                expected=f"{self.images.size}, as the image processor's tiles",
                fix="correct max_image_size of one of them",
            )
        intro, *times, end = sayings(video)
        texts = [intro + times[0], *times[1:]]
        parts = [part for k, frame in enumerate(frames) for part in (texts[k], *frame)]
        return Run.interleaved([*parts, end])

    def choose(self, total: int, rate: float) -> np.ndarray:
        """Frames of a video that are read, for `vfjax.open_video`; see `Film.choose`.

        Raises:
            InputError: the model's own code reads no videos.
        """
        if self.film is None:
            raise InputError(
                "video",
                found="a model whose code reads none",
                expected="one that says which frames are read",
                fix="pass frames= in place of choose=",
            )
        return self.film.choose(total, rate)

    def _view(self, number: int) -> np.ndarray:
        """Tokens of a view in the memory."""
        return number * self.side**2 + np.arange(self.side**2)

    def _views(self, image: Image.Image, grid: Size) -> Iterator[Image.Image]:
        """Tiles, row by row, and the whole."""
        tile, resample = self.images.size, self.images.resample
        image = image.resize(resized(image.size, self.longest), resample)
        if self.split:
            image = image.resize(canvas(image.size, tile), resample)
        cols, rows = grid
        for row in range(rows):
            for col in range(cols):
                left, top = col * tile, row * tile
                yield image.crop((left, top, left + tile, top + tile))
        yield image.resize((tile, tile), resample)

    def _frame(self, image: Image.Image) -> np.ndarray:
        tile, resample = self.images.size, self.images.resample
        if self.film is None:
            size = resized(image.size, self.longest)
            return preprocess(image.resize(size, resample), self.images)
        size = resized(image.size, min(self.film.edge, LARGEST))
        small = native.resized(np.asarray(image), size, resample)  # by torch, as transformers
        return normalised(native.resized(small, (tile, tile), resample), self.images)

    def build(self, *, rngs: nnx.Rngs) -> "IdeficsBranch":
        return IdeficsBranch(self, rngs=rngs)


def resized(size: Size, longest: int) -> Size:
    """Width and height with the longer side `longest`, `LARGEST` at most, the other one even."""
    width, height = size
    aspect = width / height
    if width >= height:
        width, height = longest, int(longest / aspect)
        height += height % 2
    else:
        width, height = int(longest * aspect), longest
        width += width % 2
    width, height = max(width, 1), max(height, 1)
    aspect = width / height
    if width >= height and width > LARGEST:
        return LARGEST, max(int(LARGEST / aspect), 1)
    if height > LARGEST:
        return max(int(LARGEST * aspect), 1), LARGEST
    return width, height


def canvas(size: Size, tile: int) -> Size:
    """Width and height of whole tiles that a picture is stretched to."""
    width, height = size
    aspect = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        return width, math.ceil(int(width / aspect) / tile) * tile
    height = math.ceil(height / tile) * tile
    return math.ceil(int(height * aspect) / tile) * tile, height


def largest_grid(longest: int, tile: int) -> int:
    """Tiles a side of the largest picture that is tiled; 0: none is."""
    edge = min(longest, LARGEST)
    most = math.ceil((edge + edge % 2) / tile)
    return most if most > 1 else 0


def sayings(video: Video) -> list[str]:
    """What stands before a video's frames, with each of them, and behind.

    Of frames without times 24 are shown a second.

    Raises:
        InputError: the package that spells numbers is not installed.
    """
    try:
        from num2words import num2words
    except ImportError:
        raise InputError(
            "video", found="no num2words", expected="it", fix="pip install 'vfjax[video]'"
        ) from None
    count = len(video.frames)
    times = video.times or tuple(k / 24 for k in range(count))
    seconds = int(times[-1] if video.duration is None else video.duration)
    length = datetime.timedelta(seconds=seconds)
    intro = (
        f"You are provided the following series of {num2words(count)} frames from a {length} "
        "[H:MM:SS] video.\n"
    )
    stamps = [f"\nFrame from {int(t // 60):02d}:{int(t % 60):02d}:" for t in times]
    return [intro, *stamps, "\n\n"]


class IdeficsBranch(Branch):
    """The connector reads the last hidden state behind the encoder's last norm."""

    def states(self, inputs: Inputs) -> dict[str, list[Array]]:
        """Encoder -> its normed last hidden state."""
        taps = self.config.connector.taps["encoder"]
        return {"encoder": self.encoder(jnp.asarray(inputs.pixels), taps, norm=True)}
