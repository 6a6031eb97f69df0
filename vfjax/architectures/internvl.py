"""InternVL 1.5 to 3.5 (arXiv 2404.16821, 2412.05271): tiles and a thumbnail, patches shuffled.

A picture is stretched over the grid of tiles whose aspect is nearest to its own; in the text its
tokens stand in `<img>...</img>`. A video's frames are one tile each, after their number. InternVL
internvl_chat/internvl/model/internvl_chat/modeling_internvl_chat.py, .../train/dataset.py; its
README.md for videos; transformers' InternVL computes the same.
"""

import dataclasses
import math

import jax
import numpy as np
from flax import nnx

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
from vfjax.architectures.boxes import NOWHERE, WHOLE, cells, cut, frame
from vfjax.architectures.pixel_shuffle import PixelShuffleConfig
from vfjax.vision import native, tiling
from vfjax.vision.images import ImageSpec, preprocess
from vfjax.vision.video import Video

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class InternVL(OneEncoder):
    """Several pictures of a row are each tiled; `Video.pool` is not read.

    Attributes:
        encoder: config of the encoder.
        connector: config of the connector.
        images: of each tile.
        least: tiles of a picture.
        most: tiles of a picture, without the thumbnail.
        thumbnail: whether the whole picture follows its tiles, if there are several.
        ordered: of grids equally near, see `vfjax.vision.tiling.tile_grids`.
        words: what stands before and behind a picture's tokens, each a token.
    """

    encoder: PatchEncoder
    connector: PixelShuffleConfig
    images: ImageSpec
    least: int = 1
    most: int = 12
    thumbnail: bool = True
    ordered: bool = True
    words: tuple[str, str] = ("<img>", "</img>")

    @property
    def side(self) -> int:
        """Tokens a side of a tile."""
        return math.isqrt(self.encoder.tokens) // self.connector.factor

    @property
    def views(self) -> int:
        """Tiles of a picture, at most, the thumbnail included."""
        return self.most + (self.thumbnail and self.most > 1)

    @property
    def tokens(self) -> int:
        """Tokens of a picture, at most, marks included."""
        return self.views * self.side**2 + 2

    def grid(self, size: Size) -> Size:
        """The tiles of a picture of `size` pixels, as columns and rows."""
        grids = tiling.tile_grids(self.least, self.most, self.ordered)
        return tiling.nearest_grid(size, grids, self.images.size)

    def prepare(self, rows: Rows, slots: int | None = None) -> Prepared:
        """Inputs: pixels float32[t, s, s, 3], all tiles; see `Architecture.prepare`."""
        (start, end), tile, each_has = self.words, self.images.size, self.side**2
        views: list[np.ndarray] = []
        runs = []
        for each in (each for row in rows for each in row):
            first = len(views) * each_has
            parts: list[str | np.ndarray] = [start]
            if isinstance(each, Video):
                shown = list(each.frames)
                for i in range(len(shown)):
                    before = f"{end}\n" if i else ""
                    tokens = first + i * each_has + np.arange(each_has)
                    parts[-1:] = [f"{before}Frame{i + 1}: {start}", tokens, end]
            else:
                grid = self.grid(each.size)
                shown = tiling.grid_tiles(each, grid, tile, thumbnail=self.thumbnail)
                parts += [first + np.arange(len(shown) * each_has), end]
            view = native.view if isinstance(each, Video) else preprocess
            views += [view(image, self.images) for image in shown]
            runs.append(Run.interleaved(parts))
        count = bucket(len(views)) if slots is None else slots * self.views
        inputs = Inputs(stacked(views, count, tile))
        return Prepared(inputs, runs, count * each_has)

    def regions(self, size: Size) -> np.ndarray:
        """See `Architecture.regions`; marks have no place."""
        grid = self.grid(size)
        seen = cut(WHOLE, grid)
        if grid == (1, 1):  # which may be padded
            seen = [frame(self.images, size)]
        elif self.thumbnail:
            seen = [*seen, WHOLE]
        side = self.side
        boxes = np.concatenate([cells(box, side**2).reshape(1, side, side, 4) for box in seen])
        if self.connector.transposed:
            boxes = boxes.swapaxes(1, 2)
        return np.concatenate([NOWHERE, boxes.reshape(-1, 4), NOWHERE])

    def build(self, *, rngs: nnx.Rngs) -> Branch:
        return Branch(self, rngs=rngs)
