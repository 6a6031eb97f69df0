"""Makes the family in WORKDIR, fuses its members, and reports; what is there already stays."""

import functools
import itertools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

import converters
from converters.export import to_bytes
from experiments.family import encoders, language, scenes
from experiments.family.distil import train_distilled
from experiments.family.members import Quiz, Recipe, load, make, means, score
from experiments.family.study import Scores, fuse, paired, study, table, with_llm
from experiments.tasks.common import FAMILY
from vfjax import InputError
from vfjax.atomic import JSON, empty, replacing
from vfjax.train import Stopped

MEMBERS: dict[str, dict[str, Any]] = {
    "clip": {"encoder": "clip", "see": (True, False)},
    "dino": {"encoder": "dino", "see": (False, True)},
    "sti": {"encoder": "clip", "see": (True, False), "connector": {"kind": "sti"}},
    "sci": {"encoder": "clip", "see": (True, False), "connector": {"kind": "sci"}},
    "dci": {"encoder": "clip", "see": (True, False), "connector": {"kind": "dci"}},
    "comm": {"encoder": "clip", "aux": "dino", "see": (True, True), "connector": {"kind": "comm"}},
    "mgm": {
        "encoder": "clip",
        "aux": "convnext",
        "see": (True, False),
        "connector": {"kind": "mgm"},
    },
    "slime": {
        "encoder": "clip",
        "see": (True, False),
        "connector": {"kind": "slime", "queries": 9, "separator": language.IDS[language.EMPTY]},
    },
    "distilled": {"encoder": "distilled", "see": (False, True)},
    "fine": {"encoder": "fine", "see": (True, False)},
    "clip-long": {"encoder": "clip", "see": (True, False), "times": 2},
    "dino-long": {"encoder": "dino", "see": (False, True), "times": 2},
}
"""Name -> what of `Recipe` tells it from the others. "comm" is trained on both encoders: what a
fusion of clip and dino could reach at most, at the price of training. "fine" has as many tokens as
a fusion of two, by higher resolution; "clip-long" and "dino-long" train as long as both."""

ENCODERS: dict[str, tuple[Any, ...]] = {
    "clip": (encoders.train_clip, encoders.CLIP, encoders.CLIP_IMAGES),
    "fine": (encoders.train_clip, encoders.FINE, encoders.FINE_IMAGES),
    "convnext": (encoders.train_clip, encoders.CONVNEXT, {}),
    "dino": (encoders.train_dino, encoders.DINO, encoders.DINO_IMAGES),
    "distilled": (train_distilled, encoders.DINO, encoders.DINO_IMAGES),
}
"""Name -> how it is trained, its config, and how its pictures are prepared."""

KEYS = ("encoder", "aux")

WEIGHTS = (0.3, 0.5, 0.7, 1.0)
"""Of each member, among which the validation scenes choose."""


def run(config: ConfigDict, workdir: Path) -> None:
    try:
        _run(config, workdir)
    except Stopped as stopped:
        print(f"stopped at step {stopped}; the same command makes the rest")


def _run(config: ConfigDict, workdir: Path) -> None:
    splits = ("validation", "test") if config.shipped else ("train", "validation", "test")
    for split in splits:
        turns = 6 if split == "train" else 1
        scenes.ensure(workdir / split, split, config.scenes[split], config.seed, turns=turns)
    if config.shipped:
        unpack(config, workdir)
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
    sweep = [
        sweep_point(config, workdir, steps, rate, tests["test"]) for steps, rate in config.sweep
    ]
    told = language.score(load(workdir / "base")[0], count=config.scenes.test)
    known = probe_encoders(config, workdir)
    write_report(workdir, told, known, alone, pairs, sweep)
    if config.ship:
        ship(workdir, Path(config.ship), config.members, config.seeds[0])


def unpack(config: ConfigDict, workdir: Path) -> None:
    """The shipped base, towers and members, in the places of those that would be made.

    Raises:
        InputError: members that do not ship, or several seeds.
    """
    known = sorted(path.name for path in FAMILY.iterdir() if path.name != "base")
    if not set(config.members) <= set(known) or len(config.seeds) != 1:
        raise InputError(
            "config.members, config.seeds",
            found=f"{tuple(config.members)}, {tuple(config.seeds)}",
            expected=f"some of {', '.join(known)}, and one seed, with config.shipped",
            fix="correct them",
        )
    folders = {"base": workdir / "base"}
    for name in config.members:
        folders[name] = member_folder(workdir, name, config.seeds[0]) / "model"
        folders[f"{name}/vision_tower"] = workdir / "encoders" / MEMBERS[name]["encoder"]
    for name, folder in folders.items():
        if not folder.is_dir():
            shutil.copytree(FAMILY / name, folder)


