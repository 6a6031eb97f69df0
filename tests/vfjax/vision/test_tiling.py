"""Tiles and token order against upstream recordings, and pictures of every shape."""

import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file

import converters
from converters.preprocessor import from_preprocessor
from vfjax.architectures.slime import Resampler, adaptive_grid
from vfjax.errors import InputError
from vfjax.vision.images import preprocess
from vfjax.vision.tiling import (
    anyres_grid,
    best_resolution,
    frame_indices,
    nearest_grid,
    raster_indices,
    resize_pad,
    spatial_indices,
    tile_grids,
    tiles,
    unpad,
)

TILE, SIDE = 336, 24
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
ANYRES = ["llava_next_anyres", "dc_anyres", "dc_anyres_siglip"]
SLIME = ["slime_vicuna", "slime_llama3"]

SIZES = st.tuples(st.integers(1, 10_000), st.integers(1, 10_000))
THIN = st.tuples(st.integers(1, 30), st.integers(1, 10_000))
ANY_SIZE = SIZES | THIN | THIN.map(lambda size: size[::-1])


def order(size: tuple[int, int], grid: tuple[int, int], side: int = SIDE) -> np.ndarray:
    return spatial_indices(size, grid, side, unpad=True, newline=True)


def length(part: slice) -> int:
    return part.stop - part.start


# Recordings


@pytest.fixture(scope="module")
def grids(shared: Path) -> dict:
    return json.loads((shared / "golden" / "grids.json").read_text())


def test_recorded_anyres_grids(grids: dict):
    boxes = 0
    for row in grids["llava_next"]:
        size = tuple(row["image_wh"])
        best = best_resolution(size, PINPOINTS)
        assert list(best) == row["best_resolution_wh"], size
        grid = anyres_grid(size, PINPOINTS, TILE)
        assert list(grid) == row["grid_wh"], size
        kept = unpad(size, (grid[0] * SIDE, grid[1] * SIDE))
        assert [length(part) for part in kept] == row["unpadded_feature_hw"], size
        assert len(order(size, grid)) == row["image_tokens_spatial_unpad"], size
        box = row["pasted_box_left_top_right_bottom"]
        if box is not None:  # not recorded for the largest pictures
            white = Image.new("RGB", size, (255, 255, 255))
            assert list(resize_pad(white, best).getbbox()) == box, size
            boxes += 1
    assert (len(grids["llava_next"]), boxes) == (60, 57)


def test_recorded_adaptive_grids(grids: dict):
    for row in grids["slime"]:
        cols, rows = adaptive_grid(tuple(row["image_wh"]), TILE)
        assert [cols, rows] == row["grid_wh"], row
        assert [cols * TILE, rows * TILE] == row["best_resolution_wh"], row
    assert len(grids["slime"]) == 60


@pytest.mark.parametrize(
    ("size", "canvas", "tokens"),
    [
        ((640, 480), (672, 672), 2340),
        ((480, 640), (672, 672), 2352),
        ((1024, 899), (672, 672), 2634),
        ((1920, 1080), (672, 672), 1948),
        ((1080, 1920), (672, 672), 1968),
        ((672, 672), (672, 672), 2928),
        ((3000, 500), (1008, 336), 1452),
        ((500, 3000), (336, 1008), 1512),
        ((1000, 333), (1008, 336), 2328),
        ((336, 336), (336, 672), 1176),
        ((100, 100), (336, 672), 1176),
    ],
)
def test_token_counts_of_llava_next(size, canvas, tokens):
    assert best_resolution(size, PINPOINTS) == canvas
    assert len(order(size, anyres_grid(size, PINPOINTS, TILE))) == tokens


def test_equal_resolutions():
    """Least waste, then the first; also when scaling leaves no pixel on any canvas."""
    canvases = [(672, 672), (672, 336), (336, 672)]
    assert best_resolution((100, 100), canvases) == (672, 336)
    assert best_resolution((1, 10_000), canvases) == (672, 336)


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((100, 100), (1, 2)),
        ((336, 336), (1, 2)),
        ((400, 300), (2, 1)),
        ((640, 480), (2, 2)),
        ((1024, 899), (3, 2)),
        ((1920, 1080), (3, 2)),
        ((1080, 1920), (2, 3)),
        ((2000, 2000), (2, 3)),
        ((800, 300), (3, 1)),
        ((336, 700), (1, 3)),
        ((3000, 500), (6, 1)),
        ((500, 3000), (1, 6)),
    ],
)
def test_grids_of_slime(size, grid):
    assert adaptive_grid(size, TILE) == grid


