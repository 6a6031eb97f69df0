"""Qwen3-VL's marks, places, sizes and learned positions, on the host, against transformers."""

from types import SimpleNamespace

import hypothesis
import jax
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

from tests.qwen3_vl import VIDEOS, open_port, process, video_processor
from tests.qwen_vl import IMAGE, MOVIE, PICTURE, VIDEO, Port, assert_close, assert_ids, picture
from vfjax import InputError, Model, Video
from vfjax.architectures import Frames
from vfjax.architectures.qwen3_vl import stretched
from vfjax.architectures.qwen_vl import back
from vfjax.fusion.segments import running

PADDING = st.sampled_from(["left", "right"])


@pytest.fixture(scope="module")
def port(tmp_path_factory) -> Port:
    return open_port(tmp_path_factory.mktemp("qwen3_vl") / "port")


FILM = st.tuples(
    st.integers(2, 5),
    st.integers(1, 3),
    st.integers(1, 3),
    st.none() | st.floats(0.1, 3000),
    st.booleans(),
)
"""Frames, units of their sides, seconds; whether times are given."""

LAYOUT = st.lists(
    st.one_of(st.integers(1, 5), st.tuples(st.integers(2, 60), st.integers(2, 60)), FILM),
    min_size=1,
    max_size=4,
)
"""Of a row: words, pictures and videos."""


def film(count: int, high: int, wide: int, seconds: float | None, timed: bool) -> Video:
    frame = Image.new("RGB", (8 * wide, 8 * high))
    times = tuple(round(1.7 * k, 1) for k in range(count)) if timed else None
    return Video((frame,) * count, times=times, duration=seconds)


@settings(max_examples=100, suppress_health_check=list(HealthCheck), deadline=None)
@example(layout=[(3, 2, 1, 0.1, False), (9, 9), (2, 1, 1, None, True)], padding="left")
@hypothesis.given(layout=LAYOUT, padding=PADDING)
def test_tokens_and_positions_are_transformers(port: Port, layout: list, padding: str):
    """Of words, pictures and videos in any order, whose times are tokens; so is what is shown."""
    text, media = "", list[Image.Image | Video]()
    for part in layout:
        if isinstance(part, int):
            text += "word " * part
        else:
            media.append(picture(*part) if len(part) == 2 else film(*part))
            text += PICTURE if len(part) == 2 else MOVIE
    pictures = [x for x in media if isinstance(x, Image.Image)]
    films = [x for x in media if isinstance(x, Video)]
    inputs = process(port, text, pictures, films)
    try:
        batch = port.processor([media, []], prompts=[text, "ab"], padding=padding)
    except InputError as error:
        assert "tokens, visual ones included" in str(error)
        return
    assert_ids(batch, 0, inputs["input_ids"][0])
    expected, _ = port.theirs.model.get_rope_index(
        inputs["input_ids"],
        inputs["mm_token_type_ids"],
        image_grid_thw=inputs.get("image_grid_thw"),
        video_grid_thw=inputs.get("video_grid_thw"),
    )
    found = np.asarray(running(batch.mask, batch.place, batch.steps))
    np.testing.assert_array_equal(found[:, 0, batch.mask[0]], expected[:, 0].numpy())
    shown = [inputs[key] for key in ("pixel_values", "pixel_values_videos") if key in inputs]
    if shown:
        (seen,) = batch.images.values()
        count = sum(map(len, shown))
        sums = [seen.given.pixels[:count].sum(), torch.cat(shown).sum().numpy()]
        np.testing.assert_allclose(*sums, rtol=1e-4, atol=1e-2)


def test_placeholders_stand_for_marks_and_times(port: Port):
    """One -200, an <image>, and what chat templates write, read the same."""
    video, image = film(3, 2, 2, 2.0, False), picture(30, 20)
    first = port.processor.tokenize("")
    ids, padded = [*first, -200, -200], [*first, IMAGE, VIDEO]
    one, two, three = (
        port.processor([image, video], input_ids=[ids]),
        port.processor([image, video], input_ids=[padded]),
        port.processor([image, video], prompts=[f"{PICTURE}{MOVIE}"]),
    )
    assert (one.tokens == two.tokens).all() and (one.tokens == three.tokens).all()
    assert (one.visual == three.visual).all() and (one.place == three.place).all()
    assert_ids(three, 0, process(port, f"{PICTURE}{MOVIE}", [image], [video])["input_ids"][0])


GRIDS = st.lists(st.tuples(*[st.integers(1, 40)] * 2), min_size=1, max_size=4)