def make_encoders(config: ConfigDict, workdir: Path) -> None:
    """The towers that the members need, as folders."""
    needed = {MEMBERS[n][key] for n in config.members for key in KEYS if key in MEMBERS[n]}
    todo = [name for name in sorted(needed) if not (workdir / "encoders" / name).is_dir()]
    if not todo:
        return
    data = scenes.sample("train", config.scenes.encoders, config.seed)
    for name in todo:
        train, tower, images = ENCODERS[name]
        own = {"config": tower} if train is encoders.train_clip else {}
        made = train(data, steps=config.encoders[name], seed=config.seed, **own)
        encoders.save(made, tower, images, workdir / "encoders" / name)


def probe_encoders(config: ConfigDict, workdir: Path) -> dict[str, dict[str, float]]:
    """What linear probes read from the patches of each tower of 36, in per cent right."""
    known, new = (scenes.sample(split, 1000, config.seed) for split in ("train", "test"))
    out = {}
    for name in sorted(path.name for path in (workdir / "encoders").iterdir()):
        _, tower, images = ENCODERS[name]
        if tower in (encoders.CLIP, encoders.DINO):
            loaded = converters.load_encoder(workdir / "encoders" / name)
            found = encoders.probes(loaded, images, known, new)
            out[name] = {key: 100 * value for key, value in found.items()}
    return out


def make_member(
    config: ConfigDict, workdir: Path, name: str, seed: int, test: Quiz, **other: float
) -> dict[str, np.ndarray]:
    """A member as a folder, and its scores alone, after it was written and read again.

    Args:
        config: the task's.
        workdir: with scenes, base and encoders.
        name: of `MEMBERS`.
        seed: of the member.
        test: questions.
        other: of `Recipe`, in place of the config's.
    """
    out = member_folder(workdir, name, seed, **other)
    if not (out / "scores.npz").is_file():
        print(f"member {out.name}", flush=True)
        if not config.shipped:
            empty(out)
            recipe = dict(MEMBERS[name])
            recipe |= {key: workdir / "encoders" / recipe[key] for key in KEYS if key in recipe}
            recipe["captions"] = functools.partial(language.caption, see=recipe.pop("see"))
            times = recipe.pop("times", 1)
            recipe |= {key: config[key] for key in ("align", "rate")} | {"seed": seed}
            recipe |= {key: times * config[key] for key in ("first", "tune")} | other
            model, _ = make(Recipe(**recipe), workdir / "base", workdir / "train", out / "stages")
            converters.export(model, out / "model")
        found: dict[str, Any] = score(*load(out / "model"), test)
        save(out / "scores.npz", found)
    return dict(np.load(out / "scores.npz"))


