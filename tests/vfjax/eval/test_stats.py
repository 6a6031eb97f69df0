"""Intervals and paired tests."""

import numpy as np
import pytest

from vfjax.eval import Metric, intervals, paired
from vfjax.eval.stats import ratio, total


def test_metrics_by_hand() -> None:
    assert ratio([1, 0, 1, 0]).value == 50
    assert ratio([2, 1], [2, 4], scale=1).value == 0.5
    assert ratio([0, 0], [0, 0]).value == 0
    assert total([ratio([1, 0]), ratio([1, 1])]).value == 150
    assert total([ratio([1, 0]), ratio([1, 1])], mean=True).value == 75


def test_the_interval_of_a_mean_is_the_normal_one() -> None:
    rng = np.random.default_rng(0)
    right = rng.random(800) < 0.7
    metric = ratio(right)
    found = intervals({"a": metric}, [str(i) for i in range(800)])["a"]
    width = 1.96 * 100 * np.sqrt(right.mean() * (1 - right.mean()) / 800)
    np.testing.assert_allclose(found, (metric.value - width, metric.value + width), atol=0.4)


def test_clusters_widen_the_interval_and_intervals_cover() -> None:
    rng = np.random.default_rng(1)
    right = np.repeat(rng.random(50) < 0.5, 8)
    metric = {"a": ratio(right)}
    alone = intervals(metric, [str(i) for i in range(400)])["a"]
    together = intervals(metric, [str(i // 8) for i in range(400)])["a"]
    assert together[1] - together[0] > 2 * (alone[1] - alone[0])
    hits = 0
    for seed in range(100):
        draw = ratio(np.random.default_rng(seed).random(200) < 0.3)
        low, high = intervals({"a": draw}, [str(i) for i in range(200)], draws=400)["a"]
        hits += low <= 30 <= high
    assert 88 <= hits <= 100


def test_sums_of_ratios_are_drawn_together() -> None:
    """A sum of an accuracy and the share of errors is 100 in every draw."""
    right = np.random.default_rng(0).random(100) < 0.5
    whole = total([ratio(right), ratio(~right)])
    found = intervals({"sum": whole, "none": Metric(3.0)}, [str(i) for i in range(100)])
    assert found == {"sum": (100, 100)}  # and what is no sum of ratios has no interval


def test_a_pair_benchmark_has_no_width_for_a_constant() -> None:
    clusters = [str(i // 2) for i in range(300)]
    assert intervals({"a": ratio([1, 0] * 150)}, clusters) == {"a": (50, 50)}


def test_paired() -> None:
    rng = np.random.default_rng(0)
    clusters = [str(i) for i in range(500)]
    a, b = rng.random(500) < 0.8, rng.random(500) < 0.6
    found = paired({"x": ratio(a), "only": ratio(a)}, {"x": ratio(b)}, clusters)
    assert set(found) == {"x"}
    row = found["x"]
    assert row["difference"] == pytest.approx(100 * (a.mean() - b.mean()))
    assert 0 < row["low"] < row["difference"] < row["high"] and row["p"] <= 0.001
    same = paired({"x": ratio(a)}, {"x": ratio(a)}, clusters)["x"]
    assert same["difference"] == same["low"] == same["high"] == 0 and same["p"] == 1
    near = paired({"x": ratio(a)}, {"x": ratio(np.roll(a, 1))}, clusters)["x"]
    assert near["p"] > 0.5


def test_the_seed_fixes_the_interval() -> None:
    metric, clusters = {"a": ratio([1, 0, 0, 1, 1])}, list("abcde")
    one, same, other = (intervals(metric, clusters, draws=50, seed=s) for s in (0, 0, 1))
    assert one == same != other
