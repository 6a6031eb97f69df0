"""LLaVA-OneVision (arXiv 2408.03326): tiles up to a limit of tokens, several pictures, videos.

A lone picture is shown whole and in tiles, as LLaVA-NeXT's; a raster of more tokens than `most`
views hold is shrunk, bilinearly. Of several pictures in a row each is one view, padded to a square;
of a video's frames each is one, squashed, its tokens halved a side. LLaVA-NeXT
llava/model/llava_arch.py, llava/mm_utils.py, llava/train/train.py (several pictures);
transformers' LlavaOnevision computes the same.
"""

import dataclasses
import math

import numpy as np

from vfjax.architectures.base import Inputs, Prepared, Rows, Run, Size, bucket, stacked
from vfjax.architectures.boxes import NOWHERE, WHOLE, Box, canvas, cells, cut, frame, within
from vfjax.architectures.llava_next import LlavaNext
from vfjax.vision import native, tiling
from vfjax.vision.images import preprocess
from vfjax.vision.resize import bilinear
from vfjax.vision.video import Video

SHRINK = 1.1
"""A raster is shrunk if its sides are more than this times those of `most` views."""


@dataclasses.dataclass(frozen=True)
class OneVision(LlavaNext):
    """The connector is `vfjax.architectures.llava`'s, with a newline; `merge` is not read.

    `Video.pool` is not read either: the family has a rule of its own for videos.

    Attributes:
        most: views' tokens that the tiles of a picture have at most, N of "anyres_max_N".
    """

    most: int = 9

    @property
    def tokens(self) -> int:
        """Tokens of a lone picture, at most."""
        limit = math.floor(SHRINK**2 * self.most * self.side**2)
        grids = [(w // self.images.size, h // self.images.size) for w, h in self.pinpoints]
        rasters = (
            min(cols * rows * self.side**2, limit) + rows * self.side for cols, rows in grids
        )
        return self.side**2 + max(rasters)

    def prepare(self, rows: Rows, slots: int | None = None) -> Prepared:
        """Inputs: pixels float32[t, s, s, 3], all views of all pictures; see `Architecture`."""
        padded = dataclasses.replace(self.images, aspect="pad")
        views: list[np.ndarray] = []
        made: list[tuple[int, list[Run]]] = []  # first view, what is read from there on
        for row in rows:
            lone = sum(not isinstance(each, Video) for each in row) == 1
            for each in row:
                first = len(views)
                if isinstance(each, Video):
                    views += [native.view(image, self.images) for image in each.frames]
                    runs = [self._halved(k) for k in range(len(each.frames))]
                elif lone:
                    grid = tiling.anyres_grid(each.size, self.pinpoints, self.images.size)
                    tiles = tiling.tiles(each, grid, self.images.size)
                    views += [preprocess(view, self.images) for view in tiles]
                    runs = [self.lone(each.size)]
                else:
                    views.append(preprocess(each, padded))
                    runs = [self._view(0)]
                last = [] if lone and not isinstance(each, Video) else [NEWLINE]
                made.append((first, [*runs, *last]))
        count = bucket(len(views)) if slots is None else slots * self._views()
        newline = count * self.side**2  # one row behind all views
        placed = [_moved(Run.join(runs), first * self.side**2, newline) for first, runs in made]
        room = None if slots is None else (slots * self.most * self.side**2, 4)
        inputs = Inputs(stacked(views, count, self.images.size))
        return Prepared(inputs, placed, newline + 1, shared=1, room=room)

    def regions(self, size: Size) -> np.ndarray:
        """See `Architecture.regions`; of a lone picture. Newlines have no place."""
        tile = self.images.size
        grid = tiling.anyres_grid(size, self.pinpoints, tile)
        whole = cells(within(WHOLE, frame(self.images, (tile, tile))), self.side**2)
        across, down = (part * self.side for part in grid)
        rows, cols = tiling.unpad(size, (across, down), self.decimals)
        shown: Box = (
            *(cols.start / across, rows.start / down),
            *(cols.stop / across, rows.stop / down),
        )
        box = within(canvas(size, grid, tile), shown)
        high, wide = self.shrunk((rows.stop - rows.start, cols.stop - cols.start))
        raster = np.array(cut(box, (wide, high))).reshape(high, wide, 4)
        newlines = np.broadcast_to(NOWHERE, (high, 1, 4))
        return np.concatenate([whole, np.concatenate([raster, newlines], axis=1).reshape(-1, 4)])

    def shrunk(self, raster: Size) -> Size:
        """Rows and columns of tokens that are read of a raster's."""
        rows, cols = raster
        ratio = math.sqrt(rows * cols / (self.most * self.side**2))
        return (int(rows // ratio), int(cols // ratio)) if ratio > SHRINK else raster

    def lone(self, size: Size) -> Run:
        """What is read of a lone picture's views: the whole, then the tiles; -1 at newlines."""
        grid = tiling.anyres_grid(size, self.pinpoints, self.images.size)
        return Run.join([self._view(0), self._raster(size, grid)])

    def _view(self, number: int) -> Run:
        return Run.of(number * self.side**2 + np.arange(self.side**2))

    def _halved(self, number: int) -> Run:
        """A frame's tokens, half as many a side, rounded up."""
        half = math.ceil(self.side / 2)
        tokens = number * self.side**2 + np.arange(self.side**2)
        return resized(tokens.reshape(self.side, self.side), (half, half))

    def _raster(self, size: Size, grid: Size) -> Run:
        """The tiles' tokens without padding, perhaps fewer, a newline behind each row."""
        raster = self.side**2 + tiling.raster_indices(grid, self.side)
        raster = raster[tiling.unpad(size, (raster.shape[1], raster.shape[0]), self.decimals)]
        rows, cols = self.shrunk((raster.shape[0], raster.shape[1]))
        made = resized(raster, (rows, cols))
        lines = np.arange(rows * cols).reshape(rows, cols)
        parts = [part for line in lines for part in (made[line], NEWLINE)]
        return Run.join([Run.of(np.zeros(0, np.int64)), *parts])  # a thin picture may have no row


NEWLINE = Run.of(np.array([-1]))
"""The token behind all views, until its number is known."""


def _moved(run: Run, start: int, newline: int) -> Run:
    """A run of a picture's own tokens as the memory has them."""
    return dataclasses.replace(run, indices=np.where(run.indices < 0, newline, start + run.indices))


def resized(raster: np.ndarray, size: Size) -> Run:
    """A raster of tokens in other rows and columns; torch's bilinear, without antialiasing.

    Args:
        raster: int64[h, w].
        size: rows and columns of the result.
    """
    if raster.shape == size:
        return Run.of(raster.ravel())
    (rows, down), (cols, across) = (
        _two(bilinear(old, new)) for old, new in zip(raster.shape, size, strict=True)
    )
    indices = raster[rows[:, None, :, None], cols[None, :, None, :]]
    weights = down[:, None, :, None] * across[None, :, None, :]
    return Run(indices.reshape(-1, 4), weights.reshape(-1, 4))


def _two(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of weights [n, m] the two largest a row, and where they stand: int64[n, 2], float[n, 2]."""
    where = np.argsort(-weights, axis=1, kind="stable")[:, :2]
    if where.shape[1] == 1:
        where = np.repeat(where, 2, axis=1)
        return where, np.stack([weights[:, 0], 0 * weights[:, 0]], axis=1)
    return where, np.take_along_axis(weights, where, axis=1)