def save(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays whole or not at all: that the file is there means that its work is done."""
    with replacing(file) as part, part.open("wb") as out:
        np.savez(out, **dict(arrays))  # type: ignore[arg-type]


def member_folder(workdir: Path, name: str, seed: int, **other: float) -> Path:
    """Where a member is; arguments as of `make_member`."""
    changed = "".join(f"-{key}{value:g}" for key, value in other.items())
    return workdir / "members" / f"{name}{changed}-{seed}"


def fuse_members(
    config: ConfigDict, workdir: Path, pair: str, seed: int, tests: Mapping[str, Quiz]
) -> Scores:
    """Order and weights chosen on the validation scenes; all scores on the test scenes.

    "fused: tokens, chosen" has the chosen order and weights, every other fusion the mean of the
    members in the order that the validation scenes prefer.
    """
    out = workdir / "fused" / f"{pair}-{seed}"
    if not (out / "scores.npz").is_file():
        empty(out)
        members = {n: workdir / "members" / f"{n}-{seed}" / "model" for n in pair.split("+")}
        best: dict[tuple[str, ...], dict[float, float]] = {}
        orders = (tuple(members), tuple(reversed(members)))
        for order, weight in itertools.product(orders, WEIGHTS):
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
        record = {"+".join(o): {f"{w}": x for w, x in each.items()} for o, each in best.items()}
        choice: JSON = {"tried": record, "order": order, "chosen": chosen}
        (out / "choice.json").write_bytes(to_bytes(choice))
        flat: dict[str, Any] = {
            f"{who}|{kind}": x for who, each in scores.items() for kind, x in each.items()
        }
        save(out / "scores.npz", flat)
    scores = {}
    for key, value in np.load(out / "scores.npz").items():
        who, _, kind = key.partition("|")
        scores.setdefault(who, {})[kind] = value
    return scores


def sweep_point(
    config: ConfigDict, workdir: Path, steps: int, rate: float, test: Quiz
) -> dict[str, float]:
    """What fusion gains when the members' last stage has other steps and another rate."""
    names, seed = config.pairs[0].split("+"), config.seeds[0]
    usual = steps == config.tune and rate == config.rate
    other = {} if usual else {"tune": steps, "rate": rate}
    alone = [make_member(config, workdir, name, seed, test, **other) for name in names]
    out = workdir / "sweep" / f"{steps}x{rate:g}"
    if not (out / "scores.npz").is_file():
        empty(out)
        folders = (member_folder(workdir, name, seed, **other) for name in names)
        members = {name: folder / "model" for name, folder in zip(names, folders, strict=True)}
        fused, processor, found = fuse(workdir / "base", members, test, out / "model")
        theta, _ = load(workdir / "base")
        control = score(with_llm(fused, theta.llm), processor, test)
        both = {"fused": found, "base": control}
        save(out / "scores.npz", {who: np.array(means(x)["mean"]) for who, x in both.items()})
    record = {key: float(value) for key, value in np.load(out / "scores.npz").items()}
    best = max(means(scores)["mean"] for scores in alone)
    return {"steps": steps, "rate": rate, "best member": best, **record}


def draw_sweep(file: Path, sweep: list[dict[str, float]]) -> None:
    """Scores against the length of the last stage, a line a rate."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    rates = sorted({point["rate"] for point in sweep})
    panels = figure.subplots(1, len(rates), sharex=True, sharey=True, squeeze=False)[0]
    steps = sorted({int(point["steps"]) for point in sweep})
    for axes, rate in zip(panels, rates, strict=True):
        some = sorted((p for p in sweep if p["rate"] == rate), key=lambda p: p["steps"])
        names = {"fused": "fused", "best member": "best member", "base": "base LLM, all branches"}
        for key, label in names.items():
            axes.plot([p["steps"] for p in some], [p[key] for p in some], "o-", label=label)
        axes.set(title=f"rate {rate:g}", xlabel="steps of the last stage", xscale="log")
        axes.set_xticks(steps, [str(n) for n in steps])
        axes.minorticks_off()
    panels[0].set_ylabel("right answers (%)")
    panels[0].legend(frameon=False, fontsize=8)
    with replacing(file) as part:
        figure.savefig(part, dpi=120, format="png")


def write_report(
    workdir: Path,
    told: Mapping[str, Mapping[str, float]],
    known: Mapping[str, Mapping[str, float]],
    alone: Mapping[str, list],
    pairs: Mapping[str, list[Scores]],
    sweep: list[dict[str, float]],
) -> None:
    """results.json and REPORT.md: means and deviations over the seeds, paired tests.

    `told` is what the base scores where a projector sees everything: the ceiling; `known` what the
    encoders' patches hold.
    """
    record: dict[str, Any] = {"members": {n: _over_seeds(runs) for n, runs in alone.items()}}
    ceiling = {
        form: {kind: 100 * share for kind, share in each.items()} for form, each in told.items()
    }
    lines = ["# The family, measured", "", "The base, told the scenes in words:", "", "```"]
    record["base, told in words"] = ceiling
    lines += [table(ceiling), "```", ""]
    if known:
        record["encoders, probed"] = known
        lines += ["Linear probes of the encoders' patches:", "", "```", table(known), "```", ""]
    lines += ["Members alone, over seeds:", "", "```"]
    lines += [_rows(record["members"]), "```", ""]
    for pair, runs in pairs.items():
        rows = {who: _over_seeds([run[who] for run in runs]) for who in runs[0]}
        names = pair.split("+")
        tests = {}
        for who in (w for w in runs[0] if w.startswith("fused: ")):
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
    if sweep:
        lines += ["## Steps and rate of the last stage", "", "```"]
        lines.append("".join(f"{key:>13}" for key in sweep[0]))
        lines += ["".join(f"{value:13.5g}" for value in point.values()) for point in sweep]
        lines += ["```", ""]
        draw_sweep(workdir / "sweep.png", sweep)
        record["sweep"] = sweep
    for name, text in {
        "results.json": to_bytes(record),
        "REPORT.md": "\n".join(lines).encode(),
    }.items():
        with replacing(workdir / name) as part:
            part.write_bytes(text)
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
        towers = " and ".join(MEMBERS[name][key] for key in KEYS if key in MEMBERS[name])
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
