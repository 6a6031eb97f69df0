"""Cambrian-1: several towers, read by a Spatial Vision Aggregator (arXiv 2406.16860, section 4).

Cambrian cambrian/model/cambrian_arch.py and vision_sampler.py, as they run on GPUs (on TPUs, where
the models were trained, padding was kept). Each query asks the towers' features of its own cell of
the picture: before the LLM a learned query, and behind some of the LLM's layers the visual token
that stands there, as far as the LLM has brought it. The latter samplers belong to the branch: in a
fusion they read the merged LLM's hidden states at the branch's own tokens, after the layers of the
same numbers, and no other branch's tokens or text.

The authors' code takes the tokens for such questions from one place of the row
(`image_position`), where the published prompts have the picture; here they are where it stands.
"""

import dataclasses
import math
from collections.abc import Container, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from vfjax.architectures.base import (
    AnyArray,
    Branch,
    Embed,
    Encoded,
    Encoder,
    Inputs,
    Prepared,
    Prompt,
    Rows,
    Size,
    VisualTokens,
    all_of,
    bucket,
)
from vfjax.architectures.boxes import NOWHERE, cells, frame
from vfjax.architectures.llava import whole
from vfjax.architectures.mini_gemini import Asker
from vfjax.architectures.mlp import MLPConfig
from vfjax.architectures.tapped import Shown, Tapped
from vfjax.errors import InputError
from vfjax.nn.layers import attention, layer_norm, linear, param
from vfjax.vision.images import ImageSpec
from vfjax.vision.resize import bilinear, resized
from vfjax.vision.tiling import unpad
from vfjax.vision.video import Video

Array = jax.Array

HEADS = 16
"""Of all samplers."""


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """What is read of one tower.

    Attributes:
        width: channels of its feature, of all taps together.
        side: tokens a side that the feature is resized to.
        taps: hidden states; of a ConvNeXt, stages. Several are joined on channels.
        norm: the tower's final norm is applied to them.
        drop: leading tokens (class, registers) that are left out.
    """

    width: int
    side: int
    taps: tuple[int, ...]
    norm: bool = False
    drop: int = 0


