"""Runs of text and visual tokens."""

import numpy as np

from vfjax.architectures import Run


def test_text_and_visual_tokens_interleaved():
    parts = ["a", (7, 8), np.array([4, 5]), (), "b", np.array([2])]
    run = Run.interleaved(parts)
    assert run.words == ("a", "b")
    assert run.text.tolist() == [-2, 7, 8, -1, -1, -3, -1]
    assert run.indices[run.text == -1, 0].tolist() == [4, 5, 2]
    said = run.tokenized({"a": [30], "b": [40, 41]}.__getitem__)
    assert said.text.tolist() == [30, 7, 8, -1, -1, 40, 41, -1]
    assert said.indices[said.text == -1, 0].tolist() == [4, 5, 2] and not said.words


def test_runs_of_other_widths_joined():
    """Of a mean of two tokens and a lone one."""
    mean = Run(np.array([[0, 1]]), np.array([[0.5, 0.5]], np.float32))
    joined = Run.join([mean, Run.of(np.array([3]))])
    assert joined.indices.tolist() == [[0, 1], [3, 3]]
    assert joined.weights.tolist() == [[0.5, 0.5], [1, 0]]


def test_a_videos_frames_pooled():
    """Of each frame by itself; a rest is dropped."""
    run = Run.pooled([np.arange(5), np.arange(5, 10)], 2)
    assert run.indices.tolist() == [[0, 1], [2, 3], [5, 6], [7, 8]]
