"""Ovis2 (arXiv 2405.20797): tiles whose tokens are spread over a visual vocabulary.

Blocks of patches become shares of the rows of a table, the visual words; the last rows are marks,
which stand before a picture, behind its whole, between its tiles and behind it. A picture is
stretched over a grid of tiles; the whole stands first. transformers' Ovis2: model, image processor,
processor. It reads no videos: here a video's frames are pictures of one view, each on a line, as
the authors' examples have them.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vfjax.architectures.base import (
    Embed,
    Encoded,
    Inputs,
    OneEncoder,
    PatchEncoder,
    Prepared,
    Prompt,
    Rows,
    Run,
    Size,
    VisualTokens,
    all_of,
    bucket,
    stacked,
)
from vfjax.architectures.boxes import NOWHERE, WHOLE, cells, cut
from vfjax.architectures.idefics import IdeficsBranch
from vfjax.architectures.pixel_shuffle import joined_patches
from vfjax.nn.layers import layer_norm, linear, param
from vfjax.vision import tiling
from vfjax.vision.images import ImageSpec, preprocess
from vfjax.vision.video import Video

Array = jax.Array

Choice = Literal["softmax", "st_argmax", "gumbel_argmax"]
"""How a token's words are chosen (`tokenize_function`): all by their shares; the likeliest; or one
that is drawn, as transformers does at every call. Without a key of random numbers that is the
likeliest, too."""


@dataclasses.dataclass(frozen=True)
class VocabularyConfig:
    """A head over visual words, and their table.

    Attributes:
        din: channels of a block of patches.
        dout: the LLM's width.
        words: rows of the table.
        marks: how many of them, the last ones, are marks.
        stride: patches a side of a block.
        choice: see `Choice`.
    """

    din: int
    dout: int
    words: int = 16384
    marks: int = 5
    stride: int = 1
    choice: Choice = "softmax"

    @property
    def taps(self) -> dict[str, tuple[int, ...]]:
        """The last hidden state."""
        return {"encoder": (-1,)}

    @property
    def channels(self) -> dict[str, tuple[int, int]]:
        """See `vfjax.architectures.base.Connector`."""
        return {"encoder": (self.stride**2, self.din)}

    def build(self, *, rngs: nnx.Rngs) -> "Vocabulary":
        return Vocabulary(self, rngs=rngs)


class Vocabulary(nnx.Module):
    """The last hidden state -> visual tokens."""

    def __init__(self, config: VocabularyConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        words = c.words - c.marks
        self.head = linear(c.din, words, ("embed", None), bias=False, rngs=rngs)
        self.norm = layer_norm(words, 1e-5, rngs=rngs)
        self.table = param((c.words, c.dout), (None, "embed"), rngs=rngs)

    def __call__(
        self, states: Mapping[str, Sequence[Array]], key: Array | None = None
    ) -> VisualTokens:
        """A memory of all views' tokens, the marks behind them.

        Args:
            states: "encoder": one hidden state [n, s * s, d].
            key: of the draws of "gumbel_argmax".

        Returns:
            Tokens [n * (s / r)^2 + marks, D]; stages vision_features [n, s * s, d],
            connector_features (shares of the words) [n, (s / r)^2, words - marks],
            image_features [n, (s / r)^2, D].
        """
        (plain,) = states["encoder"]
        logits = self.norm(self.head(joined_patches(plain, self.config.stride)))
        shares = self.shares(logits, key)
        table = self.table[...].astype(shares.dtype)
        words = self.config.words - self.config.marks
        stages = {"vision_features": plain, "connector_features": shares}
        memory = all_of(shares @ table[:words], stages)
        return dataclasses.replace(
            memory,
            values=jnp.concatenate([memory.values, table[words:]]),
            keep=jnp.ones(len(memory.keep) + self.config.marks, bool),
        )

    def shares(self, logits: Array, key: Array | None = None) -> Array:
        """What each word has of a token, [..., words]; derivatives are softmax's in any case."""
        scores = logits.astype(jnp.float32)
        if self.config.choice == "gumbel_argmax" and key is not None:
            scores += jax.random.gumbel(key, scores.shape)
        soft = jax.nn.softmax(scores, axis=-1)
        if self.config.choice != "softmax":
            hard = jax.nn.one_hot(scores.argmax(axis=-1), soft.shape[-1])
            soft = hard + (soft - jax.lax.stop_gradient(soft))
        return soft.astype(logits.dtype)