@dataclasses.dataclass(frozen=True)
class SVAConfig:
    """The aggregator.

    Attributes:
        towers: in order; the first one's mean is the context of all questions.
        dout: the LLM's width.
        width: channels of features and queries.
        side: visual tokens a side.
        queries: queries a side, of each group of them.
        depth: samplers one after another before the LLM.
        layers: of the LLM after which there is one more each; none: the connector alone.
    """

    towers: tuple[TowerConfig, ...]
    dout: int
    width: int = 1024
    side: int = 24
    queries: tuple[int, ...] = (24,)
    depth: int = 3
    layers: tuple[int, ...] = ()

    act = "gelu"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the encoders, in the order of `towers`."""
        return names(len(self.towers))

    @property
    def taps(self) -> dict[str, tuple[int, ...]]:
        """Hidden states that are read of each encoder."""
        return {name: each.taps for name, each in zip(self.names, self.towers, strict=True)}

    @property
    def channels(self) -> dict[str, tuple[int, int]]:
        """Encoder -> hidden states that are joined on channels, channels of all of them."""
        return {name: (1, each.width) for name, each in zip(self.names, self.towers, strict=True)}

    def cell(self, side: int) -> tuple[int, ...]:
        """Tokens a side of each tower in the cell of one of `side` x `side` queries."""
        return tuple(tower.side // side for tower in self.towers)

    def build(self, *, rngs: nnx.Rngs) -> "SVA":
        return SVA(self, rngs=rngs)


def names(count: int) -> tuple[str, ...]:
    """Names of as many encoders; the authors number what stands behind each so, too."""
    return ("encoder", *(f"aux_{i}" for i in range(1, count)))


class Feature(nnx.Module):
    """One tower's feature in the aggregator's width: [n, s, d] -> [n, s, width]."""

    def __init__(self, din: int, width: int, *, rngs: nnx.Rngs):
        self.fc1 = linear(din, width, (None, "mlp"), rngs=rngs)
        self.fc2 = linear(width, width, ("mlp", "embed"), rngs=rngs)
        self.norm = layer_norm(width, 1e-5, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.norm(self.fc2(jax.nn.gelu(self.fc1(x), approximate=False)))


class Sampler(nnx.Module):
    """One cross-attention of queries [m, q] to the features of their cells (equation 1)."""

    def __init__(self, config: SVAConfig, q: int, side: int, *, rngs: nnx.Rngs):
        d = config.width

        def plain(din: int, dout: int) -> nnx.Linear:
            return linear(din, dout, (None, "embed"), bias=False, rngs=rngs)

        self.context, self.enter = plain(d, d), plain(q + d, d)
        self.fc1, self.fc2 = plain(d, d), plain(d, q)
        self.norm = layer_norm(d, 1e-5, rngs=rngs)
        count = len(config.towers)
        self.query = Asker(d, d, bias=False, rngs=rngs)
        self.key = nnx.List(Asker(d, d, bias=False, rngs=rngs) for _ in range(count))
        self.value = nnx.List(Asker(d, d, bias=False, rngs=rngs) for _ in range(count))
        self.out = plain(d, d)
        sides = enumerate(config.cell(side))
        self.pos = nnx.Dict(
            {str(i): param((k * k, d), (None, "embed"), rngs=rngs) for i, k in sides if k > 1}
        )

    def __call__(
        self, queries: Array, context: Array, features: Sequence[Array], mask: Array
    ) -> Array:
        """What is added to the queries, [m, q].

        Args:
            queries: [m, q].
            context: [m, width].
            features: of each tower [m, k * k, width], those of the query's cell.
            mask: bool[m, s], which of all of them show the picture.
        """
        asked = jnp.concatenate([queries, self.context(context).astype(queries.dtype)], axis=-1)
        x = self.enter(asked)
        placed = [
            f + self.pos[str(i)][...].astype(f.dtype) if str(i) in self.pos else f
            for i, f in enumerate(features)
        ]
        keys, values = (
            jnp.concatenate([one(f) for one, f in zip(each, placed, strict=True)], axis=1)
            for each in (self.key, self.value)
        )
        q, k, v = (
            y.reshape(len(x), -1, HEADS, x.shape[-1] // HEADS)
            for y in (self.query(x), keys, values)
        )
        found = attention(q, k, v, mask[:, None]).reshape(x.shape)
        x = self.norm(x + self.out(found))
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class SVA(nnx.Module):
    """Features of all towers -> visual tokens, and what these may ask for within the LLM."""

    def __init__(self, config: SVAConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        self.feature = nnx.List(Feature(t.width, c.width, rngs=rngs) for t in c.towers)
        self.query = param((len(c.queries), c.width), (None, "embed"), rngs=rngs)
        self.sampler = nnx.List(
            nnx.List(Sampler(c, c.width, side, rngs=rngs) for _ in range(c.depth))
            for side in c.queries
        )
        self.projector = MLPConfig(c.width * len(c.queries), c.dout).build(rngs=rngs)
        self.newline = param((c.dout,), ("embed",), rngs=rngs)
        self.within = nnx.List(Sampler(c, c.dout, c.side, rngs=rngs) for _ in c.layers)

    def __call__(
        self, states: Mapping[str, Sequence[Array]], masks: Mapping[str, Array]
    ) -> VisualTokens:
        """The memory, the newline behind it.

        Args:
            states: encoder -> hidden states at its taps.
            masks: encoder -> bool[n, side, side], where its feature shows the picture.

        Returns:
            Tokens [n * side * side + 1, D]; stages vision_features_I and projected_I of each tower
            I, sva_G of each group of queries G, and image_features.
        """
        c, stages = self.config, dict[str, Array]()
        features = []
        for i, (name, tower) in enumerate(zip(c.names, c.towers, strict=True)):
            plain = raster(states[name], tower)
            seen = self.feature[i](plain.astype(self.query.dtype))
            stages |= {f"vision_features_{i}": plain, f"projected_{i}": seen}
            features.append(seen)
        n, context = len(features[0]), features[0].mean(axis=1)
        shown = [masks[name] for name in c.names]
        found = []
        for g, side in enumerate(c.queries):
            count = n * side * side
            cells, mask = _cells(features, side), _mask(shown, side)
            x = jnp.broadcast_to(self.query[g], (count, c.width))
            for sampler in self.sampler[g]:
                x = x + sampler(x, jnp.repeat(context, side * side, axis=0), cells, mask)
            x = x.reshape(n, side, side, c.width)
            stages[f"sva_{g}"] = x.reshape(n, side * side, c.width)
            if side != c.side:
                x = resized(x, *[bilinear(side, c.side)] * 2)
            found.append(x.reshape(n, c.side**2, c.width))
        memory = all_of(self.projector(jnp.concatenate(found, axis=-1)), stages)
        own = None
        if c.layers:
            every = jnp.repeat(context, c.side**2, axis=0)
            own = (every, _mask(shown, c.side), *_cells(features, c.side))
        newline = self.newline[...][None].astype(memory.values.dtype)
        return dataclasses.replace(
            memory,
            values=jnp.concatenate([memory.values, newline]),
            keep=jnp.ones(len(memory.keep) + 1, bool),
            seen=own,
        )


def raster(states: Sequence[Array], tower: TowerConfig) -> Array:
    """A tower's feature [n, side * side, width]: its states, resized each and joined."""
    found = []
    for x in states:
        if x.ndim == 3:
            x = x[:, tower.drop :]
            x = x.reshape(len(x), math.isqrt(x.shape[1]), -1, x.shape[-1])
        found.append(x if x.shape[1] == tower.side else resized(x, *_steps(x.shape[1], tower.side)))
    return jnp.concatenate(found, axis=-1).reshape(len(found[0]), tower.side**2, -1)