def test_slimes_positions_are_upstreams(shared: Path):
    """A new connector's table is what every checkpoint holds (in float16), and does not train."""
    model, _ = converters.load(shared / "golden" / "slime_vicuna", dtype="float32")
    ((_, branch),) = model.branches.items()
    for part in (branch.connector.expert, branch.connector.sampler):
        table = np.asarray(part.pos[...])
        new = Resampler(table.shape[1], len(table), part.grid, rngs=nnx.Rngs(0))
        np.testing.assert_allclose(new.pos[...], table, atol=5e-4)
        x, y = np.random.default_rng(0).normal(size=(2, 1, part.grid**2, table.shape[1]))
        gradients = nnx.grad(lambda m, x=x, y=y: (m(x) * y[:, : m(x).shape[1]]).sum())(new)
        assert not np.any(gradients.pos[...]) and np.any(gradients.query[...])


def test_slime_may_use_one_tile_more_than_its_limit():
    grid = adaptive_grid((7000, 1000), TILE)
    assert grid == (7, 1)
    assert raster_indices(grid, 12).size == 1008


@pytest.mark.parametrize(
    ("n", "frames"),
    [(300, [18, 56, 93, 131, 168, 205, 243, 280]), (10, [0, 1, 2, 3, 5, 6, 7, 8]), (1, [0] * 8)],
)
def test_frames(n: int, frames: list[int]):
    np.testing.assert_array_equal(frame_indices(n, 8), frames)


def samples(folder: Path) -> dict[str, list[np.ndarray]]:
    """Sample -> its pictures, in order."""
    inputs = load_file(folder / "inputs.safetensors")
    names = sorted({key.partition(".")[0] for key in inputs})
    out = {
        name: [inputs[key] for key in sorted(inputs) if key.startswith(f"{name}.image")]
        for name in names
    }
    assert out and all(out.values())
    return out


def case_grid(folder: Path, image: np.ndarray, tile: int) -> tuple[int, int]:
    config = json.loads((folder / "config.json").read_text())
    size = image.shape[1], image.shape[0]
    if config.get("mm_resampler_type") == "cosine":
        return adaptive_grid(size, tile)
    return anyres_grid(size, config["image_grid_pinpoints"], tile)


