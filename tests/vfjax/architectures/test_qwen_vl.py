"""Qwen-VL's places, marks and lengths of sequences, on the host, against transformers."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, settings
from hypothesis import strategies as st
from PIL import Image

from tests.qwen_vl import START, VISION, Port, open_port
from vfjax import InputError, Video
from vfjax.architectures.qwen_vl import length
from vfjax.fusion.segments import running
from vfjax.llm import Cache
from vfjax.vision import native

PADDING = st.sampled_from(["left", "right"])


@pytest.fixture(scope="module", params=VISION)
def port(request, tmp_path_factory) -> Port:
    return open_port(tmp_path_factory.mktemp(request.param) / "port", request.param)


LAYOUT = st.lists(
    st.one_of(
        st.integers(1, 5),  # words
        st.tuples(st.integers(2, 60), st.integers(2, 60)),  # a picture
        st.tuples(
            st.integers(1, 5), st.integers(1, 6), st.integers(1, 6), st.none() | st.floats(0.1, 30)
        ),
    ),
    min_size=1,
    max_size=6,
)
"""Of a row; the last kind is a video: frames, units of its sides, seconds."""


@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@example(layouts=[[(5, 1, 1, 20.0)], [3]], padding="left")  # time beyond the text after it
@hypothesis.given(layouts=st.lists(LAYOUT, min_size=1, max_size=3), padding=PADDING)
def test_positions_are_transformers(port: Port, layouts: list, padding: str):
    """Of pictures, videos and words in any order, and of the tokens that are decoded then."""
    rows, media, pictures, films, seconds = [], list[list](), [], [], []
    for layout in layouts:
        rows.append([7])
        media.append([])
        for part in layout:
            if isinstance(part, int):
                rows[-1] += [7] * part
                continue
            rows[-1].append(-200)
            if len(part) == 2:
                media[-1].append(Image.new("RGB", part))
            else:
                count, high, wide, length = part
                frame = Image.new("RGB", (8 * wide, 8 * high))
                media[-1].append(Video((frame,) * count, duration=length))
    try:
        batch = port.processor(media, input_ids=rows, padding=padding)
    except InputError as error:
        assert "tokens, visual ones included" in str(error)
        return
    path = port.model.config.branches[0].architecture
    for each in (x for row in media for x in row):
        if isinstance(each, Video):
            wide, high = native.fit(each.frames[0].size, path.videos)
            films.append([-(-len(each.frames) // 2), high // 4, wide // 4])
            seconds.append(2 / (len(each.frames) / each.duration if each.duration else 24))
        else:
            wide, high = native.fit(each.size, path.images)
            pictures.append([1, high // 4, wide // 4])
    kinds = np.where(batch.visual >= 0, 1, 0)
    for i, row in enumerate(media):
        at = np.flatnonzero((batch.place[i] == 0).all(axis=1) & (batch.tokens[i] == START))
        for each, first in zip(row, at, strict=True):
            if isinstance(each, Video):
                rest = kinds[i, first + 1 :]
                rest[: np.argmin(rest) if not rest.all() else len(rest)] *= 2
    found = np.asarray(running(batch.mask, batch.place, batch.steps))
    expected, deltas = port.theirs.model.get_rope_index(
        torch.tensor(batch.tokens.astype(np.int64)),
        torch.tensor(kinds),
        image_grid_thw=torch.tensor(pictures) if pictures else None,
        video_grid_thw=torch.tensor(films) if films else None,
        second_per_grid_ts=torch.tensor(seconds) if seconds else None,
        attention_mask=torch.tensor(batch.mask),
    )
    np.testing.assert_array_equal(found[:, batch.mask], expected[:, batch.mask].numpy())
    new = Cache.empty(*batch.mask.shape, 1, 1, 2, np.float32)
    cache, _, _ = new.extend(jnp.asarray(batch.mask), jnp.asarray(found))
    assert (cache.length - batch.mask.sum(axis=1) == deltas[:, 0].numpy()).all()


def test_fifty_pictures_need_few_programs(port: Port):
    """One a length of the sequence: what is compiled hangs on shapes and static fields alone."""
    rng = np.random.default_rng(0)
    path = port.model.config.branches[0].architecture
    keys, lengths = set(), set()
    for _ in range(50):
        image = Image.new("RGB", tuple(rng.integers(8, 300, 2).tolist()))
        inputs = path.prepare([[image]]).inputs
        shapes = [x.shape for x in jax.tree.leaves(inputs)]
        keys.add((str(shapes), jax.tree.structure(inputs)))
        lengths.add(len(inputs.pixels))
    assert len(keys) == len(lengths) <= 4  # 64, 96, 128, 192 of at most 160 patches


def test_shares_of_two_processes_are_one_sequence(port: Port):
    """Of as many patches, whatever their pictures; segments are told from where a patch stands."""
    path = port.model.config.branches[0].architecture
    shares = [path.prepare([[Image.new("RGB", size)]], slots=2) for size in ((20, 30), (60, 9))]
    joined = jax.tree.map(lambda *x: np.concatenate(x), *(share.inputs for share in shares))
    count = len(shares[0].inputs.pixels)
    assert shares[0].size == shares[1].size == count // 4
    for name in ("frames", "windows"):
        own = [np.arange(count) + getattr(share.inputs, name) for share in shares]
        starts = np.arange(2 * count) + getattr(joined, name)
        assert starts.tolist() == [*own[0], *(own[1] + count)]


def test_lengths():
    """At most 21 to 65536 patches, each at most half again as long as what it holds."""
    found = [length(n) for n in range(1, 65537)]
    assert len(set(found)) == 21
    assert all(n <= size <= max(64, n * 3 / 2) for n, size in enumerate(found, 1))
    assert all(size % 256 == 0 for size in found if size >= 512)
