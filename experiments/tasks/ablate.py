"""Fuses the shipped family in many ways and draws what each choice does; goes on where it was."""

import itertools
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

import converters
from converters.export import to_bytes
from experiments.family import scenes
from experiments.family.members import Quiz, load, means, score
from experiments.family.study import WAYS, How, fuse
from experiments.tasks.common import FAMILY, named
from vfjax.atomic import claim, read_json, replacing
from vfjax.fusion.prune import RULES, Prune
from vfjax.train import same_config

WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0)
METHODS: dict[str, dict[str, Any]] = {
    "linear": {"weights": 0.5},
    "task_arithmetic": {"weights": 0.5},
    "ties": {"weights": 0.5, "density": 0.5},
    "dare_linear": {"weights": 0.5, "density": 0.5},
    "breadcrumbs": {"weights": 0.5, "density": 0.9},
    "della": {"weights": 0.5, "density": 0.5, "epsilon": 0.1},
    "sce": {},
    "karcher": {},
    "model_stock": {},
    "wudi": {},
    "tsv": {},
    "iso": {},
}
SCOPES = {"all": (), "blocks alone": (("embed_tokens|lm_head|model.norm", {"take": "base"}),)}

OTHER = "other-origin"

Variant = tuple[str, str, tuple[str, ...], How, Prune | None]
"""Panel, label, members in order, recipe of `converters.fuse`, pruning."""


def run(config: ConfigDict, workdir: Path) -> None:
    scenes.ensure(workdir / "scenes", config.split, config.scenes, config.seed)
    test = Quiz.read(workdir / "scenes")
    own = workdir / "ablate"
    same_config(claim(own), config.to_dict())
    file = own / "results.json"
    done = read_json(file, "pass another --workdir") if file.is_file() else {}
    alone: dict[str, float] = {}
    folders = {p.name: p for p in FAMILY.iterdir() if p.name != "base"}
    folders |= {name: Path(path) for name, path in named("more", config.more).items()}
    subsets = sorted(folders) if config.subsets else []
    folders[OTHER] = own / OTHER
    if not folders[OTHER].is_dir():
        turned_over(FAMILY / config.members[-1], folders[OTHER], config.seed)
    for panel, label, names, recipe, prune in variants(config, subsets):
        key = f"{panel}: {label}"
        if key in done:
            continue
        out = own / "fused"
        shutil.rmtree(out, ignore_errors=True)
        members = {name: folders[name] for name in names}
        *_, found = fuse(FAMILY / "base", members, test, out, prune=prune, **recipe)
        for name in set(names) - set(alone):
            alone[name] = means(score(*load(folders[name]), test))["mean"]
        best = max(alone[name] for name in names)
        done[key] = {"panel": panel, "label": label, "best member": best, **means(found)}
        with replacing(file) as part:
            part.write_bytes(to_bytes(done))
        print(f"{key:<60} {done[key]['mean']:5.1f}   best member {best:5.1f}", flush=True)
    draw(own / "ablate.png", list(done.values()))
    print(f"{own / 'ablate.png'}, {file}")


def variants(config: ConfigDict, subsets: Sequence[str]) -> Iterator[Variant]:
    """All that is tried, panel after panel; the recipes differ from the mean in one thing.

    Args:
        config: the task's.
        subsets: members of which two, three ... are fused.
    """
    names = tuple(config.members)
    for weight in WEIGHTS:
        yield "weight of each", f"{weight:g}", names, _weights(weight, names), None
    for method, params in METHODS.items():
        params = {k: (v,) * len(names) if k == "weights" else v for k, v in params.items()}
        yield "method", method, names, {"method": method, "params": params}, None
    for order in itertools.permutations(names):
        yield "order", " ".join(order), order, {}, None
    for label, (positions, mask) in WAYS.items():
        yield "arrangement", label, names, {"positions": positions, "mask": mask}, None
    for label, rules in SCOPES.items():
        yield "scope", label, names, {"rules": rules}, None
    yield "origin", "one base", names, {}, None
    yield "origin", "of another base, forced", (*names[:-1], OTHER), {"family": False}, None
    for by in RULES:
        for keep in pruned(len(names)):
            label = " ".join(f"{share:g}" for share in keep)
            yield f"visual tokens kept, by {by}", label, names, {}, Prune(keep, by)
    for count in range(2, len(subsets) + 1):
        for some in itertools.combinations(subsets, count):
            yield "members", " ".join(some), some, {}, None


def pruned(count: int) -> list[tuple[float, ...]]:
    """Shares of each branch's tokens: of all, then of one and all of the others'."""
    all_of = [(share,) * count for share in (1.0, 0.75, 0.5, 0.25)]
    one_of = [
        tuple(share if i == k else 1.0 for i in range(count))
        for k in range(count)
        for share in (0.75, 0.5, 0.25)
    ]
    return all_of + one_of


def turned_over(member: Path, out: Path, seed: int) -> None:
    """Writes a member with the features of its LLM's stream in another order.

    It computes what it did, but its weights have another origin than the base's: a member of a base
    that was trained apart, as good as the family's own. Merging takes it for a fine-tune.
    """
    model, _ = converters.load(member, dtype="float32")
    llm, (branch,) = model.llm, model.branches.values()
    blocks: list[Any] = list(llm.blocks)
    order = np.random.default_rng(seed).permutation(llm.config.width)
    rows = [getattr(block.attn, name) for block in blocks for name in ("q", "k", "v")]
    rows += [getattr(block.mlp, name) for block in blocks for name in ("gate", "up")]
    columns = [layer for block in blocks for layer in (block.attn.out, block.mlp.down)]
    columns.append(branch.connector.projector.layers[-1])
    norms = [norm for block in blocks for norm in (block.norm1, block.norm2)]
    for layer in rows:
        layer.kernel[...] = layer.kernel[...][order]
    for layer in columns:
        layer.kernel[...] = layer.kernel[...][:, order]
    for vector in (*(norm.scale for norm in (*norms, llm.norm)), columns[-1].bias):
        vector[...] = vector[...][order]
    llm.embedding[...] = llm.embedding[...][:, order]
    converters.export(model, out)


def _weights(weight: float, names: tuple[str, ...]) -> How:
    return {"params": {"weights": (weight,) * len(names)}}


def draw(file: Path, rows: list[dict[str, Any]]) -> None:
    """A panel a choice: the fusion's mean beside the best of its members."""
    panels = list(dict.fromkeys(row["panel"] for row in rows))
    figure = Figure(figsize=(9, 2.6 * len(panels)), layout="constrained")
    for axes, panel in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        some = [row for row in rows if row["panel"] == panel]
        labels = [row["label"].removeprefix("fused: ") for row in some]
        line = "-" if panel == "weight of each" else ""
        axes.plot(labels, [row["mean"] for row in some], "o" + line, label="fused")
        axes.plot(labels, [row["best member"] for row in some], "_", label="best member")
        axes.set(title=panel, ylabel="right (%)")
        axes.tick_params(axis="x", labelsize=7)
        axes.legend(fontsize=7)
    with replacing(file) as part:
        figure.savefig(part, dpi=120, format="png")
