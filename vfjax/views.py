"""What a branch is shown of a batch's pictures, and the order of its tokens; on the host.

A branch turns its inputs into a flat memory of visual tokens of static size; each picture's tokens
are a list of indices into it. Tiling, unpadding and newlines are thus one gather on the device.

Views are called with pictures, the numbers of those that are frames (`Frames`), and `slots`:
pictures to make room for, so that processes with other numbers of pictures agree on shapes; None
for the fewest that fit, rounded up to a bucket.
"""

import dataclasses
from collections.abc import Container, Sequence

import numpy as np
from PIL import Image

from vfjax.vision import tiling
from vfjax.vision.images import ImageSpec, preprocess

Pictures = Sequence[Image.Image]
Frames = Container[int]
"""Numbers of the pictures that are frames of a video: of these only the whole is shown, padded to a
square where a tiled picture would be squashed (Dense Connector's evaluation on video)."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A branch's share of a batch.

    Attributes:
        inputs: arrays of static shape for the branch.
        indices: for each picture, int64[k] indices of its tokens in the branch's memory.
        size: tokens in that memory.
        shared: of these, the last ones, which belong to no picture. (The others are in the order of
            the inputs' first axis: inputs of several processes put together make a memory of all
            their own tokens and the shared ones once.)
    """

    inputs: dict[str, np.ndarray]
    indices: list[np.ndarray]
    size: int
    shared: int = 0


def bucket(count: int) -> int:
    """Pictures or tiles that a batch is filled up to: the next power of two."""
    return 1 << (count - 1).bit_length()


def stacked(views: Sequence[np.ndarray], count: int, side: int) -> np.ndarray:
    """Views as float32[count, side, side, 3], black after the last."""
    out = np.zeros((count, side, side, 3), np.float32)
    for slot, view in zip(out[: len(views)], views, strict=True):
        slot[...] = view
    return out


@dataclasses.dataclass(frozen=True)
class Whole:
    """Each picture is one view (LLaVA-1.5)."""

    images: ImageSpec
    tokens: int

    reads_text = False

    def most(self) -> int:
        """Tokens of a picture at most."""
        return self.tokens

    def __call__(
        self, pictures: Pictures, frames: Frames = (), slots: int | None = None
    ) -> Prepared:
        """Inputs: pixels float32[n, s, s, 3]."""
        del frames  # all are whole
        n = bucket(len(pictures)) if slots is None else slots
        pixels = stacked([preprocess(p, self.images) for p in pictures], n, self.images.size)
        indices = [i * self.tokens + np.arange(self.tokens) for i in range(len(pictures))]
        return Prepared({"pixels": pixels}, indices, n * self.tokens)


