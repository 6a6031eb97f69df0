"""Mini-Gemini: two resolutions and patch info mining.

MGM mgm/model/mgm_arch.py; arXiv 2403.18814, section 3.2. Each token of a low-resolution view asks
the high-resolution pixels of its own cell. The joined ConvNeXt map of an HD picture has 2880 x 384
x 384 values; it is never made: resizing is linear along rows and columns, so each view takes its
part of every stage by its own rows of the weights.
"""

import dataclasses
import math
from collections.abc import Container, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from vfjax.architectures.base import Encoder, Inputs, Size, VisualTokens, all_of, bucket, stacked
from vfjax.architectures.boxes import cells, cut, frame
from vfjax.architectures.combine import Combine
from vfjax.architectures.mlp import MLPConfig, Projecting
from vfjax.architectures.tapped import Shown, Tapped
from vfjax.nn.layers import layer_norm, linear
from vfjax.vision.images import preprocess
from vfjax.vision.resize import bilinear, resized

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class MiningConfig(Projecting):
    """Sizes of the mining and of the projector after it.

    Attributes:
        projector: the MLP that reads mined features.
        combine: what is read of the low-resolution encoder; mining asks with its plain feature.
        width: of the low-resolution encoder.
        aux_width: channels of all stages of the high-resolution encoder.
        grid: views a side that the high-resolution picture is cut into.
        whole: there is one more view, of the whole picture; it comes last in the pixels and first
            in the tokens.
    """

    projector: MLPConfig
    width: int
    aux_width: int
    grid: int = 1
    whole: bool = False
    combine: Combine = Combine()

    @property
    def taps(self) -> dict[str, tuple[int, ...]]:
        """Hidden states that are read of each encoder; of the ConvNeXt, all stages."""
        return super().taps | {"aux": (0, 1, 2, 3)}

    @property
    def channels(self) -> dict[str, tuple[int, int]]:
        """Encoder -> hidden states that are joined on channels, channels of all of them."""
        return super().channels | {"aux": (1, self.aux_width)}

    def build(self, *, rngs: nnx.Rngs) -> "Mining":
        return Mining(self, rngs=rngs)


