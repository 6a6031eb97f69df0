"""Qwen3-VL (arXiv 2511.21631): Qwen2-VL's path with learned positions and DeepStack.

States of some of the tower's layers are merged, too, and added to the visual tokens within the
LLM's first layers. Of a video each patch has its time before it, as text, and marks of its own, so
that it stands in the text as a picture does. As transformers computes it (models/qwen3_vl).
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vfjax.architectures.base import AnyArray, Media, Run, Size, VisualTokens
from vfjax.architectures.qwen_vl import FPS, Merger, MergerConfig, Patches, QwenVL
from vfjax.errors import InputError
from vfjax.vision import native
from vfjax.vision.video import Video

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PlacedPatches(Patches):
    """Patches with their learned positions, sums of four neighbours in the tower's table.

    Attributes:
        indices: int32[n, 4], rows of the table.
        weights: float32[n, 4].
    """

    indices: AnyArray = dataclasses.field(kw_only=True)
    weights: AnyArray = dataclasses.field(kw_only=True)

    @property
    def where(self) -> dict[str, object]:
        """What the tower is told of the patches."""
        return super().where | {"learned": (jnp.asarray(self.indices), jnp.asarray(self.weights))}


@dataclasses.dataclass(frozen=True)
class DeepMergersConfig(MergerConfig):
    """A merger of the last state, and one for each of some layers.

    Attributes:
        layers: numbers of the tower's layers, from 0 and ascending; what the k-th of them gives is
            added behind the LLM's k-th layer.
    """

    layers: tuple[int, ...] = ()

    @property
    def taps(self) -> dict[str, tuple[int, ...]]:
        """See `vfjax.architectures.base.Connector`; the last state is the last one."""
        return {"encoder": (*(layer + 1 for layer in self.layers), -1)}

    def build(self, *, rngs: nnx.Rngs) -> "DeepMergers":
        return DeepMergers(self, rngs=rngs)


class DeepMergers(Merger):
    """Hidden states of patches -> visual tokens, and what is added to them in the LLM."""

    def __init__(self, config: DeepMergersConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        each = MergerConfig(config.din, config.dout, config.merge, eps=config.eps, late=True)
        self.deep = nnx.List(each.build(rngs=rngs) for _ in config.layers)

    def __call__(self, states: dict[str, list[Array]]) -> VisualTokens:
        """All tokens, in the order of their patches, of states [1, n, din]."""
        *tapped, last = states["encoder"]
        tokens = super().__call__({"encoder": [last]})
        deep = [merger.merged(x)[0] for merger, x in zip(self.deep, tapped, strict=True)]
        return dataclasses.replace(tokens, deep=jnp.stack(deep) if deep else None)


@dataclasses.dataclass(frozen=True)
class Frames:
    """Which frames of a video are read.

    Attributes:
        count: so many; None: by `rate`.
        rate: frames of a second.
        least: by `rate` at least so many, if the video has them.
        most: at most.
    """

    count: int | None = None
    rate: float = 2.0
    least: int = 4
    most: int = 768

    def choose(self, total: int, rate: float) -> np.ndarray:
        """Which of `total` frames are read, of which `rate` are shown a second.

        Qwen3VLVideoProcessor's `sample_frames`.
        """
        count = self.count
        if count is None:
            count = min(max(int(total / rate * self.rate), self.least), self.most, total)
        return np.linspace(0, total - 1, count).round().astype(int)


@dataclasses.dataclass(frozen=True)
class Qwen3VL(QwenVL):
    """An `Architecture`; `rate` and `budget` are not read.

    Attributes:
        limit: pixels that a video's frame has at most, about, beside what `videos` leaves it; None:
            no limit. `videos` bounds the pixels of all frames together.
        film: which frames of a video are read.
    """

    limit: int | None = None
    film: Frames = Frames()

    def inputs(self, patches: Patches, sizes: Sequence[int]) -> PlacedPatches:
        """Patches with their learned positions."""
        del sizes
        own = {field.name: getattr(patches, field.name) for field in dataclasses.fields(patches)}
        indices, weights = stretched(own["place"], own["frames"], self.encoder.side)
        return PlacedPatches(**own, indices=indices, weights=weights)

    def frame_size(self, video: Video) -> Size:
        """Width and height that a video's frames are resized to.

        Qwen3VLVideoProcessor's `resize` and `smart_resize`.

        Raises:
            InputError: fewer frames than a patch has, or a frame that is too thin.
        """
        count, time = len(video.frames), self.encoder.time
        if count < time:
            raise InputError(
                "video",
                found=f"frames: {count}",
                expected=f"at least {time}",
                fix="take more frames, or pass a picture",
            )
        unit, (least, most) = self.videos.size, self.videos.pixels
        if self.limit is not None:
            most = count * max(min(self.limit, most // count), int(least * 1.05))
        size = video.frames[0].size
        if min(size) < unit:
            scale = max(unit / side for side in size)
            size = int(size[0] * scale), int(size[1] * scale)
        native.check_shape(size)
        near = [round(side / unit) * unit for side in size]
        whole, area = round(count / time) * time * math.prod(near), count * math.prod(size)
        if whole > most:
            shrink = math.sqrt(area / most)
            near = [max(unit, math.floor(side / shrink / unit) * unit) for side in size]
        elif whole < least:
            grow = math.sqrt(least / area)
            near = [math.ceil(side * grow / unit) * unit for side in size]
        return near[0], near[1]

    def run(self, tokens: np.ndarray, grid: tuple[int, int, int], media: Media) -> Run:
        """A picture or video in the text, a video's patches each with time and marks before it.

        Around all is once more what stands around a picture, which chat templates write.
        """
        if not isinstance(media, Video):
            return super().run(tokens, grid, media)
        time, high, wide = grid
        longest, each = max(high, wide), high * wide
        raster = np.zeros((each, 3), int)
        raster[:, 1:] = np.stack(np.divmod(np.arange(each), wide), axis=1)
        marks, indices, place = [[self.start]], [[0]], [np.zeros((1, 3), int)]
        for k in range(time):
            first = 1 + k * (longest + 3)
            marks.append([-2 - k, self.start, *[-1] * each, self.end])
            indices.append([0, 0, *tokens[k * each : (k + 1) * each], 0])
            alone = np.array([0, 1, longest + 2])[:, None].repeat(3, axis=1)
            place.append(first + np.concatenate([alone[:2], 2 + raster, alone[2:]]))
        span = 2 + time * (longest + 3)
        return Run(
            np.array([*np.concatenate(indices), 0])[:, None],
            marks=np.array([*np.concatenate(marks), self.end]),
            place=np.concatenate([*place, np.full((1, 3), span - 1)]),
            span=span,
            words=tuple(f"<{second:.1f} seconds>" for second in self.seconds(media)),
        )

    def seconds(self, video: Video) -> list[float]:
        """When each patch of a video is shown: halfway between its first and its last frame.

        Of frames without times 24 are shown a second, or as many as fit the video's duration.
        """
        count, time = len(video.frames), self.encoder.time
        rate = count / video.duration if video.duration else FPS
        times = list(video.times or (k / rate for k in range(count)))
        times += times[-1:] * (-count % time)
        return [(times[k] + times[k + time - 1]) / 2 for k in range(0, len(times), time)]

    def choose(self, total: int, rate: float) -> np.ndarray:
        """Frames of a video that are read, for `vfjax.open_video`; see `Frames.choose`."""
        return self.film.choose(total, rate)


def stretched(place: np.ndarray, frames: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each patch's learned position is in a table whose corners are the picture's.

    transformers vision_utils.py, get_vision_interpolation_indices_and_weights: bilinear, align
    corners, in float32.

    Args:
        place: int32[n, 2], row and column in the frame.
        frames: int32[n], from each patch to the first of its frame, not positive.
        side: of the table.

    Returns:
        int32[n, 4] rows of the table and float32[n, 4] their weights.
    """
    first = np.flatnonzero(frames == 0)
    last = np.maximum.reduceat(place, first)  # row and column of each frame's last patch
    last = np.repeat(last, np.diff(first, append=len(frames)), axis=0)
    at = place.astype(np.float32) * np.float32(side - 1)
    at /= np.maximum(last, 1).astype(np.float32)
    low = np.floor(at)
    near = np.stack([low, low + 1], axis=1)  # [n, 2, 2]: lower and upper; row, column
    share = np.maximum(1 - np.abs(at[:, None] - near), np.float32(0))
    near = near.clip(0, side - 1).astype(np.int32)
    indices = near[:, :, None, 0] * side + near[:, None, :, 1]
    weights = share[:, :, None, 0] * share[:, None, :, 1]
    return indices.reshape(-1, 4), weights.reshape(-1, 4).astype(np.float32)
