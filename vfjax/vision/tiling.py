"""Pictures cut into tiles, and the order in which the tiles' visual tokens are read; on the host.

Anyres (LLaVA-NeXT, Dense Connector), SliME's adaptive slicing and InternVL's tiles show the encoder
the whole picture and, at a higher resolution, a grid of tiles. The grid depends on the picture;
merging the tiles' tokens is then one gather, by the indices made here. Sizes are (width, height),
grids (columns, rows). Sources: LLaVA's `llava/mm_utils.py` and `llava/model/llava_arch.py`, and the
same files of SliME, both with their rounding.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image

from vfjax.errors import InputError, counted
from vfjax.vision.images import Source, open_image

Size = tuple[int, int]  # (width, height) or (columns, rows)


def best_resolution(size: Size, candidates: Sequence[Size]) -> Size:
    """The canvas on which most of a picture's pixels survive; of equals the one with least waste.

    LLaVA's `select_best_resolution`: the picture is scaled to fit, up or down, but counts at most
    the pixels it has. The first of full equals wins.

    Args:
        size: the picture's.
        candidates: at least one canvas, in pixels.
    """
    width, height = size

    def merit(canvas: Size) -> tuple[int, int]:
        scale = min(canvas[0] / width, canvas[1] / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        return effective, effective - canvas[0] * canvas[1]

    return max(candidates, key=merit)


def anyres_grid(size: Size, pinpoints: Sequence[Size], tile: int) -> Size:
    """The grid of tiles of a LLaVA-NeXT or Dense Connector picture.

    LLaVA's `get_anyres_image_grid_shape`.

    Args:
        size: the picture's.
        pinpoints: the config's `image_grid_pinpoints`, canvases in pixels, (width, height). (Those
            of transformers' port are (height, width) in its config.)
        tile: side of the encoder's input in pixels.

    Raises:
        InputError: no pinpoint, or one that is not made of whole tiles.
    """
    if not pinpoints or any(side < tile or side % tile for point in pinpoints for side in point):
        raise InputError(
            "image_grid_pinpoints",
            found=[list(point) for point in pinpoints],
            expected=f"at least one [width, height] in multiples of {tile}, the encoder's input",
            fix="correct config.json or preprocessor_config.json",
        )
    width, height = best_resolution(size, pinpoints)
    return width // tile, height // tile


@lru_cache(maxsize=64)
def tile_grids(least: int, most: int, ordered: bool) -> tuple[Size, ...]:
    """Grids of `least` to `most` tiles, those of fewer tiles first, for `nearest_grid`.

    Args:
        least: tiles.
        most: tiles.
        ordered: those of as many tiles stand in the order of columns, as in transformers'
            `get_all_supported_aspect_ratios`; else as Python's set has them, which the authors'
            `dynamic_preprocess` sorts (InternVL internvl_chat/internvl/train/dataset.py): that of
            two grids equally near is taken by this order.
    """
    sides = range(1, most + 1)
    found = [(i, j) for i in sides for j in sides if least <= i * j <= most]
    if not ordered:  # a set's order hangs on the order in which it was filled, by hash alone
        turns = (n for n in range(least, most + 1))
        filled = ((i, j) for n in turns for i in range(1, n + 1) for j in range(1, n + 1))
        found = list({pair for pair in filled if least <= pair[0] * pair[1] <= most})
    return tuple(sorted(found, key=lambda grid: grid[0] * grid[1]))


def nearest_grid(size: Size, grids: Sequence[Size], tile: int) -> Size:
    """The grid whose aspect is nearest to a picture's; (1, 1) of none.

    Of grids equally near, that of more tiles, unless the picture has less than half their pixels:
    transformers' `get_optimal_tiled_canvas`, the authors' `find_closest_aspect_ratio`.

    Args:
        size: the picture's.
        grids: of `tile_grids`.
        tile: side of the encoder's input in pixels.
    """
    width, height = size
    best, least = (1, 1), math.inf
    for cols, rows in grids:
        off = abs(width / height - cols / rows)
        near = off == least and width * height > 0.5 * tile * tile * cols * rows
        if off < least or near:
            best, least = (cols, rows), off
    return best


@lru_cache(maxsize=256)
def covering_grid(size: Size, tile: int, most: int, share: float = 0.9) -> Size:
    """The grid of fewest tiles that keep `share` of a picture, or else that which keeps most of it.

    A tile keeps what is left of it, scaled to fit its side of pixels; of a tile that is not longer
    than that, all. Of as many tiles the grid that keeps more wins, then the first.

    As transformers' Ovis2ImageProcessor has it (`get_min_tile_covering_grid`): a grid of r rows and
    c columns is measured, and the picture then cut into r columns and c rows.

    Args:
        size: the picture's.
        tile: side of the encoder's input in pixels.
        most: tiles.
        share: of the picture's pixels.
    """
    width, height = size

    def kept(rows: int, cols: int) -> float:
        high, wide = height // rows, width // cols
        total = 0.0
        for row in range(rows):
            for col in range(cols):
                w = wide if col + 1 < cols else width - col * wide
                h = high if row + 1 < rows else height - row * high
                long, short = float(max(w, h)), float(min(w, h))
                total += tile * (short / long * tile) if long > tile else long * short
        return total / (width * height)

    measured = [(grid, kept(*grid)) for grid in tile_grids(1, most, True)]
    enough = [each for each in measured if each[1] > share]
    if enough:
        return min(enough, key=lambda each: (each[0][0] * each[0][1], -each[1]))[0]
    return min(measured, key=lambda each: (-each[1], each[0][0] * each[0][1]))[0]


def grid_tiles(image: Image.Image, grid: Size, tile: int, *, thumbnail: bool) -> list[Image.Image]:
    """A picture stretched over a grid and cut into its tiles, row by row; by Pillow's bicubic.

    Transformers' `crop_image_to_patches`, the authors' `dynamic_preprocess`.

    Args:
        image: RGB.
        grid: of tiles.
        tile: side of the encoder's input in pixels.
        thumbnail: whether the whole picture follows, squashed.

    Returns:
        Pictures of tile x tile; where there is but one tile, the picture as it is.
    """
    cols, rows = grid
    if cols * rows == 1:
        return [image]
    bicubic = Image.Resampling.BICUBIC
    canvas = image.resize((cols * tile, rows * tile), bicubic)
    corners = [(x * tile, y * tile) for y in range(rows) for x in range(cols)]
    views = [canvas.crop((x, y, x + tile, y + tile)) for x, y in corners]
    return [*views, image.resize((tile, tile), bicubic)] if thumbnail else views


def resize_pad(image: Image.Image, canvas: Size) -> Image.Image:
    """Scales a picture to fit a canvas, its aspect kept, and centres it there on black.

    LLaVA's `resize_and_pad_image`: Pillow's bicubic, the free side rounded up.

    Args:
        image: RGB.
        canvas: size of the result in pixels.
    """
    across, down = canvas[0] / image.width, canvas[1] / image.height
    if across < down:
        size = canvas[0], min(math.ceil(image.height * across), canvas[1])
    else:
        size = min(math.ceil(image.width * down), canvas[0]), canvas[1]
    out = Image.new("RGB", canvas)
    corner = (canvas[0] - size[0]) // 2, (canvas[1] - size[1]) // 2
    out.paste(image.resize(size, Image.Resampling.BICUBIC), corner)
    return out


def tiles(image: Source, grid: Size, tile: int) -> list[Image.Image]:
    """The views of one picture, each to go through `vfjax.vision.images.preprocess`.

    LLaVA's `process_anyres_image`, without the processor.

    Args:
        image: anything `vfjax.vision.images.open_image` takes.
        grid: of tiles; (0, 0) for the whole picture alone.
        tile: side of the encoder's input in pixels.

    Returns:
        1 + columns * rows pictures of tile x tile: the whole one, squashed, then the tiles row by
        row.

    Raises:
        InputError: as `open_image`.
    """
    image = open_image(image)
    views = [image.resize((tile, tile), Image.Resampling.BICUBIC)]
    cols, rows = grid
    if cols * rows:
        canvas = resize_pad(image, (cols * tile, rows * tile))
        corners = [(x * tile, y * tile) for y in range(rows) for x in range(cols)]
        views += [canvas.crop((x, y, x + tile, y + tile)) for x, y in corners]
    return views


def unpad(size: Size, tokens: Size, decimals: int | None = None) -> tuple[slice, slice]:
    """Where a raster of tokens shows the picture and not the padding of `resize_pad`.

    LLaVA's `unpad_image`: the picture's side is rounded down and the same is cut at both ends, so
    that half a token of padding may stay. Nothing is left of a picture thinner than a token, if the
    raster's side is even.

    Args:
        size: the picture's, in pixels.
        tokens: the raster's (columns, rows).
        decimals: that the picture's side is rounded to before it is rounded down: 7 in
            transformers' LlavaNext, where upstream has no such step.

    Returns:
        Slices of its rows and columns.
    """

    def down(side: float) -> int:
        return int(side if decimals is None else round(side, decimals))

    (width, height), (cols, rows) = size, tokens
    if width / height > cols / rows:
        cut = (rows - down(height * (cols / width))) // 2
        return slice(cut, rows - cut), slice(0, cols)
    cut = (cols - down(width * (rows / height))) // 2
    return slice(0, rows), slice(cut, cols - cut)


def raster_indices(grid: Size, side: int) -> np.ndarray:
    """From tokens stored tile by tile to one raster over all tiles.

    Args:
        grid: of tiles, stored row by row.
        side: a tile has side * side tokens, stored row by row.

    Returns:
        int32[rows * side, columns * side] of indices into the columns * rows * side * side tokens.
    """
    cols, rows = grid
    stored = np.arange(cols * rows * side * side, dtype=np.int32)
    raster = stored.reshape(rows, cols, side, side).swapaxes(1, 2)
    return raster.reshape(rows * side, cols * side)


def spatial_indices(
    size: Size, grid: Size, side: int, *, unpad: bool, newline: bool, decimals: int | None = None
) -> np.ndarray:
    """The order in which the LLM reads the visual tokens of one picture.

    The merge of `prepare_inputs_labels_for_multimodal` in LLaVA's `llava_arch.py`, by the config's
    `mm_patch_merge_type`: "spatial_unpad" has both flags, "spatial" neither. ("flat" reads the
    tokens as they are stored.)

    Args:
        size: the picture's, in pixels.
        grid: of tiles; (0, 0) for the whole picture alone.
        side: a tile has side * side tokens.
        unpad: leave out the padding around the picture; see `unpad`.
        newline: end every row of the raster, or the picture if it has no tiles, with the newline.
        decimals: see `unpad`.

    Returns:
        int32[n] of indices into the picture's (1 + columns * rows) * side * side tokens, stored as
        `tiles` orders the views, and one newline after them: the whole picture, then the raster
        over all tiles.
    """
    whole = np.arange(side * side, dtype=np.int32)
    end = (1 + grid[0] * grid[1]) * side * side
    if end == side * side:
        return np.append(whole, np.int32(end)) if newline else whole
    raster = side * side + raster_indices(grid, side)
    if unpad:
        raster = _unpadded(raster, size, decimals)
    if newline:
        raster = np.pad(raster, ((0, 0), (0, 1)), constant_values=end)
    return np.concatenate([whole, raster.ravel()])


def _unpadded(raster: np.ndarray, size: Size, decimals: int | None) -> np.ndarray:
    rows, cols = raster.shape
    return raster[unpad(size, (cols, rows), decimals)]


MOST_FRAMES = 1 << 16
"""That a video may be shown as; far beyond any context."""


def frame_indices(n: int, count: int) -> np.ndarray:
    """Frames that stand for a video: the middles of `count` equal segments.

    Dense Connector's `get_seq_frames`; ends of segments are rounded half to even.

    Args:
        n: frames in the video. With fewer than `count`, frames repeat.
        count: frames wanted.

    Returns:
        int64[count], ascending.

    Raises:
        InputError: no frames in the video, or none wanted, or too many.
    """
    if n < 1 or not 1 <= count <= MOST_FRAMES:
        raise InputError(
            "video",
            found=f"{counted(n, 'frame')}, {count} wanted",
            expected=f"at least one of each, and at most {MOST_FRAMES} wanted",
            fix="check the file and the number of frames",
        )
    ends = np.round((n - 1) / count * np.arange(count + 1)).astype(np.int64)
    return (ends[:-1] + ends[1:]) // 2
