"""InternVL 1.5 to 3.5 (arXiv 2404.16821, 2412.05271): tiles and a thumbnail, patches shuffled.

A picture is stretched over the grid of tiles whose aspect is nearest to its own; in the text its
tokens stand in `<img>...</img>`. A video's frames are one tile each, after their number. InternVL
internvl_chat/internvl/model/internvl_chat/modeling_internvl_chat.py, .../train/dataset.py; its
README.md for videos; transformers' InternVL computes the same.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import jax
import numpy as np
from flax import nnx

from vfjax.architectures.base import (
    Branch,
    Encoder,
    Inputs,
    PatchEncoder,
    Prepared,
    Rows,
    Run,
    Size,
    VisualTokens,
    all_of,
    bucket,
    stacked,
)
from vfjax.architectures.boxes import NOWHERE, WHOLE, cells, cut, frame
from vfjax.architectures.combine import Combine
from vfjax.architectures.idefics import joined_patches
from vfjax.architectures.mlp import MLPConfig, Projecting
from vfjax.nn.layers import layer_norm
from vfjax.vision import tiling
from vfjax.vision.images import ImageSpec, preprocess
from vfjax.vision.video import Video

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class NormedShuffleConfig(Projecting):
    """Each block of `factor` x `factor` patches becomes a token, which is normed and projected.

    Attributes:
        projector: reads the channels of a block.
        combine: the hidden state that is read, without the class token.
        factor: patches a side, 1 / `downsample_ratio`.
        transposed: rows and columns of tokens are exchanged, as by the authors' `ps_version` "v1".
    """

    projector: MLPConfig
    combine: Combine = Combine(((-1,),))
    factor: int = 2
    transposed: bool = False

    @property
    def channels(self) -> dict[str, tuple[int, int]]:
        """See `Connector`; channels of one patch."""
        return {"encoder": (1, self.projector.din // self.factor**2)}

    def build(self, *, rngs: nnx.Rngs) -> "NormedShuffle":
        return NormedShuffle(self, rngs=rngs)


class NormedShuffle(nnx.Module):
    """Hidden states -> visual tokens."""

    def __init__(self, config: NormedShuffleConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.norm = layer_norm(config.projector.din, 1e-5, rngs=rngs)
        self.projector = config.projector.build(rngs=rngs)

    def __call__(self, states: Mapping[str, Sequence[Array]]) -> VisualTokens:
        """The memory.

        Args:
            states: "encoder": hidden states [n, 1 + s, d] at the tap.

        Returns:
            Tokens [n * s', D], s' = s / factor^2; stages vision_features [n, s, d],
            connector_features [n, s', d * factor^2], image_features [n, s', D].
        """
        c = self.config
        plain, _ = c.combine(states["encoder"])
        blocks = joined_patches(plain, c.factor)
        if c.transposed:
            n, tokens, d = blocks.shape
            side = math.isqrt(tokens)
            blocks = blocks.reshape(n, side, side, d).swapaxes(1, 2).reshape(n, tokens, d)
        stages = {"vision_features": plain, "connector_features": blocks}
        return all_of(self.projector(self.norm(blocks)), stages)


@dataclasses.dataclass(frozen=True)
class InternVL:
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
    connector: NormedShuffleConfig
    images: ImageSpec
    least: int = 1
    most: int = 12
    thumbnail: bool = True
    ordered: bool = True
    words: tuple[str, str] = ("<img>", "</img>")

    reads_text: ClassVar[bool] = False
    axes: ClassVar[int] = 1
    placeholders: ClassVar[tuple[int, ...]] = ()

    @property
    def encoders(self) -> Mapping[str, Encoder]:
        """See `Architecture.encoders`."""
        return {"encoder": self.encoder}

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
            views += [preprocess(view, self.images) for view in shown]
            runs.append(_read(parts))
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


def _read(parts: Sequence[str | np.ndarray]) -> Run:
    """Words, and tokens as the memory has them, one after another."""
    words, marks, indices = list[str](), [], []
    for part in parts:
        said = isinstance(part, str)
        indices.append(np.zeros(1, np.int64) if isinstance(part, str) else part)
        marks.append(np.full(len(indices[-1]), -2 - len(words) if said else -1))
        words += [part] if isinstance(part, str) else []
    return Run(np.concatenate(indices)[:, None], marks=np.concatenate(marks), words=tuple(words))
