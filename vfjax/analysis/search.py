"""Which coefficients to fuse with, by answers alone."""

from collections.abc import Sequence

import numpy as np


def agreement(answers: Sequence[Sequence[str]]) -> np.ndarray:
    """How much each candidate's answers agree with its neighbours', without labels.

    The idea of AdaMMS (arXiv 2503.23733, "unsupervised hyper-parameter selection"): along a line of
    coefficients, models whose answers change least are the best, or near it. Known of the paper:
    one coefficient, a grid of 0.1 from 0.4 to 1.0, chosen by consistency of generations on a small
    unlabelled subset. Ours: agreement is the share of questions with the same text, the mean over
    the neighbours there are, so that an end of the line has one.

    A line whose end leads to a model that answers everything alike is consistent there too: begin
    the grid above zero.

    Args:
        answers: of each candidate, in the order of the line, at least two; the same questions.

    Returns:
        float64[candidates], 0 to 1.
    """
    texts = np.array([list(a) for a in answers], dtype=object)
    same = (texts[1:] == texts[:-1]).mean(axis=1).astype(float)
    sums = np.append(same, 0.0) + np.append(0.0, same)
    count = np.array([1.0, *[2.0] * (len(texts) - 2), 1.0])
    return sums / count


def apart(clusters: Sequence[str], share: float, seed: int) -> np.ndarray:
    """A split of questions for which clusters, such as those about one picture, stay whole.

    Args:
        clusters: of each question.
        share: of the clusters that are held out, between 0 and 1.
        seed: of the draw.

    Returns:
        bool[n], True where a question is held out; both parts have a cluster if there are two.
    """
    names = np.unique(np.asarray(clusters))
    drawn = np.random.default_rng(seed).permutation(len(names))
    count = min(max(round(share * len(names)), 1), len(names) - 1)
    return np.isin(np.asarray(clusters), names[drawn[:count]])
