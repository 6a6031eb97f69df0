"""Makes the family in WORKDIR, fuses its members, and reports; what is there already stays."""

import itertools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

import converters
from converters.export import to_bytes
from experiments.family import encoders, language, scenes
from experiments.family.members import Quiz, Recipe, load, make, means, score
from experiments.family.study import Scores, fuse, paired, study, table
from vfjax.train import Stopped

MEMBERS: dict[str, dict[str, Any]] = {
    "clip": {"encoder": "clip", "see": (True, False)},
    "dino": {"encoder": "dino", "see": (False, True)},
    "sti": {"encoder": "clip", "see": (True, False), "connector": {"kind": "sti"}},
    "sci": {"encoder": "clip", "see": (True, False), "connector": {"kind": "sci"}},
    "dci": {"encoder": "clip", "see": (True, False), "connector": {"kind": "dci"}},
    "comm": {"encoder": "clip", "aux": "dino", "see": (True, True), "connector": {"kind": "comm"}},
}
"""Name -> what of `Recipe` tells it from the others. "comm" is trained on both encoders: what a
fusion of clip and dino could reach at most, at the price of training."""

WEIGHTS = (0.3, 0.5, 0.7, 1.0)
"""Of each member, among which the validation scenes choose."""


def run(config: ConfigDict, workdir: Path) -> None:
    try:
        _run(config, workdir)
    except Stopped as stopped:
        print(f"stopped at step {stopped}; the same command makes the rest")


def _run(config: ConfigDict, workdir: Path) -> None:
    for split in ("train", "validation", "test"):
        if not (workdir / split).is_dir():
            turns = 6 if split == "train" else 1
            scenes.write(workdir / split, split, config.scenes[split], config.seed, turns=turns)
    if not (workdir / "base").is_dir():
        language.build(workdir / "base", seed=config.seed)
    make_encoders(config, workdir)
    tests = {
        split: Quiz.read(workdir / split, 0, config.scenes[split])
        for split in ("validation", "test")
    }
    alone: dict[str, list[dict[str, np.ndarray]]] = {}
    for seed, name in itertools.product(config.seeds, config.members):
        alone.setdefault(name, []).append(make_member(config, workdir, name, seed, tests["test"]))
    pairs: dict[str, list[Scores]] = {pair: [] for pair in config.pairs}
    for seed, pair in itertools.product(config.seeds, config.pairs):
        pairs[pair].append(fuse_members(config, workdir, pair, seed, tests))
    write_report(workdir, alone, pairs)
    if config.ship:
        ship(workdir, Path(config.ship), config.members, config.seeds[0])


def make_encoders(config: ConfigDict, workdir: Path) -> None:
    """CLIP and DINOv2 towers, as Hugging Face folders."""
    kinds = {
        "clip": (encoders.train_clip, encoders.CLIP, encoders.CLIP_IMAGES),
        "dino": (encoders.train_dino, encoders.DINO, encoders.DINO_IMAGES),
    }
    todo = [name for name in kinds if not (workdir / "encoders" / name).is_dir()]
    if not todo:
        return
    data = scenes.sample("train", config.scenes.encoders, config.seed)
    for name in todo:
        train, tower, images = kinds[name]
        made = train(data, steps=config.encoders[name], seed=config.seed)
        encoders.save(made, tower, images, workdir / "encoders" / name)


def make_member(
    config: ConfigDict, workdir: Path, name: str, seed: int, test: Quiz
) -> dict[str, np.ndarray]:
    """A member as a folder, and its scores alone, after it was written and read again."""
    out = workdir / "members" / f"{name}-{seed}"
    if not (out / "scores.npz").is_file():
        shutil.rmtree(out, ignore_errors=True)
        folders = dict(MEMBERS[name])
        for key in ("encoder", "aux"):
            if key in folders:
                folders[key] = workdir / "encoders" / folders[key]
        steps = {key: config[key] for key in ("align", "first", "tune", "rate")}
        print(f"member {name}, seed {seed}")
        recipe = Recipe(seed=seed, **folders, **steps)
        model, _ = make(recipe, workdir / "base", workdir / "train", out / "stages")
        converters.export(model, out / "model")
        found: dict[str, Any] = score(*load(out / "model"), test)
        np.savez(out / "scores.npz", **found)
    return dict(np.load(out / "scores.npz"))


def fuse_members(
    config: ConfigDict, workdir: Path, pair: str, seed: int, tests: Mapping[str, Quiz]
) -> Scores:
    """Order and weights chosen on the validation scenes; all scores on the test scenes.

    "fused: tokens, chosen" has the chosen order and weights, every other fusion the mean of the
    members in the order that the validation scenes prefer.
    """
    out = workdir / "fused" / f"{pair}-{seed}"
    if not (out / "scores.npz").is_file():
        shutil.rmtree(out, ignore_errors=True)
        members = {n: workdir / "members" / f"{n}-{seed}" / "model" for n in pair.split("+")}
        best: dict[tuple[str, ...], dict[float, float]] = {}
        orders = list(itertools.permutations(members))[:2] + [tuple(reversed(members))]
        for order, weight in itertools.product(dict.fromkeys(orders), WEIGHTS):
            *_, found = fuse(
                workdir / "base",
                {name: members[name] for name in order},
                tests["validation"],
                out / "tried",
                params={"weights": (weight,) * len(order)},
            )
            shutil.rmtree(out / "tried")
            best.setdefault(order, {})[weight] = means(found)["mean"]
        chosen = max(((o, w) for o in best for w in WEIGHTS), key=lambda c: best[c[0]][c[1]])
        mean = min(WEIGHTS, key=lambda w: abs(w - 1 / len(members)))
        order = max(best, key=lambda o: best[o][mean])
        scores = study(
            workdir / "base", {n: members[n] for n in order}, tests["test"], out / "model"
        )
        *_, scores["fused: tokens, chosen"] = fuse(
            workdir / "base",
            {n: members[n] for n in chosen[0]},
            tests["test"],
            out / "tuned",
            params={"weights": (chosen[1],) * len(members)},
        )
        record = {"+".join(o): weights for o, weights in best.items()}
        choice = {"tried": record, "order": order, "chosen": chosen}
        (out / "choice.json").write_bytes(to_bytes(choice))
        flat: dict[str, Any] = {
            f"{who}|{kind}": x for who, each in scores.items() for kind, x in each.items()
        }
        np.savez(out / "scores.npz", **flat)
    scores = {}
    for key, value in np.load(out / "scores.npz").items():
        who, _, kind = key.partition("|")
        scores.setdefault(who, {})[kind] = value
    return scores