@pytest.mark.parametrize("case", ANYRES + SLIME)
def test_pixels_equal_upstream(shared: Path, case: str):
    folder = shared / "golden" / case
    config = json.loads((folder / "vision_tower_preprocessor_config.json").read_text())
    spec = from_preprocessor(config, aspect="crop")
    outputs = load_file(folder / "outputs.safetensors")
    for name, images in samples(folder).items():
        views = [
            preprocess(view, spec)
            for image in images
            for view in tiles(image, case_grid(folder, image, spec.size), spec.size)
        ]
        recorded = outputs[f"{name}.pixel_values"].transpose(0, 2, 3, 1)
        np.testing.assert_allclose(np.stack(views), recorded, rtol=0, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("case", ANYRES)
def test_order_equals_upstream(shared: Path, case: str):
    """One gather from the recorded image_features gives the recorded inputs_embeds, exactly."""
    folder = shared / "golden" / case
    config = json.loads((folder / "config.json").read_text())
    assert config["mm_patch_merge_type"] == "spatial_unpad"
    spec = json.loads((folder / "vision_tower_preprocessor_config.json").read_text())
    tile = spec.get("crop_size") or spec["size"]["height"]
    weights = load_file(folder / "model.safetensors")
    inputs = load_file(folder / "inputs.safetensors")
    outputs = load_file(folder / "outputs.safetensors")
    for name, images in samples(folder).items():
        memory = every_row(outputs, f"{name}.image_features", axis=1, case=case)
        side = math.isqrt(memory.shape[1])
        blocks, first = [], 0
        for image in images:
            grid = case_grid(folder, image, tile)
            last = first + 1 + grid[0] * grid[1]
            tokens = memory[first:last].reshape(-1, memory.shape[-1])
            tokens = np.vstack([tokens, weights["model.image_newline"]])
            blocks.append(tokens[order((image.shape[1], image.shape[0]), grid, side)])
            first = last
        assert first == len(memory)
        ids = inputs[f"{name}.input_ids"]
        text = np.split(weights["model.embed_tokens.weight"][ids], np.flatnonzero(ids == -200))
        spliced = [text[0]]
        for block, chunk in zip(blocks, text[1:], strict=True):
            spliced += [block, chunk[1:]]
        ours = np.vstack(spliced)[: config["tokenizer_model_max_length"]]
        recorded = outputs[f"{name}.inputs_embeds"]
        if f"{name}.inputs_embeds.rows" in outputs:
            ours = ours[outputs[f"{name}.inputs_embeds.rows"]]
        known = ~np.isnan(ours[:, 0])
        # Of dc_anyres_siglip, 147 rows are recorded: 10 of text, 21 visual ones whose
        # image_features are recorded too, 116 of which only this can be said: no newline.
        assert (~known).sum() == (116 if case == "dc_anyres_siglip" else 0)
        np.testing.assert_array_equal(ours[known], recorded[known], err_msg=name)
        newline = weights["model.image_newline"]
        lines = [(rows == newline).all(axis=1) for rows in (ours, recorded)]
        assert lines[1].any()
        np.testing.assert_array_equal(*lines, err_msg=name)


def every_row(outputs: dict, key: str, axis: int, case: str) -> np.ndarray:
    """A recorded tensor at its full length, NaN in the rows that were not recorded."""
    found = outputs[key]
    if f"{key}.rows" not in outputs:
        return found
    full = {"dc_anyres_siglip": 729}.get(case, 144)
    shape = [*found.shape]
    shape[axis] = full
    out = np.full(shape, np.nan, np.float32)
    out[(slice(None),) * axis + (outputs[f"{key}.rows"],)] = found
    return out


@pytest.mark.parametrize("case", SLIME)
def test_raster_of_slime_equals_upstream(shared: Path, case: str):
    """Compressed tokens, projected and gathered, are the recorded raster."""
    folder = shared / "golden" / case
    weights = load_file(folder / "model.safetensors")
    projection = [
        torch.from_numpy(weights[f"model.mm_projector.projection.{name}"]).float()
        for name in ("0.weight", "0.bias", "2.weight", "2.bias")
    ]
    outputs = load_file(folder / "outputs.safetensors")
    for name, images in samples(folder).items():
        stored = every_row(outputs, f"{name}.local_compressed", axis=1, case=case)
        x = torch.from_numpy(stored.reshape(-1, stored.shape[-1]))
        x = torch.nn.functional.gelu(torch.nn.functional.linear(x, *projection[:2]))
        tokens = torch.nn.functional.linear(x, *projection[2:]).numpy()
        (image,) = images
        indices = raster_indices(case_grid(folder, image, 48), 12)
        assert indices.size == len(outputs[f"{name}.router_scores"])
        ours = tokens[indices.ravel()[outputs[f"{name}.local_projected_raster.rows"]]]
        known = ~np.isnan(ours[:, 0])
        assert known.sum() >= 20
        recorded = outputs[f"{name}.local_projected_raster"]
        np.testing.assert_allclose(ours[known], recorded[known], rtol=0, atol=1e-4)


# Every shape


@settings(max_examples=300)
@given(size=ANY_SIZE, side=st.sampled_from([1, 2, 24, 27]), adaptive=st.booleans())
def test_order_of_any_picture(size, side, adaptive):
    grid = adaptive_grid(size, TILE) if adaptive else anyres_grid(size, PINPOINTS, TILE)
    cols, rows = grid[0] * side, grid[1] * side
    indices = order(size, grid, side)
    base, end = side * side, (1 + grid[0] * grid[1]) * side * side
    assert indices.dtype == np.int32
    assert indices.min() == 0 and indices.max() <= end
    np.testing.assert_array_equal(indices[:base], np.arange(base))

    y, x = unpad(size, (cols, rows))
    assert y.start == rows - y.stop and x.start == cols - x.stop
    lines = indices[base:].reshape(length(y), length(x) + 1)
    assert (lines[:, -1] == end).all()
    # Undo the storage of every token: tile, then place in the tile.
    tile, place = np.divmod(lines[:, :-1] - base, base)
    down = tile // grid[0] * side + place // side
    across = tile % grid[0] * side + place % side
    expected = np.mgrid[y, x]
    np.testing.assert_array_equal(down, expected[0])
    np.testing.assert_array_equal(across, expected[1])

    scale = min(Fraction(cols, size[0]), Fraction(rows, size[1]))
    for kept, exact in ((length(x), size[0] * scale), (length(y), size[1] * scale)):
        assert exact - 1 <= kept <= exact + 1


@given(size=ANY_SIZE)
def test_adaptive_grid_of_any_picture(size):
    cols, rows = adaptive_grid(size, TILE)
    assert 2 <= cols * rows <= 7


@given(size=ANY_SIZE)
def test_order_without_unpadding_and_newlines(size):
    grid = anyres_grid(size, PINPOINTS, TILE)
    indices = spatial_indices(size, grid, SIDE, unpad=False, newline=False)
    expected = np.concatenate([np.arange(576), 576 + raster_indices(grid, SIDE).ravel()])
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_array_equal(np.sort(indices), np.arange((1 + grid[0] * grid[1]) * 576))


def test_raster():
    expected = [
        [0, 1, 4, 5, 8, 9],
        [2, 3, 6, 7, 10, 11],
        [12, 13, 16, 17, 20, 21],
        [14, 15, 18, 19, 22, 23],
    ]
    np.testing.assert_array_equal(raster_indices((3, 2), 2), expected)


def test_whole_picture_alone():
    np.testing.assert_array_equal(order((50, 40), (0, 0), 2), [0, 1, 2, 3, 4])
    plain = spatial_indices((50, 40), (0, 0), 2, unpad=False, newline=False)
    np.testing.assert_array_equal(plain, [0, 1, 2, 3])
    (view,) = tiles(Image.new("RGB", (50, 40)), (0, 0), 14)
    assert view.size == (14, 14)


def test_picture_thinner_than_a_token():
    """Upstream cuts all of an even raster and keeps the middle of an odd one."""
    assert unpad((1, 3000), (24, 48)) == (slice(0, 48), slice(12, 12))
    np.testing.assert_array_equal(order((1, 3000), (1, 2))[576:], [3 * 576] * 48)
    assert unpad((3000, 1), (54, 27)) == (slice(13, 14), slice(0, 54))


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 3000), (3000, 1), (5000, 7), (1, 10_000), (10_000, 1), (1, 19_999)]
)
@pytest.mark.parametrize("adaptive", [False, True])
def test_extreme_pictures(size, adaptive):
    white = Image.new("RGB", size, (255, 255, 255))
    grid = adaptive_grid(size, TILE) if adaptive else anyres_grid(size, PINPOINTS, TILE)
    views = tiles(white, grid, TILE)
    assert len(views) == 1 + grid[0] * grid[1]
    assert {view.size for view in views} == {(TILE, TILE)}
    assert np.asarray(views[0]).min() == 255
    assert any(view.getbbox() for view in views[1:])  # the padding has not swallowed it


