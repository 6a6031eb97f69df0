"""The analysis as pictures; matplotlib (extra "analysis")."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from vfjax.atomic import replacing
from vfjax.eval.extras import needs

if TYPE_CHECKING:  # it is in an extra
    from matplotlib.figure import Figure

Heats = Mapping[str, np.ndarray]
"""Label -> map float[h, w]."""
Box = Sequence[float]


def _save(figure: "Figure", file: Path) -> None:
    with replacing(file) as part:
        figure.savefig(part, dpi=110, format="png")


def _figure(width: float, height: float) -> "Figure":
    figure = needs("matplotlib.figure", "analysis", "matplotlib", "figures")
    return figure.Figure(figsize=(width, height), layout="constrained")


def overlays(file: Path, rows: Sequence[tuple[Image.Image, str, Heats, Box | None]]) -> None:
    """Maps over pictures, a row a picture, a column a label; each map's smallest to largest value.

    Args:
        file: PNG to write.
        rows: picture, title, maps, and the box of what is asked for or None; all with the same
            labels.
    """
    labels = list(rows[0][2])
    figure = _figure(2.2 * (1 + len(labels)), 2.5 * len(rows))
    grid = figure.subplots(len(rows), 1 + len(labels), squeeze=False)
    for axes, (picture, title, heats, box) in zip(grid, rows, strict=True):
        for panel, label in zip(axes, ("", *labels), strict=True):
            panel.imshow(picture)
            if label:
                heat = Image.fromarray(_stretched(heats[label])).resize(
                    picture.size, Image.Resampling.BICUBIC
                )
                panel.imshow(np.asarray(heat).clip(0, 1), cmap="jet", alpha=0.5, vmin=0, vmax=1)
            if box is not None:
                xs, ys = (np.array(box[i::2]) * picture.size[i] - 0.5 for i in (0, 1))
                panel.plot(xs[[0, 1, 1, 0, 0]], ys[[0, 0, 1, 1, 0]], "w--", linewidth=1)
            panel.set_title(label or title, fontsize=8)
            panel.set_axis_off()
    _save(figure, file)


def _stretched(heat: np.ndarray) -> np.ndarray:
    low, high = heat.min(), heat.max()
    return ((heat - low) / max(high - low, 1e-30)).astype(np.float32)


def lines(
    file: Path,
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    xlabel: str,
    ylabel: str,
    *,
    first: int = 0,
    limits: tuple[float, float] = (0, 1),
) -> None:
    """Panels side by side, each with named lines over layers.

    Args:
        file: PNG to write.
        panels: title -> label -> values.
        xlabel: of all.
        ylabel: of the first.
        first: number of the first value.
        limits: of the values.
    """
    figure = _figure(1 + 3.1 * len(panels), 3)
    plots = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, rows) in zip(plots, panels.items(), strict=True):
        for label, values in rows.items():
            axes.plot(np.arange(first, first + len(values)), values, "o-", label=label)
        axes.set(title=title, xlabel=xlabel, ylim=limits)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize=7)
    plots[0].set_ylabel(ylabel)
    _save(figure, file)


def scatter(file: Path, points: Mapping[str, np.ndarray], names: tuple[str, str]) -> None:
    """Points float[n, 2] of each label in one plane, whose axes have names."""
    figure = _figure(6, 4.5)
    axes = figure.subplots()
    for label, xy in points.items():
        axes.plot(*xy.T, "o", markersize=4, alpha=0.6, label=label)
    axes.set(xlabel=names[0], ylabel=names[1])
    axes.legend()
    _save(figure, file)


def matrices(file: Path, tables: Mapping[str, np.ndarray], labels: Sequence[str]) -> None:
    """Square tables side by side, each with its numbers; NaN is left blank."""
    size = 1.4 + 0.75 * len(labels)
    figure = _figure(size * len(tables), size)
    plots = figure.subplots(1, len(tables), squeeze=False)[0]
    for axes, (title, table) in zip(plots, tables.items(), strict=True):
        highest = max([0.0, *table[np.isfinite(table)]])  # unbiased measures may all be below 0
        axes.imshow(table, cmap="viridis", vmin=0, vmax=highest)
        for (i, j), value in np.ndenumerate(table):
            if np.isfinite(value):
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", color="w", fontsize=8)
        axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right", fontsize=7)
        axes.set_yticks(range(len(labels)), labels, fontsize=7)
        axes.set_title(title, fontsize=9)
    _save(figure, file)


def curves(
    file: Path,
    panels: Sequence[tuple[str, Sequence[float], Mapping[str, Sequence[float]], float]],
    xlabel: str,
    ylabel: str,
    *,
    columns: int = 3,
) -> None:
    """A panel a search: named curves over one variable, and the value that was chosen.

    Args:
        file: PNG to write.
        panels: title, the variable, label -> values, and the choice.
        xlabel: of all.
        ylabel: of the first of a row.
        columns: panels in a row.
    """
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = _figure(1 + 3.1 * columns, 3 * rows)
    plots = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes in plots.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (title, xs, labelled, choice) in zip(plots.flat, panels, strict=False):
        for label, values in labelled.items():
            axes.plot(xs, values, "o-", label=label)
        axes.axvline(choice, color="grey", linestyle="--", linewidth=1)
        axes.set(title=title, xlabel=xlabel)
        axes.legend(fontsize=7)
    for axes in plots[:, 0]:
        axes.set_ylabel(ylabel)
    _save(figure, file)
