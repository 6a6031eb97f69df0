"""Qwen2-VL (arXiv 2409.12191) and Qwen2.5-VL (arXiv 2502.13923): pictures and videos as they are.

A picture keeps about its size; the patches of a whole batch are one sequence for the tower, as long
as a bucket says, and four neighbours become one visual token. The LLM reads a token at its time,
row and column. As transformers computes it (models/qwen2_vl, models/qwen2_5_vl).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vfjax.architectures.base import (
    AnyArray,
    Branch,
    Encoder,
    Inputs,
    Media,
    Prepared,
    Rows,
    Run,
    Size,
    VisualTokens,
    all_of,
)
from vfjax.architectures.boxes import NOWHERE, WHOLE, cut
from vfjax.errors import InputError
from vfjax.nn.layers import RMSNorm, layer_norm, linear
from vfjax.nn.packed import ROWS
from vfjax.vision import native
from vfjax.vision.encoders import QwenViTConfig
from vfjax.vision.images import ImageSpec
from vfjax.vision.video import Video

Array = jax.Array

FPS = 24.0
"""Frames a second of a video that does not say; transformers video_utils.py, sampled_fps."""

LEAST = 64
"""Patches that the tower reads at least."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Patches(Inputs):
    """The patches of all frames; `pixels` is float32[n, 3 * time * patch * patch].

    See `vfjax.vision.encoders.QwenViT`. Padding stands behind all patches, each a frame by itself.

    Attributes:
        place: int32[n, 2].
        frames: int32[n].
        windows: int32[n].
        reach: of frames.
    """

    place: AnyArray = dataclasses.field(kw_only=True)
    frames: AnyArray = dataclasses.field(kw_only=True)
    windows: AnyArray = dataclasses.field(kw_only=True)
    reach: int = dataclasses.field(kw_only=True, metadata={"static": True})

    @property
    def where(self) -> dict[str, Any]:
        """What the tower is told of the patches."""
        names = ("place", "frames", "windows")
        return {"reach": self.reach} | {k: jnp.asarray(getattr(self, k)) for k in names}


@dataclasses.dataclass(frozen=True)
class MergerConfig:
    """Neighbouring patches, joined on channels, through a norm and an MLP.

    Attributes:
        din: channels of a patch.
        dout: the LLM's width.
        merge: patches a side.
        rms: the norm is an RMS norm (Qwen2.5-VL).
        eps: what it adds to a variance.
        late: the norm is of the joined patches, not of each (Qwen3-VL's DeepStack).
    """

    din: int
    dout: int
    merge: int = 2
    rms: bool = False
    eps: float = 1e-6
    late: bool = False

    @property
    def taps(self) -> dict[str, tuple[int, ...]]:
        """See `vfjax.architectures.base.Connector`."""
        return {"encoder": (-1,)}

    @property
    def channels(self) -> dict[str, tuple[int, int]]:
        """See `vfjax.architectures.base.Connector`."""
        return {"encoder": (1, self.din)}

    def build(self, *, rngs: nnx.Rngs) -> "Merger":
        return Merger(self, rngs=rngs)


