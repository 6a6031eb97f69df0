"""Metrics as sums of ratios, their bootstrap intervals, and a paired test between two models."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

DRAWS = 5_000
CONFIDENCE = 95.0


@dataclasses.dataclass(frozen=True)
class Metric:
    """A number, and the shares of the questions in it.

    Attributes:
        value: as the benchmark defines it.
        terms: (scale, numerators float64[n], denominators float64[n]) of the n questions; the value
            is the sum over the terms of scale * sum(numerators) / sum(denominators), where 0 / 0
            is 0. Empty for a metric that is no such sum, which then has no interval.
    """

    value: float
    terms: tuple[tuple[float, np.ndarray, np.ndarray], ...] = ()


def ratio(
    numerators: Sequence[float] | np.ndarray,
    denominators: Sequence[float] | np.ndarray | None = None,
    *,
    scale: float = 100.0,
    value: float | None = None,
) -> Metric:
    """A metric of one term; a mean over the questions without denominators.

    Args:
        numerators: [n].
        denominators: [n].
        scale: 100 for per cent.
        value: where a library has computed it; by default the ratio.
    """
    top = np.asarray(numerators, np.float64)
    bottom = np.ones_like(top) if denominators is None else np.asarray(denominators, np.float64)
    whole = scale * divided(top.sum(), bottom.sum()) if value is None else value
    return Metric(float(whole), ((scale, top, bottom),))


def total(metrics: Sequence[Metric], *, mean: bool = False, value: float | None = None) -> Metric:
    """The sum, or the mean, of metrics of the same questions."""
    share = 1 / len(metrics) if mean else 1.0
    terms = tuple((share * scale, *rest) for metric in metrics for scale, *rest in metric.terms)
    whole = share * sum(metric.value for metric in metrics) if value is None else value
    return Metric(float(whole), terms)  # type: ignore[arg-type]


def divided(top: ArrayLike, bottom: ArrayLike) -> np.ndarray:
    """Their quotient, float64, 0 where the divisor is."""
    top, bottom = np.asarray(top), np.asarray(bottom)
    return np.divide(top, bottom, out=np.zeros_like(top, dtype=np.float64), where=bottom != 0)


def intervals(
    metrics: Mapping[str, Metric], clusters: Sequence[str], *, draws: int = DRAWS, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """95 % percentile bootstrap intervals (Efron and Tibshirani, chapter 13).

    Clusters, not questions, are drawn again: questions about one picture stand or fall together.
    If all clusters score the same, as with a constant answer to MMVP's pairs, there is no width.

    Args:
        metrics: of the same n questions.
        clusters: of each question.
        draws: bootstrap samples.
        seed: of the draws.
    """
    drawn = _drawn(metrics, clusters, draws, seed)
    edges = (50 - CONFIDENCE / 2, 50 + CONFIDENCE / 2)
    found = {name: np.percentile(values, edges) for name, values in drawn.items()}
    return {name: (float(low), float(high)) for name, (low, high) in found.items()}


def paired(
    metrics: Mapping[str, Metric],
    others: Mapping[str, Metric],
    clusters: Sequence[str],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Differences to another model's metrics of the same questions, by paired bootstrap.

    Both models are scored on the same draws of clusters. p is the share of draws, counted on both
    sides, in which the difference has the other sign (Efron and Tibshirani, chapter 16).

    Args:
        metrics: of one model.
        others: of the other.
        clusters: of each question.
        draws: bootstrap samples; p is no smaller than one by them.
        seed: of the draws.

    Returns:
        Metric -> "difference", "low" and "high" of its 95 % interval, and "p".
    """
    ours, theirs = (_drawn(each, clusters, draws, seed) for each in (metrics, others))
    edges, out = (50 - CONFIDENCE / 2, 50 + CONFIDENCE / 2), {}
    for name in ours.keys() & theirs.keys():
        gap = ours[name] - theirs[name]
        low, high = np.percentile(gap, edges)
        share = min((gap <= 0).mean(), (gap >= 0).mean())
        out[name] = {
            "difference": metrics[name].value - others[name].value,
            "low": float(low),
            "high": float(high),
            "p": float(np.clip(2 * share, 1 / draws, 1)),
        }
    return {name: out[name] for name in ours if name in out}


def _drawn(
    metrics: Mapping[str, Metric], clusters: Sequence[str], draws: int, seed: int
) -> dict[str, np.ndarray]:
    """Each metric's values float64[draws] on clusters drawn again; the same draws for one seed."""
    names, index = np.unique(np.asarray(clusters), return_inverse=True)
    columns = [x for m in metrics.values() for _, *pair in m.terms for x in pair]
    if not columns:
        return {}
    table = np.zeros((len(names), len(columns)))
    np.add.at(table, index, np.stack(columns, axis=1))
    rng = np.random.default_rng(seed)
    count = len(names)
    sums = np.stack(
        [np.bincount(rng.integers(0, count, count), minlength=count) @ table for _ in range(draws)]
    )
    out, at = {}, 0
    for name, metric in metrics.items():
        values = np.zeros(draws)
        for scale, *_ in metric.terms:
            values += scale * divided(sums[:, at], sums[:, at + 1])
            at += 2
        if metric.terms:
            out[name] = values
    return out