def _steps(source: int, target: int) -> tuple[np.ndarray, np.ndarray]:
    steps = bilinear(source, target)
    return steps, steps


def _cut(x: Array, side: int) -> Array:
    """[n, s * s, ...] of a raster -> [n * side * side, k * k, ...], the tokens of each cell."""
    s = math.isqrt(x.shape[1])
    x = x.reshape(len(x), side, s // side, side, s // side, *x.shape[2:]).swapaxes(2, 3)
    return x.reshape(len(x) * side * side, (s // side) ** 2, *x.shape[5:])


def _cells(features: Sequence[Array], side: int) -> tuple[Array, ...]:
    return tuple(_cut(each, side) for each in features)


def _mask(shown: Sequence[Array], side: int) -> Array:
    """bool[n * side * side, s]; a tower is seen whole in a cell where nothing shows the picture."""
    cut = [_cut(each.reshape(len(each), -1), side) for each in shown]
    return jnp.concatenate([x | ~x.any(axis=1, keepdims=True) for x in cut], axis=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Padded(Inputs):
    """Pictures on squares.

    Attributes:
        masks: encoder -> bool[n, side, side], where its feature shows the picture.
    """

    masks: Mapping[str, AnyArray] = dataclasses.field(kw_only=True)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EncodedPadded(Encoded):
    """Hidden states of `Padded`."""

    masks: Mapping[str, AnyArray]


class CambrianBranch(Branch):
    """Some towers end in their norm; tokens ask for more within the LLM."""

    def encode(self, inputs: Padded) -> EncodedPadded:  # type: ignore[override]
        """See `Branch.encode`."""
        c: SVAConfig = self.config.connector  # type: ignore[assignment]
        shown = {"encoder": inputs.pixels, **inputs.others}
        states = {}
        for name, tower in zip(c.names, c.towers, strict=True):
            more = {"norm": True} if tower.norm else {}
            states[name] = list(getattr(self, name)(jnp.asarray(shown[name]), tower.taps, **more))
        return EncodedPadded(states, inputs.masks)

    def visual_tokens(  # type: ignore[override]
        self,
        encoded: EncodedPadded,
        embed: Embed,
        *,
        prompt: Prompt | None = None,
        key: Array | None = None,
    ) -> VisualTokens:
        """See `Branch.visual_tokens`."""
        del embed, prompt, key
        masks = {name: jnp.asarray(mask) for name, mask in encoded.masks.items()}
        return self.connector(encoded.states, masks)

    @property
    def layers(self) -> tuple[int, ...]:
        """See `Branch.layers`."""
        return self.connector.config.layers

    def within(self, layer: int, x: Array, seen: tuple[Array, ...]) -> Array:
        """See `Branch.within`."""
        context, mask, *cells = seen
        return self.connector.within[self.layers.index(layer)](x, context, cells, mask)


@dataclasses.dataclass(frozen=True)
class Cambrian(Tapped):
    """Each picture is one square for each tower; tokens of its padding are left out.

    Attributes:
        images: for the first encoder.
        others: configs of the other encoders.
        shown: how pictures are prepared for each of these.
    """

    others: tuple[Encoder, ...] = ()
    shown: tuple[ImageSpec, ...] = ()

    @property
    def encoders(self) -> Mapping[str, Encoder]:
        """See `Architecture.encoders`."""
        return dict(zip(self.connector.names, (self.encoder, *self.others), strict=True))

    @property
    def tokens(self) -> int:
        """Tokens of a picture, at most: rows, each with its end."""
        return self.connector.side * (self.connector.side + 1)

    def prepare(self, rows: Rows, slots: int | None = None) -> Prepared:
        """See `Architecture.prepare`.

        Raises:
            InputError: a video whose tokens are pooled, where the LLM asks about each.
        """
        videos = [each for row in rows for each in row if isinstance(each, Video)]
        if self.connector.layers and any(video.pool > 1 for video in videos):
            raise InputError(
                "video",
                found="visual tokens that are pooled",
                expected="all of them, which ask for more of the picture within the LLM",
                fix="open it with pool=1",
            )
        return super().prepare(rows, slots)

    def show(
        self, pictures: Sequence[Image.Image], frames: Container[int] = (), slots: int | None = None
    ) -> Shown:
        """Inputs: a square for each tower, and masks; of frames all tokens are read, no row's end.

        Raises:
            InputError: a picture that is thinner than a token.
        """
        n, side = bucket(len(pictures)) if slots is None else slots, self.connector.side
        first, *others = self.connector.names
        pixels = {
            name: whole(pictures, spec, n) for name, spec in zip(others, self.shown, strict=True)
        }
        masks = {}
        for name, tower in zip(self.connector.names, self.connector.towers, strict=True):
            masks[name] = np.ones((n, tower.side, tower.side), bool)
            for mask, picture in zip(masks[name], pictures, strict=False):
                mask &= _inside(picture.size, tower.side)
        newline = n * side * side
        indices = []
        for i, picture in enumerate(pictures):
            own = i * side * side + np.arange(side * side).reshape(side, side)
            indices.append(own.ravel() if i in frames else self._order(picture.size, own, newline))
        inputs = Padded(whole(pictures, self.images, n), pixels, masks=masks)
        return Shown(inputs, indices, newline + 1, 1)

    def _order(self, size: Size, own: np.ndarray, newline: int) -> np.ndarray:
        """A picture's tokens, those of its raster int64[side, side] that show it, and row ends."""
        rows, cols = unpad(size, own.shape)
        kept = own[rows, cols]
        if not kept.size:
            raise InputError(
                "image",
                found=f"a picture of {size[0]}x{size[1]} pixels",
                expected=f"one at least a {len(own)}th as wide as high, and as high as wide",
                fix="cut it, or put it on a square",
            )
        return np.concatenate([kept, np.full((len(kept), 1), newline)], axis=1).ravel()

    def regions(self, size: Size) -> np.ndarray:
        """See `Architecture.regions`; ends of rows have no place."""
        side = self.connector.side
        boxes = np.concatenate([cells(frame(self.images, size), side * side), NOWHERE])
        own = np.arange(side * side).reshape(side, side)
        return boxes[self._order(size, own, side * side)]

    def build(self, *, rngs: nnx.Rngs) -> CambrianBranch:
        return CambrianBranch(self, rngs=rngs)


def _inside(size: Size, side: int) -> np.ndarray:
    """bool[side, side], where a padded picture's raster shows it."""
    rows, cols = unpad(size, (side, side))
    mask = np.zeros((side, side), bool)
    mask[rows, cols] = True
    return mask