class Merger(nnx.Module):
    """Hidden states of patches -> visual tokens."""

    def __init__(self, config: MergerConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        wide = c.din * c.merge**2
        self.norm = (RMSNorm if c.rms else layer_norm)(wide if c.late else c.din, c.eps, rngs=rngs)
        self.fc1 = linear(wide, wide, ("embed", "mlp"), rngs=rngs)
        self.fc2 = linear(wide, c.dout, ("mlp", "embed"), rngs=rngs)

    def __call__(self, states: dict[str, list[Array]]) -> VisualTokens:
        """All tokens of [1, n, din], in the order of their patches."""
        return all_of(self.merged(states["encoder"][0]), {})

    def merged(self, x: Array) -> Array:
        """[1, n, din] -> [1, n / merge^2, dout]."""
        shape = (1, -1, self.fc1.kernel.shape[0])
        x = self.norm(x.reshape(shape)) if self.config.late else self.norm(x).reshape(shape)
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


@dataclasses.dataclass(frozen=True)
class QwenVL:
    """An `Architecture`; `Video.pool` is not read: a patch is of several frames.

    Attributes:
        encoder: config of the tower.
        connector: config of the merger.
        images: how pictures are prepared, "native".
        videos: how a video's frames are.
        start: id of the mark before a picture or video.
        end: of the one behind it.
        placeholders: ids that stand for a picture and a video in the ids of its processor.
        rate: positions that a second of a video takes (Qwen2.5-VL); None: each patch takes one.
        budget: pixels that a video has at most, about; None: no limit.
    """

    encoder: QwenViTConfig
    connector: MergerConfig
    images: ImageSpec
    videos: ImageSpec
    start: int
    end: int
    placeholders: tuple[int, ...] = ()
    rate: float | None = None
    budget: int | None = None

    reads_text: ClassVar[bool] = False
    axes: ClassVar[int] = 3

    @property
    def encoders(self) -> Mapping[str, Encoder]:
        """See `Architecture.encoders`."""
        return {"encoder": self.encoder}

    @property
    def tokens(self) -> int:
        """Tokens of a picture, at most, with both marks."""
        return native.most_units(self.images) + 2

    def prepare(self, rows: Rows, slots: int | None = None) -> Prepared:
        """Inputs: see `Patches`; n is `length` of all that the tower reads. See `Architecture`."""
        c = self.encoder
        parts: list[np.ndarray] = []  # of each frame, or several of a video, its patches
        places: list[np.ndarray] = []
        sizes: list[int] = []  # of frames
        windows: list[int] = []
        runs, first = list[Run](), 0
        for each in (media for row in rows for media in row):
            patches, (high, wide) = self._patches(each)
            order, counts = windowed((high, wide), c.window)
            time, tokens = patches.shape[:2]
            parts.append(patches[:, order].reshape(-1, patches.shape[-1]))
            place = np.stack(np.divmod(np.arange(tokens), wide), axis=1)[order]
            inner = np.stack(np.divmod(np.arange(c.merge**2), c.merge), axis=1)
            fine = (place[:, None] * c.merge + inner).reshape(-1, 2)
            places += [fine] * time
            sizes += [tokens * c.merge**2] * time
            windows += [count * c.merge**2 for count in counts] * time
            at = first + np.argsort(order) + tokens * np.arange(time)[:, None]
            runs.append(self.run(at.ravel(), (time, high, wide), each))
            first += time * tokens
        total, classes = sum(sizes), int(c.classes)
        most = native.most_units(self.images) * c.merge**2
        n = length(total + classes * len(sizes) if slots is None else slots * (most + classes))
        pixels = np.zeros((n, 3 * c.time * c.patch**2), np.float32)
        place = np.zeros((n, 2), np.int32)
        if parts:
            np.concatenate(parts, out=pixels[:total])
            place[:total] = np.concatenate(places)
        near = length(reached([size + classes for size in sizes])) if slots is None else n
        inputs = Patches(
            pixels,
            place=place,
            frames=back(sizes, n),
            windows=back(windows, n),
            reach=min(n, near),
        )
        return Prepared(self.inputs(inputs, sizes), runs, n // c.merge**2)

    def inputs(self, patches: Patches, sizes: Sequence[int]) -> Patches:
        """What the tower is told of the patches; `sizes` of frames."""
        del sizes
        return patches

    def _patches(self, media: Media) -> tuple[np.ndarray, Size]:
        """Patches float32[t, tokens, merge^2, features], and tokens a column and a row."""
        c = self.encoder
        if isinstance(media, Video):
            size = self.frame_size(media)
            if other := next(
                (x.size for x in media.frames if x.size != media.frames[0].size), None
            ):
                raise InputError(
                    "video",
                    found=f"frames of {media.frames[0].size} and {other} pixels",
                    expected="frames of one size",
                    fix="resize them",
                )
            frames = [native.frame(image, size, self.videos) for image in media.frames]
            frames += [frames[-1]] * (-len(frames) % c.time)
        else:
            frames = [native.picture(media, self.images)] * c.time
        high, wide = (side // (c.patch * c.merge) for side in frames[0].shape[:2])
        return native.patches(np.stack(frames), c.patch, c.time, c.merge), (high, wide)

    def frame_size(self, video: Video) -> Size:
        """Width and height that a video's frames are resized to."""
        spec = self.videos
        if self.budget is not None:
            least, most = spec.pixels
            share = self.budget * self.encoder.time // len(video.frames)
            most = max(min(most, share), int(least * 1.05))
            spec = dataclasses.replace(spec, pixels=(least, most))
        return native.fit(video.frames[0].size, spec)

    def run(self, tokens: np.ndarray, grid: tuple[int, int, int], media: Media) -> Run:
        """A picture or video in the text: mark, tokens frame by frame and row by row, mark."""
        time, high, wide = grid
        interval = np.float32(1)
        if self.rate is not None and isinstance(media, Video):
            fps = len(media.frames) / media.duration if media.duration else FPS
            seconds = np.float32(self.encoder.time / fps)
            interval = np.float32(self.rate) * seconds  # as torch rounds it
        times = (np.arange(time, dtype=np.float32) * interval).astype(np.int64)
        axes = np.meshgrid(times, np.arange(high), np.arange(wide), indexing="ij")
        place = 1 + np.stack(axes, axis=-1).reshape(-1, 3)
        longest = max(high, wide)  # time does not move the text on
        return Run(
            np.concatenate([[0], tokens, [0]])[:, None],
            marks=np.concatenate([[self.start], np.full(len(tokens), -1), [self.end]]),
            place=np.concatenate([np.zeros((1, 3), int), place, np.full((1, 3), longest + 1)]),
            span=longest + 2,
        )

    def regions(self, size: Size) -> np.ndarray:
        """See `Architecture.regions`; marks have no place."""
        wide, high = (side // self.images.size for side in native.fit(size, self.images))
        return np.concatenate([NOWHERE, cut(WHOLE, (wide, high)), NOWHERE])

    def build(self, *, rngs: nnx.Rngs) -> "QwenBranch":
        return QwenBranch(self, rngs=rngs)


class QwenBranch(Branch):
    """Patches of all pictures -> visual tokens."""

    def states(self, inputs: Inputs) -> dict[str, list[Array]]:
        """Hidden states [1, n, width] that the connector taps."""
        assert isinstance(inputs, Patches)
        taps = self.config.connector.taps["encoder"]
        return {"encoder": self.encoder(jnp.asarray(inputs.pixels), taps, **inputs.where)}


def length(patches: int) -> int:
    """Patches that a sequence is filled up to: a bucket, 2 or 3 times a power of two.

    From 64 to 65536 there are 21: a tower is compiled as often at most, where a batch has one
    picture; several in one may be compiled for fewer keys a query, once more for each bucket below.
    """
    power = max(LEAST, 1 << (patches - 1).bit_length())
    return power * 3 // 4 if LEAST <= patches <= power * 3 // 4 and power > LEAST else power


def windowed(raster: Size, side: int) -> tuple[np.ndarray, list[int]]:
    """The order of a frame's tokens window by window, and how many each window has.

    transformers vision_utils.py, get_vision_window_index.

    Args:
        raster: rows and columns of tokens.
        side: tokens a side of a window; 0: there is one window.

    Returns:
        int64[k] numbers of tokens, which count row by row, and the windows' sizes.
    """
    high, wide = raster
    rows, cols = np.divmod(np.arange(high * wide), wide)
    if not side:
        return np.arange(high * wide), [high * wide]
    order = np.lexsort((cols, rows, cols // side, rows // side))
    window = (rows // side * wide + cols // side)[order]
    return order, np.unique(window, return_counts=True)[1].tolist()


def back(sizes: Sequence[int], n: int) -> np.ndarray:
    """int32[n], how far each of n patches is behind the first of its segment, negative.

    Args:
        sizes: of segments; what follows them is a segment each.
        n: of the result.
    """
    parts = [np.arange(0, -size, -1) for size in sizes]
    return np.concatenate([*parts, np.zeros(n - sum(sizes), int)]).astype(np.int32)


def reached(sizes: Sequence[int]) -> int:
    """See `vfjax.nn.packed.packed`: the most patches that `ROWS` in a row of segments see."""
    ends = np.cumsum(sizes, dtype=int)
    if not len(ends):
        return ROWS
    first = np.arange(0, ends[-1], ROWS)
    last = np.minimum(first + ROWS, ends[-1]) - 1
    own, others = (np.searchsorted(ends, at, side="right") for at in (first, last))
    starts = ends - sizes
    return int(np.maximum(ends[others] - starts[own], ROWS + first - starts[own]).max())
