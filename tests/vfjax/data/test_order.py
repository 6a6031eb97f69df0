"""The order of rows: every one an epoch, whatever the sizes; one modality a step."""

import collections
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tests.checkpoints import tokenizer_files
from vfjax import Processor
from vfjax.architectures import Llava, MLPConfig, ProjectorConfig
from vfjax.data import Batches
from vfjax.llm import LlamaConfig
from vfjax.model import BranchConfig, ModelConfig
from vfjax.vision.encoders import CLIPConfig
from vfjax.vision.images import ImageSpec

HALF = (0.5, 0.5, 0.5)


@pytest.fixture(scope="module")
def processor(tmp_path_factory) -> Processor:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer_files(folder)
    branch = BranchConfig(
        "clip",
        Llava(
            CLIPConfig(patch=14, image_size=28),
            ProjectorConfig(MLPConfig(8, 8)),
            ImageSpec(28, 28, "squash", "crop", HALF, HALF),
        ),
    )
    config = ModelConfig((branch,), LlamaConfig(320, 8, 1, 2, 2, 4, 8, 600))
    return Processor(config, AutoTokenizer.from_pretrained(folder), template="llava_llama_2")


class Lengths:
    """Of a data set's rows, what their order hangs on."""

    path = Path("rows.json")

    def __init__(self, count: int):
        self.pictures = np.arange(count) % 3 % 2
        self.videos = np.zeros(count, bool)
        self.characters = np.arange(count) * 37 % 101

    def __len__(self) -> int:
        return len(self.pictures)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 60), min_size=1, max_size=3),
    share=st.integers(1, 7),
    hosts=st.integers(1, 4),
    parts=st.integers(1, 3),
    window=st.integers(1, 20),
    by_modality=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_row_once_an_epoch(processor, counts, share, hosts, parts, window, by_modality, seed):
    """Whatever the sizes; the last step is filled with the epoch's first rows."""
    batches = Batches(
        [(Lengths(count), count) for count in counts],
        processor,
        batch=share * hosts,
        accumulate=parts,
        seed=seed,
        window=window,
        by_modality=by_modality,
        process_index=hosts - 1,
        process_count=hosts,
    )
    total, size = sum(counts), share * hosts * parts
    assert len(batches) == batches.epoch_size == -(-total // size)
    batches.steps *= 3
    for epoch in range(3):
        steps = range(epoch * batches.epoch_size, (epoch + 1) * batches.epoch_size)
        rows = [row for step in steps for row in batches.rows(step)]
        found = collections.Counter(rows)
        assert set(found) == {(k, i) for k, count in enumerate(counts) for i in range(count)}
        twice = len(rows) - total
        assert sum(found.values()) == len(steps) * size
        assert max(found.values()) - min(found.values()) <= 1 and twice < size
        if window == 1 and twice < total:
            assert rows[total:] == rows[:twice]


def test_small_data_are_seen(processor):
    """500, 1,000 and 10,000 rows at batch 128: 4, 8 and 79 steps, no row left out."""
    for count, steps in ((500, 4), (1000, 8), (10_000, 79)):
        for window in (1, 16):
            batches = Batches([(Lengths(count), 1)], processor, batch=128, seed=0, window=window)
            assert len(batches) == steps
            seen = collections.Counter(row for step in range(steps) for row in batches.rows(step))
            assert len(seen) == count
            assert sorted(seen.values()) == [1] * (2 * count - 128 * steps) + [2] * (
                128 * steps - count
            )


def test_a_step_has_one_modality(processor):
    """As LLaVA's: whole steps of either, in random order; what is left of both at the end."""
    data = Lengths(100)  # 67 without pictures, 33 with one
    batches = Batches([(data, 1)], processor, batch=8, seed=4, by_modality=True, steps=26)
    for first in (0, 13):
        kinds = [
            {bool(data.pictures[i]) for _, i in batches.rows(step)}
            for step in range(first, first + 12)
        ]
        assert all(len(kind) == 1 for kind in kinds)
        assert sum(kind == {True} for kind in kinds) == 4
        order = [True in kind for kind in kinds]
        assert order not in (sorted(order), sorted(order, reverse=True))
    assert batches.rows(0) != batches.rows(13)


def test_rows_without_end(processor):
    """A step that reaches into the next epoch: no row comes a second time before all came once."""
    batches = Batches([(Lengths(21), 1)], processor, batch=8, seed=1, steps=21, endless=True)
    rows = [row for step in range(21) for row in batches.rows(step)]
    for first in range(0, 168, 21):
        assert len(set(rows[first : first + 21])) == 21
