"""Tokens of pictures in rows: by hand on small numbers."""

import numpy as np
import pytest

from vfjax.architectures.base import Inputs, Prepared, Run
from vfjax.fusion.shard import Shard
from vfjax.fusion.splice import Slots, expand, layout, pad

PICTURE = -200
INPUTS = Inputs(np.zeros((1, 2, 2, 3), np.float32))


def seen(*numbers: int) -> Slots:
    n = len(numbers)
    zeros = np.zeros(n, np.int64)
    return Slots(zeros, np.array(numbers), zeros + 1, np.zeros((n, 3), np.int64), zeros + 1)


def test_placeholders_are_expanded():
    row = np.array([5, PICTURE, 6, PICTURE])
    slots, at = expand(row, [[seen(0, 1, 2)], [seen(3)]])
    assert slots.ids.tolist() == [5, 0, 0, 0, 6, 0]
    assert slots.visual.tolist() == [-1, 0, 1, 2, -1, 3]
    assert slots.segments.tolist() == [0, 1, 1, 1, 0, 1]
    assert at.tolist() == [0, 1, 1, 1, 2, 3]


def marked(start: int, end: int, number: int) -> Slots:
    """A picture of one token between marks."""
    ids, visual = np.array([start, 0, end]), np.array([-1, number, -1])
    return Slots(ids, visual, np.ones(3, int), np.zeros((3, 3), int), np.ones(3, int))


@pytest.mark.parametrize(
    ("row", "expected", "at"),
    [
        ([5, PICTURE, 6], [5, 7, 0, 8, 6], [0, 1, 1, 1, 2]),
        ([7, PICTURE, 8, 7, PICTURE, 8], [7, 0, 8] * 2, [1, 1, 1, 4, 4, 4]),
        ([7, PICTURE, PICTURE, 8], [7, *[7, 0, 8] * 2, 8], [0, 1, 1, 1, 2, 2, 2, 3]),
        ([8, PICTURE, 7], [8, 7, 0, 8, 7], [0, 1, 1, 1, 2]),
    ],
)
def test_marks_that_a_row_has_are_read_once(row: list, expected: list, at: list):
    slots, found = expand(np.array(row), [[marked(7, 8, i)] for i in range(row.count(PICTURE))])
    assert slots.ids.tolist() == expected and found.tolist() == at


def test_the_outermost_marks_are_read_once():
    """Of a video whose frames have marks of their own within."""
    ids, visual = np.array([7, 9, 7, 0, 8, 8]), np.array([-1, -1, -1, 0, -1, -1])
    ones = np.ones(6, int)
    slots, at = expand(
        np.array([5, 7, PICTURE, 8, 6]), [[Slots(ids, visual, ones, np.zeros((6, 3), int), ones)]]
    )
    assert slots.ids.tolist() == [5, 7, 9, 7, 0, 8, 8, 6]
    assert at.tolist() == [0, 2, 2, 2, 2, 2, 2, 4]


def test_each_branch_brings_its_own_marks():
    row = np.array([5, 3, PICTURE, 4, 6])
    slots, _ = expand(row, [[seen(0), marked(7, 8, 1), marked(3, 4, 2)]])
    assert slots.ids.tolist() == [5, 0, 7, 0, 8, 3, 0, 4, 6]


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_are_filled_on_one_side(side: str):
    rows = [Slots.text(np.array([5, 6])), seen(3, 4, 7)]
    slots, mask = pad(rows, 4, side)
    real = slice(2, 4) if side == "left" else slice(0, 2)
    assert mask.sum(axis=1).tolist() == [2, 3]
    assert slots.ids[0, real].tolist() == [5, 6] and mask[0, real].all()
    assert slots.visual[mask].tolist() == [-1, -1, 3, 4, 7]
    assert set(slots.visual[~mask]) == {-1} and set(slots.steps[~mask]) == {1}
    assert not slots.ids[~mask].any() and not slots.segments[~mask].any()
    assert {a.dtype.name for a in (slots.ids, slots.visual, slots.place)} == {"int32"}


def test_tokens_made_of_others_stand_behind_the_memory():
    """Two of three tokens as they are, one the mean of two; a mark between them."""
    run = Run(
        np.array([[0, 0], [0, 1], [0, 0], [2, 2]]),
        np.array([[1, 0], [0.5, 0.5], [1, 0], [1, 0]], np.float32),
        marks=np.array([-1, -1, 9, -1]),
    )
    (slots,), gather, count = layout(Prepared(INPUTS, [run], 3), first=10, branch=1)
    assert slots.ids.tolist() == [0, 0, 9, 0]
    assert slots.visual.tolist() == [10, 13, -1, 12]
    assert slots.segments.tolist() == [2] * 4
    assert count == 4
    assert gather.indices.tolist() == [[0, 1]] and gather.weights.tolist() == [[0.5, 0.5]]


def test_a_share_counts_in_the_memory_of_all():
    """Two processes' 4 tokens of their own each, then 1 that both share."""
    run = Run.of(np.array([0, 3, 4]))
    shard = Shard(index=1, count=2, length=8, pictures=1, text=8)
    (slots,), gather, count = layout(Prepared(INPUTS, [run], 5, shared=1), 0, 0, shard)
    assert slots.visual.tolist() == [4, 7, 8]
    assert (gather, count) == (None, 9)