@pytest.mark.parametrize("pinpoints", [[], [[336, 672], [0, 336]], [[500, 336]]])
def test_bad_pinpoints(pinpoints):
    with pytest.raises(InputError) as error:
        anyres_grid((100, 100), pinpoints, TILE)
    text = str(error.value)
    assert "\n" not in text
    assert "image_grid_pinpoints" in text and str(pinpoints) in text and "336" in text


@pytest.mark.parametrize(("n", "count"), [(0, 8), (10, 0)])
def test_no_frames(n: int, count: int):
    with pytest.raises(InputError, match=f"video: found {n} frames, {count} wanted"):
        frame_indices(n, count)


@pytest.mark.parametrize(
    ("size", "least", "most", "ordered", "expected"),
    [
        ((250, 100), 4, 4, True, (2, 2)),  # transformers' get_optimal_tiled_canvas
        ((250, 100), 4, 4, False, (4, 1)),  # the authors' find_closest_aspect_ratio
        ((30, 500), 1, 12, True, (1, 12)),
        ((1200, 900), 1, 12, True, (4, 3)),
        ((20, 20), 1, 12, True, (1, 1)),
        ((448, 448), 1, 12, True, (1, 1)),
        ((1300, 650), 1, 12, True, (4, 2)),
        ((600, 300), 1, 12, True, (2, 1)),
    ],
)
def test_nearest_grid(size, least: int, most: int, ordered: bool, expected):
    assert nearest_grid(size, tile_grids(least, most, ordered), 448) == expected