def write_report(
    workdir: Path, alone: Mapping[str, list], pairs: Mapping[str, list[Scores]]
) -> None:
    """results.json and REPORT.md: means and deviations over the seeds, paired tests."""
    record: dict[str, Any] = {"members": {n: _over_seeds(runs) for n, runs in alone.items()}}
    lines = ["# The family, measured", "", "Members alone, over seeds:", "", "```"]
    lines += [_rows(record["members"]), "```", ""]
    for pair, runs in pairs.items():
        rows = {who: _over_seeds([run[who] for run in runs]) for who in runs[0]}
        names = pair.split("+")
        tests = {}
        for who in ("fused: tokens", "fused: tokens, parallel and block"):
            joined = [_joined([run[name] for run in runs]) for name in names]
            best = max(joined, key=lambda s: means(s)["mean"])
            tests[who] = paired(_joined([run[who] for run in runs]), best)
        record[pair] = {"scores": rows, "against the best member": tests}
        lines += [f"## {pair}", "", "```", _rows(rows), "```", ""]
        for who, test in tests.items():
            low, high = test["interval"]
            base = max(rows[name]["mean"]["mean"] for name in names)
            lines.append(
                f"- {who}: {test['difference']:+.1f} points over the best member "
                f"({100 * test['difference'] / base:+.1f} % relative), 95 % interval {low:.1f} to "
                f"{high:.1f}, p = {test['p']:.4f} (paired bootstrap over pictures, all seeds)"
            )
        lines.append("")
    (workdir / "results.json").write_bytes(to_bytes(record))
    (workdir / "REPORT.md").write_text("\n".join(lines))
    print("\n".join(lines))


def _joined(runs: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Mean over seeds for each picture: pictures, not seeds, are drawn again."""
    return {kind: np.mean([run[kind] for run in runs], axis=0) for kind in runs[0]}


def _over_seeds(runs: list[dict[str, np.ndarray]]) -> dict[str, dict[str, float]]:
    found = [means(run) for run in runs]
    return {
        kind: {
            "mean": float(np.mean([f[kind] for f in found])),
            "deviation": float(np.std([f[kind] for f in found], ddof=1)) if found[1:] else 0.0,
        }
        for kind in found[0]
    }


def _rows(rows: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    body = table({who: {k: v["mean"] for k, v in row.items()} for who, row in rows.items()})
    ends = [f"{row['mean']['deviation']:6.1f}" for row in rows.values()]
    return "\n".join(a + b for a, b in zip(body.splitlines(), ["    ±", *ends], strict=True))


def ship(workdir: Path, out: Path, names: tuple[str, ...], seed: int) -> None:
    """Copies base and members of a seed into a folder, each with a model card."""
    shutil.copytree(workdir / "base", out / "base")
    (out / "base" / "README.md").write_text(BASE_CARD)
    known = json.loads((workdir / "results.json").read_text())["members"]
    for name in names:
        shutil.copytree(workdir / "members" / f"{name}-{seed}" / "model", out / name)
        towers = " and ".join(
            MEMBERS[name][key] for key in ("encoder", "aux") if key in MEMBERS[name]
        )
        kind = MEMBERS[name].get("connector", {"kind": "mlp"})["kind"]
        scores = ", ".join(f"{k} {row['mean']:.1f}" for k, row in known[name].items())
        card = MEMBER_CARD.format(name=name, towers=towers, kind=kind, seed=seed, scores=scores)
        (out / name / "README.md").write_text(card)


BASE_CARD = """# base

A Llama of 450,000 parameters with a vocabulary of 56 words, trained by
`experiments/family/language.py` on texts alone: scenes told word by word, and questions about them.
It has never seen a picture. For tests and demonstrations of vfjax; it knows nothing else.
"""

MEMBER_CARD = """# {name}

A multimodal model in LLaVA's architecture, fine-tuned from `../base` by vfjax's trainer
(`experiments/family/members.py`, seed {seed}): encoder {towers}, connector {kind}. The connector
was first aligned to the base's word embeddings of the training scenes, then trained alone, then
with the LLM.

Pictures: scenes drawn from scikit-learn's handwritten digits (UCI, CC BY 4.0) on photographs that
scikit-image and scikit-learn ship; those of the tests share neither digits nor photographs' regions
with them. For tests and demonstrations of vfjax; it knows nothing else.

Right answers in per cent on held-out scenes, mean over the seeds of the report: {scores}.
"""
