"""LLaVA-NeXT (LLaVA-1.6): the whole picture and, at a higher resolution, tiles of it ("anyres").

LLaVA llava/mm_utils.py and llava/model/llava_arch.py; Dense Connector's anyres is the same.
"""

import dataclasses
import math
from collections.abc import Container, Sequence

import numpy as np
from PIL import Image

from vfjax.architectures.base import Inputs, Size, bucket, stacked
from vfjax.architectures.boxes import NOWHERE, WHOLE, canvas, cells, cut, frame, within
from vfjax.architectures.tapped import Shown, Tapped
from vfjax.vision import tiling
from vfjax.vision.images import preprocess


@dataclasses.dataclass(frozen=True)
class LlavaNext(Tapped):
    """The whole picture and tiles of it; the connector is `vfjax.architectures.llava`'s.

    Attributes:
        images: of each view; its `aspect` is "crop".
        pinpoints: canvases (width, height) that a picture may be tiled on.
        merge: the config's mm_patch_merge_type: "flat", "spatial" or "spatial_unpad".
        decimals: see `tiling.unpad`.
    """

    pinpoints: tuple[Size, ...] = ()
    merge: str = "flat"
    decimals: int | None = None

    @property
    def side(self) -> int:
        """Tokens a side of a view."""
        return math.isqrt(self.connector.combine.tokens(self.patches))

    @property
    def tokens(self) -> int:
        """Tokens of a picture, at most."""
        tile = self.images.size
        grids = [(w // tile, h // tile) for w, h in self.pinpoints]
        return max(
            len(self.order(point, g)) for point, g in zip(self.pinpoints, grids, strict=True)
        )

    def show(
        self, pictures: Sequence[Image.Image], frames: Container[int] = (), slots: int | None = None
    ) -> Shown:
        """Inputs: pixels float32[t, s, s, 3], all views of all pictures; see `Tapped.show`."""
        tile, per_view = self.images.size, self.side**2
        views: list[np.ndarray] = []
        orders = []
        for i, picture in enumerate(pictures):
            start = len(views) * per_view
            if i in frames:
                orders.append(start + np.arange(per_view))
                views.append(preprocess(picture, dataclasses.replace(self.images, aspect="pad")))
                continue
            grid = tiling.anyres_grid(picture.size, self.pinpoints, tile)
            order = self.order(picture.size, grid)
            views += [preprocess(v, self.images) for v in tiling.tiles(picture, grid, tile)]
            end = (1 + grid[0] * grid[1]) * per_view
            orders.append(np.where(order == end, -1, order + start))
        count = bucket(len(views)) if slots is None else slots * self._views()
        newline = count * per_view  # one row behind all views
        indices = [np.where(order < 0, newline, order) for order in orders]
        shared = int(self.merge == "spatial_unpad")
        return Shown(Inputs(stacked(views, count, tile)), indices, newline + shared, shared)

    def regions(self, size: Size) -> np.ndarray:
        """See `Architecture.regions`; newlines have no place."""
        tile = self.images.size
        grid = tiling.anyres_grid(size, self.pinpoints, tile)
        inner = frame(self.images, (tile, tile))
        shown = [WHOLE, *cut(canvas(size, grid, tile), grid)]
        stored = [cells(within(box, inner), self.side**2) for box in shown]
        return np.concatenate([*stored, NOWHERE])[self.order(size, grid)]

    def _views(self) -> int:
        """Views of a picture at most."""
        tile = self.images.size
        return 1 + max((width // tile) * (height // tile) for width, height in self.pinpoints)

    def order(self, size: Size, grid: Size) -> np.ndarray:
        """The order in which a picture's tokens are read, int64[k]; see `tiling.spatial_indices`.

        Args:
            size: the picture's.
            grid: of its tiles.
        """
        if self.merge == "flat":
            return np.arange((1 + grid[0] * grid[1]) * self.side**2)
        unpad = self.merge == "spatial_unpad"
        return tiling.spatial_indices(
            size, grid, self.side, unpad=unpad, newline=unpad, decimals=self.decimals
        )
