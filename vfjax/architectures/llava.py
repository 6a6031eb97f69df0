"""LLaVA-1.5 (arXiv 2310.03744): each picture is one view, its tokens projected.

LLaVA llava/model/llava_arch.py. With more layers read it is Dense Connector, see
`vfjax.architectures.dense_connector`.
"""

import dataclasses
from collections.abc import Container, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from vfjax.architectures.base import (
    Inputs,
    PatchEncoder,
    Size,
    VisualTokens,
    all_of,
    bucket,
    stacked,
)
from vfjax.architectures.boxes import cells, frame
from vfjax.architectures.combine import Combine
from vfjax.architectures.mlp import MLPConfig, Projecting
from vfjax.architectures.tapped import Shown, Tapped
from vfjax.nn.layers import param
from vfjax.vision.images import ImageSpec, preprocess

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class ProjectorConfig(Projecting):
    """What is read, how it is joined and projected; `newline` is LLaVA-NeXT's end of a row."""

    projector: MLPConfig
    combine: Combine = Combine()
    newline: bool = False

    def build(self, *, rngs: nnx.Rngs) -> "Projector":
        return Projector(self, rngs=rngs)


class Projector(nnx.Module):
    """Hidden states -> visual tokens."""

    def __init__(self, config: ProjectorConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.projector = config.projector.build(rngs=rngs)
        if config.newline:
            self.newline = param((config.projector.dout,), ("embed",), rngs=rngs)

    def redraw(self, rngs: nnx.Rngs) -> None:
        """The newline as the authors draw it: normal, of deviation 1 / sqrt(width)."""
        if self.config.newline:
            width = self.newline.shape[0]
            self.newline[...] = width**-0.5 * jax.random.normal(rngs.params(), (width,))

    def __call__(self, states: Mapping[str, Sequence[Array]]) -> VisualTokens:
        """The memory, the newline behind it.

        Args:
            states: "encoder": hidden states [n, 1 + s, d] at the taps.

        Returns:
            Tokens [n * s', D]; stages vision_features [n, s, d], connector_features [n, s', d'],
            image_features [n, s', D].
        """
        plain, joined = self.config.combine(states["encoder"])
        stages = {"vision_features": plain, "connector_features": joined}
        memory = all_of(self.projector(joined), stages)
        if not self.config.newline:
            return memory
        newline = self.newline[...][None].astype(memory.values.dtype)
        return dataclasses.replace(
            memory,
            values=jnp.concatenate([memory.values, newline]),
            keep=jnp.ones(len(memory.keep) + 1, bool),
        )


@dataclasses.dataclass(frozen=True)
class Llava(Tapped):
    """Each picture is one view."""

    @property
    def tokens(self) -> int:
        """Tokens of a picture."""
        return self.connector.combine.tokens(self.patches)

    def show(
        self, pictures: Sequence[Image.Image], frames: Container[int] = (), slots: int | None = None
    ) -> Shown:
        """Inputs: pixels float32[n, s, s, 3]; see `Tapped.show`."""
        del frames  # all are whole
        n, tokens = bucket(len(pictures)) if slots is None else slots, self.tokens
        indices = [i * tokens + np.arange(tokens) for i in range(len(pictures))]
        return Shown(Inputs(whole(pictures, self.images, n)), indices, n * tokens)

    def regions(self, size: Size) -> np.ndarray:
        """See `Architecture.regions`."""
        return whole_regions(self.encoder, self.images, self.tokens, size)


def whole(pictures: Sequence[Image.Image], images: ImageSpec, count: int) -> np.ndarray:
    """Each picture as one view, float32[count, s, s, 3]."""
    return stacked([preprocess(p, images) for p in pictures], count, images.size)


def whole_regions(encoder: PatchEncoder, images: ImageSpec, tokens: int, size: Size) -> np.ndarray:
    """Boxes of a whole picture's tokens, see `Architecture.regions`.

    Tokens before the patches (class, registers), if they are read, and those behind (Dense
    Connector's pooled ones) have no place.
    """
    seen, prefix = frame(images, size), encoder.prefix
    if tokens == prefix + encoder.tokens:
        return np.concatenate([np.full((prefix, 4), np.nan), cells(seen, encoder.tokens)])
    return cells(seen, tokens, encoder.tokens)