@dataclasses.dataclass(frozen=True)
class Ovis2(OneEncoder):
    """Several pictures of a row are each tiled; `Video.pool` is not read.

    Attributes:
        encoder: config of the encoder.
        connector: config of the connector.
        images: of each view.
        least: tiles of a picture, where the grid is the nearest one.
        most: tiles of a picture, without the whole; 1: it is one view.
        covering: the grid is `vfjax.vision.tiling.covering_grid`, else `nearest_grid`.
        marks: which of the connector's marks stand before a picture, behind its whole, between
            columns, between rows, and behind it.
    """

    encoder: PatchEncoder
    connector: VocabularyConfig
    images: ImageSpec
    least: int = 1
    most: int = 12
    covering: bool = True
    marks: tuple[int, int, int, int, int] = (0, 1, 2, 3, 4)

    @property
    def side(self) -> int:
        """Tokens a side of a view."""
        return math.isqrt(self.encoder.tokens) // self.connector.stride

    @property
    def views(self) -> int:
        """Views of a picture, at most."""
        return self.most + (self.most > 1)

    @property
    def tokens(self) -> int:
        """Tokens of a picture, at most, marks included."""
        return len(self.run((self.most, 1)))

    def grid(self, size: Size) -> Size:
        """The tiles of a picture of `size` pixels, as columns and rows."""
        if self.most == 1:
            return 1, 1
        if self.covering:
            return tiling.covering_grid(size, self.images.size, self.most)
        grids = tiling.tile_grids(self.least, self.most, True)
        return tiling.nearest_grid(size, grids, self.images.size)

    def prepare(self, rows: Rows, slots: int | None = None) -> Prepared:
        """Inputs: pixels float32[t, s, s, 3], all views of all pictures; see `Architecture`."""
        tile, each_has = self.images.size, self.side**2
        views: list[np.ndarray] = []
        made: list[tuple[int, Run]] = []  # first view, what is read from there on
        for each in (media for row in rows for media in row):
            first = len(views)
            if isinstance(each, Video):
                shown, run = list(each.frames), self.film(len(each.frames))
            else:
                grid = self.grid(each.size)
                *tiles, whole = tiling.grid_tiles(each, grid, tile, thumbnail=True)
                shown, run = [whole, *tiles], self.run(grid)
            views += [preprocess(view, self.images) for view in shown]
            made.append((first, run))
        count = bucket(len(views)) if slots is None else slots * self.views
        marks = self.connector.marks
        size = count * each_has + marks
        runs = [
            dataclasses.replace(
                run,
                indices=np.where(
                    run.indices < 0, size + run.indices, first * each_has + run.indices
                ),
            )
            for first, run in made
        ]
        return Prepared(Inputs(stacked(views, count, tile)), runs, size, shared=marks)

    def regions(self, size: Size) -> np.ndarray:
        """See `Architecture.regions`; marks have no place."""
        grid = self.grid(size)
        seen = [WHOLE, *(cut(WHOLE, grid) if grid != (1, 1) else ())]
        boxes = [cells(box, self.side**2) for box in seen]
        indices = self.run(grid).indices[:, 0]
        return np.where(
            indices[:, None] < 0, NOWHERE, np.concatenate(boxes)[np.maximum(indices, 0)]
        )

    def run(self, grid: Size) -> Run:
        """A picture's tokens, its own views' from 0 on, marks by their places from the end."""
        cols, rows = grid
        start, whole, column, row, end = self._marks()
        parts = [start, self._view(0), whole]
        for i in range(rows if grid != (1, 1) else 0):
            for j in range(cols):
                parts += [self._view(1 + i * cols + j), column if j + 1 < cols else row]
        return Run.of(np.concatenate([*parts[: -1 if grid != (1, 1) else None], end]))

    def film(self, frames: int) -> Run:
        """A video's tokens, a newline between frames."""
        start, whole, _, _, end = self._marks()
        parts = [("\n", start, self._view(k), whole, end) for k in range(frames)]
        return Run.interleaved([part for frame in parts for part in frame][1:])

    def _view(self, number: int) -> np.ndarray:
        return number * self.side**2 + np.arange(self.side**2)

    def _marks(self) -> list[np.ndarray]:
        return [np.array([i - self.connector.marks]) for i in self.marks]

    def build(self, *, rngs: nnx.Rngs) -> "Ovis2Branch":
        return Ovis2Branch(self, rngs=rngs)


class Ovis2Branch(IdeficsBranch):
    """The connector reads the last hidden state behind the encoder's last norm, and draws."""

    def visual_tokens(
        self,
        encoded: Encoded,
        embed: Embed,
        *,
        prompt: Prompt | None = None,
        key: Array | None = None,
    ) -> VisualTokens:
        """See `Branch.visual_tokens`."""
        del embed, prompt
        return self.connector(encoded.states, key)