@hypothesis.given(grids=GRIDS, side=st.integers(2, 48))
def test_learned_positions_are_stretched_as_transformers_does(grids: list, side: int):
    thw = torch.tensor([[1, 2 * high, 2 * wide] for high, wide in grids])
    indices, weights = get_vision_interpolation_indices_and_weights(
        thw, side, align_corners=True, spatial_merge_size=2
    )
    places = []
    for _, high, wide in thw.tolist():
        at = np.stack(np.mgrid[:high, :wide], axis=-1).reshape(high // 2, 2, wide // 2, 2, 2)
        places.append(at.swapaxes(1, 2).reshape(-1, 2))
    place = np.concatenate([*places, np.zeros((3, 2), int)])  # padding at the end
    found, shares = stretched(place, back([len(x) for x in places], len(place)), side)
    assert (found[:-3] == indices.numpy()).all() and (shares[:-3] == weights.numpy()).all()
    assert (found[-3:, 0] == 0).all() and (shares[-3:] == [1, 0, 0, 0]).all()


@pytest.mark.parametrize("capped", [True, False])
def test_sizes_of_frames(port: Port, capped: bool):
    """200 videos of any size; too thin ones are refused by both."""
    rng = np.random.default_rng(0)
    path = port.model.config.branches[0].architecture
    theirs = video_processor(max_video_tokens=3, cap_pixels_per_frame=capped)
    limit = 3 * 8 * 8 if capped else None
    ours = type(path)(path.encoder, path.connector, path.images, path.videos, 0, 0, limit=limit)
    for _ in range(200):
        count, wide, high = rng.integers(2, 12), *np.exp(rng.uniform(0, 7, 2)).astype(int)
        video = Video((Image.new("RGB", (int(wide), int(high))),) * int(count))
        options = {"num_frames": count, "temporal_factor": 2, "factor": 8}
        size = video_processor().size
        try:
            expected = theirs.get_num_of_video_patches(int(count), int(high), int(wide))
        except ValueError:
            with pytest.raises(InputError, match="sides of at most 200 to 1"):
                ours.frame_size(video)
            continue
        found = ours.frame_size(video)
        assert found[0] * found[1] // 16 * -(-count // 2) == expected
        if not capped:
            limits = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
            sides = VIDEOS.smart_resize(height=int(high), width=int(wide), **limits, **options)
            assert found == sides[::-1]


@pytest.mark.parametrize("options", [{}, {"fps": 0.7}, {"fps": None, "num_frames": 5}])
def test_frames_that_are_read(options: dict):
    theirs = video_processor(**options)
    ours = Frames(options.get("num_frames"), options.get("fps") or 2.0)
    for total, rate in ((1, 30.0), (3, 24.0), (100, 29.97), (301, 12.5), (90000, 25.0)):
        metadata = SimpleNamespace(total_num_frames=total, fps=rate)
        given = {"num_frames": theirs.num_frames, "fps": theirs.fps}
        expected = theirs.sample_frames(metadata, **given)
        np.testing.assert_array_equal(ours.choose(total, rate), expected)


@torch.no_grad()
def test_tower_mergers_and_what_the_llm_adds(port: Port):
    """Three sizes and a video in one sequence: states of all layers, tokens, DeepStack's."""
    images = [picture(61, 47), picture(30, 500), picture(20, 20)]
    video = Video((picture(40, 24),) * 2 + (picture(41, 24).resize((40, 24)),))
    batch = port.processor([[*images, video]], input_ids=[[-200] * 4])
    ((name, seen),) = batch.images.items()
    inputs = process(port, PICTURE * 3 + MOVIE, images, [video])
    pixels = torch.cat([inputs["pixel_values"], inputs["pixel_values_videos"]])
    grids = torch.cat([inputs["image_grid_thw"], inputs["video_grid_thw"]])
    count = len(pixels)
    np.testing.assert_allclose(seen.given.pixels[:count], pixels.numpy(), atol=1e-6)
    branch, visual = port.model.branches[name], port.theirs.model.visual
    states: list[np.ndarray] = []
    hooks = [
        layer.register_forward_hook(lambda _, __, out: states.append(out.numpy()))
        for layer in visual.blocks
    ]
    out = visual(pixels, grid_thw=grids)
    for hook in hooks:
        hook.remove()
    taps = jax.jit(lambda b, x: b.encoder(x.pixels, (1, 2, 3, 4), **x.where))(branch, seen.given)
    for k, (found, expected) in enumerate(zip(taps, states, strict=True)):
        assert_close(np.asarray(found)[0, :count], expected, k)
    (memory,) = jax.jit(Model.memories)(port.model, batch.images)
    at = batch.visual[batch.visual >= 0]
    assert_close(np.asarray(memory.values)[at], out.pooler_output.numpy())
    for k, expected in enumerate(out.deepstack_features):
        assert_close(np.asarray(memory.deep)[k, at], expected.numpy(), k)


def test_bad_videos(port: Port):
    path = port.model.config.branches[0].architecture
    with pytest.raises(InputError, match="video: found frames: 1, expected at least 2"):
        path.prepare([[Video((Image.new("RGB", (8, 8)),))]])
    with pytest.raises(InputError, match="frames of one size"):
        path.prepare([[Video((Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9))))]])


def test_fifty_pictures_need_few_programs(port: Port):
    """One a length of the sequence, learned positions included; two processes make one batch."""
    rng = np.random.default_rng(0)
    path = port.model.config.branches[0].architecture
    keys, lengths = set(), set()
    for _ in range(50):
        inputs = path.prepare([[Image.new("RGB", tuple(rng.integers(8, 300, 2).tolist()))]]).inputs
        shapes = [x.shape for x in jax.tree.leaves(inputs)]
        keys.add((str(shapes), jax.tree.structure(inputs)))
        lengths.add(len(inputs.pixels))
    assert len(keys) == len(lengths) <= 4
    shares = [path.prepare([[Image.new("RGB", size)]], slots=2) for size in ((20, 30), (60, 9))]
    joined = jax.tree.map(lambda *x: np.concatenate(x), *(share.inputs for share in shares))
    alone = stretched(joined.place, joined.frames, path.encoder.side)
    assert (joined.indices == alone[0]).all() and (joined.weights == alone[1]).all()
