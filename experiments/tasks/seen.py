"""What models show of pictures and questions: attention, maps and features, and their numbers."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

import converters
from experiments.tasks.common import named
from vfjax import Batch, Model, Processor
from vfjax import analysis as look
from vfjax.analysis.regions import Box

MAP = (48, 48)
"""Columns and rows of the maps that are compared, whatever the picture's shape."""
ALL = "all branches"


@dataclasses.dataclass(frozen=True)
class Asked:
    """A picture, a question about it, and the box of what is asked for, if that is known."""

    picture: Path
    prompt: str
    box: Box | None = None


@dataclasses.dataclass
class Seen:
    """What a model showed.

    Attributes:
        branches: names.
        shares: readers -> float[rows, layers, 1 + branches], see `vfjax.analysis.shares`.
        maps: readers -> branch -> float32[rows, layers, h, w], what is left of the row's sum.
        entropy: readers -> branch -> float[rows, layers].
        features: float[pictures, branches, d].
    """

    branches: list[str]
    shares: dict[str, np.ndarray]
    maps: dict[str, dict[str, np.ndarray]]
    entropy: dict[str, dict[str, np.ndarray]]
    features: np.ndarray


def watch(config: ConfigDict, folder: Path, asked: Sequence[Asked]) -> Seen:
    """Loads a model and asks it everything."""
    towers = named("towers", config.towers)
    model, processor = converters.load(folder, dtype=config.dtype, towers=towers)
    branches = [branch.name for branch in model.config.branches]
    shares: dict[str, list[np.ndarray]] = {}
    maps: dict[str, dict[str, list[np.ndarray]]] = {}
    flat: dict[str, dict[str, list[np.ndarray]]] = {}
    vectors: dict[Path, np.ndarray] = {}
    for some, batch in batches(config, processor, asked):
        opened = [processor.open(a.picture) for a in some]
        boxes = [
            [
                look.regions(b, file.rgb(b.architecture.images.convert))
                for b in model.config.branches
            ]
            for file in opened
        ]
        found, segments, pooled = jax.device_get(see(model, batch, look.readers(batch)))
        vectors |= {a.picture: vector for a, vector in zip(some, pooled, strict=False)}
        segments = segments[: len(some)]
        for who, rows in found.items():
            rows = rows[: len(some)]
            shares.setdefault(who, []).append(look.shares(rows, segments, len(branches)))
            for row, segment, places in zip(rows, segments, boxes, strict=True):
                for k, (name, box) in enumerate(zip(branches, places, strict=True)):
                    own = row[:, segment == k + 1]
                    heat = np.stack([look.paint(layer, box, MAP) for layer in own])
                    maps.setdefault(who, {}).setdefault(name, []).append(heat.astype(np.float32))
                    flat.setdefault(who, {}).setdefault(name, []).append(look.entropy(own))
    return Seen(
        branches,
        {who: np.concatenate(parts) for who, parts in shares.items()},
        {who: {k: np.stack(x) for k, x in parts.items()} for who, parts in maps.items()},
        {who: {k: np.stack(x) for k, x in parts.items()} for who, parts in flat.items()},
        np.stack(list(vectors.values())),
    )


@jax.jit
def see(
    model: Model, batch: Batch, readers: dict[str, np.ndarray]
) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
    """Attention, segments and features by one program."""
    return *look.attention(model, batch, readers), look.pooled(model, batch)


def batches(
    config: ConfigDict, processor: Processor, asked: Sequence[Asked]
) -> Iterator[tuple[Sequence[Asked], Any]]:
    """Rows and their arrays; a short batch is filled with its first row, for one compilation."""
    for i in range(0, len(asked), config.batch):
        some = asked[i : i + config.batch]
        rows = [*some, *[some[0]] * (config.batch - len(some))]
        prompts = [processor.chat(a.prompt) for a in rows]
        yield some, processor([a.picture for a in rows], prompts)


def labelled(seen: Mapping[str, Seen]) -> Iterator[tuple[str, Seen, str]]:
    """Label, model, branch; a model of one branch is its own label."""
    for who, s in seen.items():
        for name in s.branches:
            yield (who if len(s.branches) == 1 else f"{who}: {name}"), s, name


def attention_numbers(seen: Seen, asked: Sequence[Asked]) -> dict[str, Any]:
    """Shares, entropy and pointing of a model, by readers and layer, means over the questions."""
    out: dict[str, Any] = {}
    for who, rows in seen.shares.items():
        visual = rows[..., 1:] / rows[..., 1:].sum(axis=-1, keepdims=True)
        out[who] = {
            "share": dict(zip(("text", *seen.branches), rows.mean(axis=0).T.tolist(), strict=True)),
            "share of the visual": dict(
                zip(seen.branches, visual.mean(axis=0).T.tolist(), strict=True)
            ),
            "entropy": {k: x.mean(axis=0).tolist() for k, x in seen.entropy[who].items()},
        }
        known = [i for i, a in enumerate(asked) if a.box is not None]
        if known:
            maps = dict(seen.maps[who])
            if len(maps) > 1:
                maps[ALL] = np.sum(list(maps.values()), axis=0)
            boxes: list[Any] = [asked[i].box for i in known]
            out[who]["pointing"] = {
                name: pointing([heat[i] for i in known], boxes) for name, heat in maps.items()
            }
    return out


def pointing(heats: Sequence[np.ndarray], boxes: Sequence[Box]) -> dict[str, Any]:
    """The pointing game by layer, and of the mean over the layers; chance is the boxes' area.

    Args:
        heats: float[layers, h, w] of each question.
        boxes: of what it asks for.
    """
    found = np.array(
        [
            [look.inside(heat, box) for heat in (*layers, layers.mean(axis=0))]
            for layers, box in zip(heats, boxes, strict=True)
        ]
    ).mean(axis=0)
    area = float(np.mean([(r - x) * (b - t) for x, t, r, b in boxes]))
    keys = ("hits", "inside")
    by_layer = {f"{key} by layer": found[:-1, i].tolist() for i, key in enumerate(keys)}
    mean = {key: float(found[-1, i]) for i, key in enumerate(keys)}
    return {**mean, "chance": area, "questions": len(boxes), **by_layer}


def maps_apart(seen: Mapping[str, Seen], asked: Sequence[Asked]) -> dict[str, Any]:
    """How far two models' maps of the same question are apart, in bits; see `divergence`.

    The diagonal compares a model with itself, on the next picture; NaN if there is only one.
    """
    files = [a.picture for a in asked]
    ahead = [[*range(i, len(files)), *range(i)] for i in range(len(files))]
    other = [next((j for j in some if files[j] != files[some[0]]), -1) for some in ahead]
    alone = len(set(files)) == 1
    each = {}
    for label, s, name in labelled(seen):
        maps = s.maps["question"][name].mean(axis=1)
        each[label] = maps.reshape(len(maps), -1)
    table = [
        [
            float(look.divergence(a, b[other] if i == j else b).mean())
            if i != j or not alone
            else float("nan")
            for j, b in enumerate(each.values())
        ]
        for i, a in enumerate(each.values())
    ]
    return {"labels": list(each), "bits": table}