class Asker(nnx.Module):
    """Layer norm, then a dense layer: [..., din] -> [..., dout]."""

    def __init__(self, din: int, dout: int, *, bias: bool = True, rngs: nnx.Rngs):
        self.norm = layer_norm(din, 1e-5, rngs=rngs)
        self.dense = linear(din, dout, (None, "embed"), bias=bias, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.dense(self.norm(x))


class Mining(nnx.Module):
    """Low-resolution tokens and high-resolution maps -> visual tokens."""

    def __init__(self, config: MiningConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        self.query = Asker(c.width, c.width, rngs=rngs)
        self.key = Asker(c.aux_width, c.width, rngs=rngs)
        self.value = Asker(c.aux_width, c.width, rngs=rngs)
        self.projector = c.projector.build(rngs=rngs)

    def mine(self, tokens: Array, maps: Sequence[Array], weights: Sequence[tuple]) -> Array:
        """What one view finds: [n, s, d] to be added to its tokens.

        Args:
            tokens: [n, s, d] of the view, s a square number.
            maps: stages [n, h, w, c] of the whole picture.
            weights: for each stage, the view's rows [H, h] and columns [W, w] of its resize.
        """
        n, s, d = tokens.shape
        side = math.isqrt(s)
        found = jnp.concatenate([resized(m, *w) for m, w in zip(maps, weights, strict=True)], -1)
        found = standardised(found, self.key.norm.epsilon)
        cell = found.shape[1] // side
        found = found.reshape(n, side, cell, side, cell, -1)
        # Keys and values are dense layers of the pixels. A token's question goes back through the
        # keys' layer, and the mean of what it finds forward through the values': per token, where
        # a key and a value of each pixel would be as many times more as a cell has pixels. What
        # the keys' layer adds to all pixels of a cell alike does not change their shares.
        nothing = jnp.zeros((n, s, found.shape[-1]), found.dtype)
        (asked,) = jax.vjp(self.key.dense, nothing)[1](self.query(tokens))
        asked = (asked * affine(self.key.norm, asked)[0]).reshape(n, side, side, -1)
        scores = jnp.einsum("nyxd,nyaxbd->nyxab", asked, found) / math.sqrt(d)
        shares = jax.nn.softmax(jnp.nan_to_num(scores), axis=(-2, -1))
        mean = jnp.einsum("nyxab,nyaxbd->nyxd", shares, found).reshape(n, s, -1)
        scale, bias = affine(self.value.norm, mean)
        return self.value.dense(mean * scale + bias)

    def __call__(self, states: Mapping[str, Sequence[Array]]) -> VisualTokens:
        """The memory, the whole view of each picture first.

        Args:
            states: "encoder": hidden states [n * views, 1 + s, d] of the low-resolution views,
                picture by picture, the whole one last; "aux": stages [n, h, w, c].

        Returns:
            Tokens [n * views * s, D]; stages vision_features and mined
            [n * views, s, d]; aux_features [n, h, w, c]; connector_features and image_features
            [n, views * s, ...].
        """
        c = self.config
        plain, joined = c.combine(states["encoder"])
        maps = states["aux"]
        n, views = len(maps[0]), c.grid**2 + c.whole
        per_view = plain.reshape(n, views, *plain.shape[1:])
        mined = jnp.stack(
            [self.mine(per_view[:, i], maps, w) for i, w in enumerate(self._weights(maps))], axis=1
        ).reshape(plain.shape)
        features = joined.at[..., : c.width].add(mined)
        features = features.reshape(n, views, *features.shape[1:])
        if c.whole:
            features = jnp.roll(features, 1, axis=1)
        features = features.reshape(n, -1, features.shape[-1])
        stages = {
            "vision_features": plain,
            "mined": mined,
            "aux_features": joined_map(maps),  # of use to comparisons only: dropped if not read
            "connector_features": features,
        }
        return all_of(self.projector(features), stages)

    def _weights(self, maps: Sequence[Array]) -> list[list[tuple[np.ndarray, np.ndarray]]]:
        """For each view and stage the rows and columns of the resize to the first stage's size."""
        side = maps[0].shape[1]
        part = side // self.config.grid
        full = [bilinear(m.shape[1], side) for m in maps]
        cuts = [slice(i * part, (i + 1) * part) for i in range(self.config.grid)]
        views = [[(w[rows], w[cols]) for w in full] for rows in cuts for cols in cuts]
        if self.config.whole:
            shrink = bilinear(side, part)
            views.append([(shrink @ w, shrink @ w) for w in full])
        return views


def standardised(x: Array, eps: float) -> Array:
    """`x` less its mean over the last axis, in units of its deviation; reduced in float32."""
    wide = x.astype(jnp.float32)
    wide -= wide.mean(axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt((wide * wide).mean(axis=-1, keepdims=True) + eps)).astype(x.dtype)


def affine(norm: nnx.LayerNorm, like: Array) -> tuple[Array, Array]:
    """Scale and bias [d] of a layer norm, in the dtype of `like`."""
    assert norm.scale is not None and norm.bias is not None
    return norm.scale[...].astype(like.dtype), norm.bias[...].astype(like.dtype)


def joined_map(maps: Sequence[Array]) -> Array:
    """All stages at the first one's size, [n, h, w, sum of c], of which views take their parts."""
    side = maps[0].shape[1]
    return jnp.concatenate([resized(m, *[bilinear(m.shape[1], side)] * 2) for m in maps], axis=-1)


@dataclasses.dataclass(frozen=True)
class MiniGemini(Tapped):
    """A high-resolution picture, and low-resolution views made of its pixels.

    MGM mgm/model/processor and mgm/model/builder.py: the low one is a plain bilinear resize of the
    normalised high one, not of the photograph.

    Attributes:
        images: of the high-resolution picture, which the second encoder is shown.
        aux: config of the second encoder.
        size: side of a low-resolution view.
    """

    aux: Encoder
    size: int = 336

    @property
    def encoders(self) -> Mapping[str, Encoder]:
        """See `Architecture.encoders`."""
        return {**super().encoders, "aux": self.aux}

    @property
    def views(self) -> int:
        """Low-resolution views of a picture."""
        return self.connector.grid**2 + self.connector.whole

    @property
    def tokens(self) -> int:
        """Tokens of a picture."""
        return self.patches * self.views

    def show(
        self, pictures: Sequence[Image.Image], frames: Container[int] = (), slots: int | None = None
    ) -> Shown:
        """Inputs: of "encoder" float32[n * views, s, s, 3], of "aux" float32[n, S, S, 3]."""
        del frames  # all are whole
        n, each = bucket(len(pictures)) if slots is None else slots, self.tokens
        high = [preprocess(p, self.images) for p in pictures]
        low = [view for picture in high for view in self._low(picture)]
        inputs = Inputs(
            stacked(low, n * self.views, self.size), {"aux": stacked(high, n, self.images.size)}
        )
        return Shown(inputs, [i * each + np.arange(each) for i in range(len(high))], n * each)

    def _low(self, picture: np.ndarray) -> list[np.ndarray]:
        grid = self.connector.grid
        low = shrunk(picture, self.size * grid)
        cuts = [slice(i * self.size, (i + 1) * self.size) for i in range(grid)]
        views = [low[rows, cols] for rows in cuts for cols in cuts]
        return [*views, shrunk(low, self.size)] if self.connector.whole else views

    def regions(self, size: Size) -> np.ndarray:
        """See `Architecture.regions`."""
        grid, seen = self.connector.grid, frame(self.images, size)
        shown = [*([seen] if self.connector.whole else []), *cut(seen, (grid, grid))]
        return np.concatenate([cells(box, self.patches) for box in shown])


def shrunk(picture: np.ndarray, side: int) -> np.ndarray:
    """float32[h, w, c] -> [side, side, c], torch's bilinear without antialiasing.

    Every step is rounded as torch rounds it: pixels are compared to 1e-5.
    """
    rows, cols = (_neighbours(size, side) for size in picture.shape[:2])
    low, high, share = cols
    across = [
        picture[line][:, low] * (1 - share)[:, None] + picture[line][:, high] * share[:, None]
        for line in rows[:2]
    ]
    share = rows[2][:, None, None]
    return across[0] * (1 - share) + across[1] * share


def _neighbours(source: int, target: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each target pixel the two source pixels around it and the second's share, in float32."""
    scale = np.float32(source) / np.float32(target)
    centre = scale * (np.arange(target, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5)
    centre = np.maximum(centre, np.float32(0))
    low = np.minimum(centre.astype(np.int64), source - 1)
    return low, np.minimum(low + 1, source - 1), centre - low.astype(np.float32)
