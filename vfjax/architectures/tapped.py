"""What the families share whose encoders are tapped: one kind of views, and videos as pictures."""

import abc
import dataclasses
from collections.abc import Container, Sequence
from typing import Any

import numpy as np
from flax import nnx
from PIL import Image

from vfjax.architectures.base import (
    Branch,
    Inputs,
    Media,
    OneEncoder,
    PatchEncoder,
    Prepared,
    Rows,
    Run,
    Size,
)
from vfjax.vision.images import ImageSpec
from vfjax.vision.video import Video


@dataclasses.dataclass(frozen=True)
class Shown:
    """What a family shows of pictures and frames, all alike.

    Attributes:
        inputs: arrays of static shape.
        indices: for each, int64[k] its tokens.
        size: tokens in the branch's memory.
        shared: of these, the last ones, which belong to no picture.
    """

    inputs: Inputs
    indices: list[np.ndarray]
    size: int
    shared: int = 0


@dataclasses.dataclass(frozen=True)
class Tapped(OneEncoder, abc.ABC):
    """An `Architecture` with videos read as pictures, their tokens pooled by `Video.pool`.

    Zero-shot video of Dense Connector (DenseConnector llava/eval/video): of frames only the whole
    is shown, padded to a square where a tiled picture would be squashed. A family adds `tokens`,
    `show` and `regions`.

    Attributes:
        encoder: config of the encoder.
        connector: config of the connector.
        images: of each view.
    """

    encoder: PatchEncoder
    connector: Any  # each family reads its own config of one
    images: ImageSpec

    @property
    def patches(self) -> int:
        """Tokens of a view in a hidden state, without those that the connector leaves out."""
        return self.encoder.prefix + self.encoder.tokens - self.connector.combine.drop

    @property
    @abc.abstractmethod
    def tokens(self) -> int:
        """Tokens of a picture, at most."""

    @abc.abstractmethod
    def show(
        self, pictures: Sequence[Image.Image], frames: Container[int] = (), slots: int | None = None
    ) -> Shown:
        """Inputs of pictures and frames, and the tokens of each.

        Args:
            pictures: RGB.
            frames: numbers of those that are frames of a video.
            slots: see `Architecture.prepare`.
        """

    @abc.abstractmethod
    def regions(self, size: Size) -> np.ndarray:
        """See `Architecture.regions`."""

    def prepare(self, rows: Rows, slots: int | None = None) -> Prepared:
        """See `Architecture.prepare`."""
        media = [each for row in rows for each in row]
        pictures = [frame for each in media for frame in frames_of(each)]
        owners = [each for each in media for _ in frames_of(each)]
        frames = {k for k, each in enumerate(owners) if isinstance(each, Video)}
        shown = self.show(pictures, frames, slots)
        rest = iter(shown.indices)
        runs = [
            Run.pooled([next(rest) for _ in each.frames], each.pool)
            if isinstance(each, Video)
            else Run.of(next(rest))
            for each in media
        ]
        return Prepared(shown.inputs, runs, shown.size, shown.shared)

    def build(self, *, rngs: nnx.Rngs) -> Branch:
        return Branch(self, rngs=rngs)


def frames_of(media: Media) -> tuple[Image.Image, ...]:
    """The frames of a video; a picture itself."""
    return media.frames if isinstance(media, Video) else (media,)
