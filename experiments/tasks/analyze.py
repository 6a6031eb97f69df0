"""Draws where members and their fusion look, how alike their features are, what layers know."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

import converters
from converters.export import to_bytes
from converters.files.paths import stand_in
from experiments.family import encoders, scenes
from experiments.tasks.common import FAMILY, check_config, named
from experiments.tasks.evaluate import MEMBERS, shipped
from experiments.tasks.seen import Asked, Seen, attention_numbers, labelled, maps_apart, watch
from vfjax import InputError, Model
from vfjax import analysis as look
from vfjax.analysis import draw
from vfjax.analysis.report import Section, write
from vfjax.atomic import JSON, findable, replacing
from vfjax.eval.data import read_lines
from vfjax.vision.images import open_image

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def run(config: ConfigDict, workdir: Path) -> None:
    least = (("pictures", 1), ("maps", 1), ("batch", 1), ("probe_scenes", 0))
    check_config(config, *((key, config[key] >= n, f"at least {n}") for key, n in least))
    folders = named("members", (*config.members, *([config.model] if config.model else [])))
    for folder in folders.values():
        if not converters.open_source(folder, towers=named("towers", config.towers)).branches:
            raise InputError(
                folder, found="a plain LLM", expected="a model with eyes", fix="name another"
            )
    workdir.mkdir(parents=True, exist_ok=True)
    family = not folders
    if family:
        folders = {name: str(FAMILY / name) for name in MEMBERS} | {"fused": str(shipped(workdir))}
    asked = pictures(config) if config.data else questions(config, workdir)
    seen = {who: watch(config, stand_in(folder), asked) for who, folder in folders.items()}
    record: dict[str, Any] = {
        "models": folders,
        "pictures": len({a.picture for a in asked}),
        "questions": len(asked),
        "attention": {who: attention_numbers(s, asked) for who, s in seen.items()},
        "maps apart": maps_apart(seen, asked),
    }
    parts = attention_pictures(config, workdir, seen, asked, record)
    compared = {who: s for who, s in seen.items() if not family or who != "fused"}
    if family:
        compared[f"{MEMBERS[-1]}, other origin"] = turned(seen[MEMBERS[-1]], config.seed)
    parts += features(config, workdir, compared, record)
    if family and config.probe_scenes:
        parts += probes(config, workdir, record)
    with replacing(workdir / "analysis.json") as part:
        part.write_bytes(to_bytes(_finite(record)))
    write(workdir / "report.html", "What the models look at, and what their features are", parts)
    print(f"{workdir / 'report.html'}, {workdir / 'analysis.json'}")


# What is asked


def pictures(config: ConfigDict) -> list[Asked]:
    """Pictures of `config.data`, by name."""
    path = findable(config.data)
    files = [path] if path.is_file() else sorted(path.glob("*"))
    files = [f for f in files if f.suffix.lower() in SUFFIXES][: config.pictures]
    if not files:
        raise InputError(
            path,
            found="no picture",
            expected=f"a picture, or a folder of some ({', '.join(SUFFIXES)})",
            fix="correct config.data",
        )
    return [Asked(file, config.prompt) for file in files]


def questions(config: ConfigDict, workdir: Path) -> list[Asked]:
    """Two questions about each new scene whose answer lies in one cell."""
    folder = workdir / f"scenes-{config.pictures}-{config.seed}"
    scenes.ensure(folder, "test", config.pictures, config.seed)
    rows = read_lines(folder / "scenes.json")
    out = []
    for row in rows[: config.pictures]:
        for kind in ("colour", "ocr"):
            question = row["questions"][kind][0]
            if (cell := cell_of(question, row)) is not None:
                left, top = cell % 3 / 3, cell // 3 / 3
                box = (left, top, left + 1 / 3, top + 1 / 3)
                out.append(Asked(folder / "images" / row["image"], question, box))
    return out


def cell_of(question: str, row: Mapping[str, Any]) -> int | None:
    """The cell that "what colour is 3 ?" or "what digit is red ?" is about; None if several."""
    word = question.split()[-2]
    if word.isdigit():
        return row["digits"].index(int(word))
    if word not in scenes.COLOURS:
        return None
    cells = np.flatnonzero(np.array(row["colours"]) == scenes.COLOURS.index(word))
    return int(cells[0]) if len(cells) == 1 else None


# Pictures


def attention_pictures(
    config: ConfigDict,
    workdir: Path,
    seen: Mapping[str, Seen],
    asked: Sequence[Asked],
    record: Mapping[str, Any],
) -> list[Section]:
    """Maps over pictures, shares by layer, and how well and how differently they point."""
    shown = list({a.picture: i for i, a in reversed(list(enumerate(asked)))}.values())[::-1]
    rows = []
    for i in shown[: config.maps]:
        heats = {n: s.maps["question"][b][i].mean(axis=0) for n, s, b in labelled(seen)}
        for who, s in seen.items():
            if len(s.branches) > 1:
                layers = [s.maps["question"][b][i].mean(axis=0) for b in s.branches]
                heats[f"{who}: all"] = np.sum(layers, axis=0)
        rows.append((open_image(asked[i].picture), asked[i].prompt, heats, asked[i].box))
    draw.overlays(workdir / "attention.png", rows)
    panels = {who: record["attention"][who]["question"]["share"] for who in seen}
    draw.lines(workdir / "shares.png", panels, "layer", "share of attention")
    apart = record["maps apart"]
    table = np.array(apart["bits"])
    draw.matrices(workdir / "maps.png", {"Jensen-Shannon, bits": table}, apart["labels"])
    parts = [
        Section(
            "Attention",
            "From the words after the picture to the visual tokens: mean over heads, layers and "
            "those words, the first token (sink) left out, padding undone. Each map is stretched "
            "from its smallest to its largest value. Dashed: what is asked for.",
            workdir / "attention.png",
        ),
        Section(
            "Share of attention",
            f"By layer, mean over {len(asked)} questions; text and branches sum to one.",
            workdir / "shares.png",
        ),
        Section(
            "Do they look at different places?",
            "Divergence between the maps of the same questions; on the diagonal of a model's own "
            "maps of one picture and the next. 0: the same, 1: nothing in common.",
            workdir / "maps.png",
        ),
    ]
    return [*parts, *pointing_section(record["attention"])]


def pointing_section(numbers: Mapping[str, Any]) -> list[Section]:
    """The pointing game as a table, where it was played."""
    table: list[list[object]] = []
    for who, by_readers in numbers.items():
        for readers, found in by_readers.items():
            for name, row in found.get("pointing", {}).items():
                if not table:
                    table.append(["model", "branch", "readers", "hits", "inside", "chance"])
                keys = ("hits", "inside", "chance")
                table.append([who, name, readers, *(row[key] for key in keys)])
    if not table:
        return []
    text = (
        "Hits: how often the largest value of the map, a mean over layers, lies in the cell that "
        "is asked for; inside: the share of the map that lies there. By layer in analysis.json."
    )
    return [Section("Pointing game", text, table=table)]


# Features


def turned(seen: Seen, seed: int) -> Seen:
    """The same member of a base that has its stream's features in another order.

    It computes what it did, so it is as good; but no weight or feature is where the family's are.
    """
    order = np.random.default_rng(seed).permutation(seen.features.shape[-1])
    return dataclasses.replace(seen, features=seen.features[..., order])


def features(
    config: ConfigDict, workdir: Path, seen: Mapping[str, Seen], record: dict[str, Any]
) -> list[Section]:
    """CKA and MMD between all branches, principal components, t-SNE if asked for."""
    each = {
        label: s.features[:, s.branches.index(name)].astype(np.float64)
        for label, s, name in labelled(seen)
    }
    labels, n = list(each), len(next(iter(each.values())))
    out: dict[str, Any] = {"n": n, "labels": labels}
    record["features"] = out
    parts = []
    if n < 4:
        return []
    pairs = [[(a, b) for b in each.values()] for a in each.values()]
    tables = {
        "linear CKA": [[look.linear_cka(*pair) for pair in row] for row in pairs],
        "linear CKA, debiased": [
            [look.linear_cka(*pair, debiased=True) for pair in row] for row in pairs
        ],
        "MMD²": [
            [_mmd(i == j, *pair) for j, pair in enumerate(row)] for i, row in enumerate(pairs)
        ],
    }
    out |= tables
    arrays = {title: np.array(table) for title, table in tables.items()}
    draw.matrices(workdir / "features.png", arrays, labels)
    text = (
        f"Mean visual token of each of {n} pictures, after the connector. CKA: 1 if equal up to a "
        "rotation; biased upwards where n is small. MMD² with a Gaussian kernel of the median "
        "distance, unbiased: 0 for one distribution; on the diagonal between two halves of the "
        "pictures; blank where the widths differ."
    )
    parts.append(Section("Features, compared", text, workdir / "features.png"))
    for width in sorted({x.shape[1] for x in each.values()}):
        some = {label: x for label, x in each.items() if x.shape[1] == width}
        parts += plane(config, workdir, some, width, out)
    return parts


def _mmd(same: bool, x: np.ndarray, y: np.ndarray) -> float:
    if x.shape[1] != y.shape[1]:
        return float("nan")
    return look.mmd(x[::2], x[1::2]) if same else look.mmd(x, y)


def plane(
    config: ConfigDict,
    workdir: Path,
    each: Mapping[str, np.ndarray],
    width: int,
    out: dict[str, Any],
) -> list[Section]:
    """Features of one width in the plane of their largest variance."""
    joined, ends = np.concatenate(list(each.values())), np.cumsum([len(x) for x in each.values()])
    points, variance = look.pca(joined)
    split = np.split(points, ends[:-1])
    file = workdir / f"pca-{width}.png"
    names = (f"component 1 ({variance[0]:.0%})", f"component 2 ({variance[1]:.0%})")
    draw.scatter(file, dict(zip(each, split, strict=True)), names)
    out[f"principal components, {width} wide"] = {
        "variance": variance.tolist(),
        "points": {label: p.tolist() for label, p in zip(each, split, strict=True)},
    }
    parts = [
        Section("Features in the LLM's input space", f"{width} wide; a point a picture.", file)
    ]
    if config.tsne:
        file = workdir / f"tsne-{width}.png"
        split = np.split(look.tsne(joined, seed=config.seed), ends[:-1])
        draw.scatter(file, dict(zip(each, split, strict=True)), ("", ""))
        parts.append(Section("The same by t-SNE", "Distances far apart mean nothing.", file))
    return parts


# Probes


def probes(config: ConfigDict, workdir: Path, record: dict[str, Any]) -> list[Section]:
    """What a linear probe reads of the encoders' layers, as Dense Connector and COMM argue."""
    known = scenes.sample("train", config.probe_scenes, config.seed)
    new = scenes.sample("test", max(config.probe_scenes // 2, 1), config.seed)
    panels: dict[str, dict[str, list[float]]] = {}
    for name in MEMBERS:
        model: Model = converters.load(FAMILY / name, dtype=config.dtype)[0]
        (branch,) = model.branches.values()
        images = branch.config.images
        stats = {"image_mean": images.mean, "image_std": images.std}
        by_tap = [
            encoders.probes(branch.encoder, stats, known, new, tap)
            for tap in range(branch.config.encoders["encoder"].layers + 1)
        ]
        panels[name] = {key: [found[key] for found in by_tap] for key in by_tap[0]}
    record["probes"] = {"train": len(known), "test": len(new), "accuracy": panels}
    draw.lines(workdir / "probes.png", panels, "hidden state", "accuracy")
    text = (
        f"Accuracy of a linear probe of each patch at each hidden state (0: before the blocks), "
        f"fitted on {len(known)} scenes, tested on {len(new)} others: the digit and the colour of "
        "the cell, whether it is occupied, and which patch it is."
    )
    return [Section("What each layer knows", text, workdir / "probes.png")]


def _finite(value: JSON) -> JSON:
    """NaN as None, which JSON has."""
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