@dataclasses.dataclass(frozen=True)
class Anyres:
    """The whole picture and tiles of it (LLaVA-NeXT, Dense Connector).

    Attributes:
        images: of each view; its `aspect` is "crop".
        pinpoints: canvases (width, height) that a picture may be tiled on.
        side: a view has side * side tokens.
        merge: the config's mm_patch_merge_type: "flat", "spatial" or "spatial_unpad".
        decimals: see `tiling.unpad`.
    """

    images: ImageSpec
    pinpoints: tuple[tuple[int, int], ...]
    side: int
    merge: str
    decimals: int | None = None

    reads_text = False

    def most(self) -> int:
        """Tokens of a picture at most."""
        tile = self.images.size
        grids = [(w // tile, h // tile) for w, h in self.pinpoints]
        return max(
            len(self._order(point, g)) for point, g in zip(self.pinpoints, grids, strict=True)
        )

    def __call__(
        self, pictures: Pictures, frames: Frames = (), slots: int | None = None
    ) -> Prepared:
        """Inputs: pixels float32[t, s, s, 3], all views of all pictures."""
        tile, per_view = self.images.size, self.side**2
        views: list[np.ndarray] = []
        starts, orders = [], []
        for i, picture in enumerate(pictures):
            starts.append(len(views) * per_view)
            if i in frames:
                orders.append(starts[-1] + np.arange(per_view))
                views.append(preprocess(picture, dataclasses.replace(self.images, aspect="pad")))
                continue
            grid = tiling.anyres_grid(picture.size, self.pinpoints, tile)
            orders.append(self._order(picture.size, grid))
            views += [preprocess(v, self.images) for v in tiling.tiles(picture, grid, tile)]
            orders[-1] = np.where(
                orders[-1] == (1 + grid[0] * grid[1]) * per_view, -1, orders[-1] + starts[-1]
            )
        count = bucket(len(views)) if slots is None else slots * self._views()
        newline = count * per_view  # one row behind all views
        indices = [np.where(order < 0, newline, order) for order in orders]
        pixels, shared = stacked(views, count, tile), int(self.merge == "spatial_unpad")
        return Prepared({"pixels": pixels}, indices, newline + shared, shared)

    def _views(self) -> int:
        """Views of a picture at most."""
        tile = self.images.size
        return 1 + max((width // tile) * (height // tile) for width, height in self.pinpoints)

    def _order(self, size: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
        if self.merge == "flat":
            return np.arange((1 + grid[0] * grid[1]) * self.side**2)
        unpad = self.merge == "spatial_unpad"
        return tiling.spatial_indices(
            size, grid, self.side, unpad=unpad, newline=unpad, decimals=self.decimals
        )


@dataclasses.dataclass(frozen=True)
class TwoScales:
    """A high-resolution picture, and low-resolution views made of its pixels (Mini-Gemini).

    MGM mgm/model/processor and mgm/model/builder.py: the low one is a plain bilinear resize of the
    normalised high one, not of the photograph.

    Attributes:
        images: of the high-resolution picture.
        size: side of a low-resolution view.
        grid: views a side that the low-resolution picture is cut into.
        whole: one more view of the whole picture, after the others.
        tokens: of a view.
    """

    images: ImageSpec
    size: int
    grid: int
    whole: bool
    tokens: int

    reads_text = False

    def most(self) -> int:
        """Tokens of a picture at most."""
        return self.tokens * (self.grid**2 + self.whole)

    def __call__(
        self, pictures: Pictures, frames: Frames = (), slots: int | None = None
    ) -> Prepared:
        """Inputs: pixels float32[n * views, s, s, 3], pixels_aux float32[n, S, S, 3]."""
        del frames  # all are whole
        n, each = bucket(len(pictures)) if slots is None else slots, self.most()
        high = [preprocess(p, self.images) for p in pictures]
        low = [view for picture in high for view in self._views(picture)]
        inputs = {
            "pixels": stacked(low, n * (self.grid**2 + self.whole), self.size),
            "pixels_aux": stacked(high, n, self.images.size),
        }
        return Prepared(inputs, [i * each + np.arange(each) for i in range(len(high))], n * each)

    def _views(self, picture: np.ndarray) -> list[np.ndarray]:
        low = resized(picture, self.size * self.grid)
        cuts = [slice(i * self.size, (i + 1) * self.size) for i in range(self.grid)]
        views = [low[rows, cols] for rows in cuts for cols in cuts]
        return [*views, resized(low, self.size)] if self.whole else views


def resized(picture: np.ndarray, side: int) -> np.ndarray:
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


@dataclasses.dataclass(frozen=True)
class Pair:
    """Each picture is one view, shown to two encoders, to each as it was trained (COMM).

    Attributes:
        images: for the first encoder.
        images_aux: for the second.
        tokens: of a picture.
    """

    images: ImageSpec
    images_aux: ImageSpec
    tokens: int

    reads_text = False

    def most(self) -> int:
        """Tokens of a picture at most."""
        return self.tokens

    def __call__(
        self, pictures: Pictures, frames: Frames = (), slots: int | None = None
    ) -> Prepared:
        """Inputs: pixels and pixels_aux, both float32[n, s, s, 3]."""
        one, two = (
            Whole(images, self.tokens)(pictures, frames, slots)
            for images in (self.images, self.images_aux)
        )
        inputs = {"pixels": one.inputs["pixels"], "pixels_aux": two.inputs["pixels"]}
        return dataclasses.replace(one, inputs=inputs)


@dataclasses.dataclass(frozen=True)
class Sliced:
    """The whole picture and as many tiles as its size asks for (SliME).

    Attributes:
        images: of each view; its `aspect` is "crop".
        tokens: of the whole view.
        side: a tile has side * side tokens.
        tiles: slots for tiles.
    """

    images: ImageSpec
    tokens: int
    side: int
    tiles: int = 7

    reads_text = True  # the router asks which tiles the prompt is about

    def most(self) -> int:
        """Tokens of a picture at most: whole view, separator, tiles."""
        return self.tokens + 1 + self.tiles * self.side**2

    def __call__(
        self, pictures: Pictures, frames: Frames = (), slots: int | None = None
    ) -> Prepared:
        """Inputs: pixels float32[n * (1 + tiles), s, s, 3], tile_mask bool[n, tiles], raster."""
        n = bucket(len(pictures)) if slots is None else slots
        each, per_tile, size = self.most(), self.side**2, self.images.size
        pixels = np.zeros((n, 1 + self.tiles, size, size, 3), np.float32)
        mask = np.zeros((n, self.tiles), bool)
        raster = np.tile(np.arange(self.tiles * per_tile, dtype=np.int32), (n, 1))
        indices = []
        for i, picture in enumerate(pictures):
            if i in frames:
                pixels[i, 0] = preprocess(picture, dataclasses.replace(self.images, aspect="pad"))
                indices.append(i * each + np.arange(self.tokens))
                continue
            grid = tiling.adaptive_grid(picture.size, size)
            views = tiling.tiles(picture, grid, size)
            count = len(views) - 1
            pixels[i, : len(views)] = [preprocess(v, self.images) for v in views]
            mask[i, :count] = True
            raster[i, : count * per_tile] = tiling.raster_indices(grid, self.side).ravel()
            indices.append(i * each + np.arange(self.tokens + 1 + count * per_tile))
        inputs = {
            "pixels": pixels.reshape(-1, *pixels.shape[2:]),
            "tile_mask": mask,
            "raster": raster,
        }
        return Prepared(inputs, indices, n * each)
