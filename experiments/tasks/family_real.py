"""Makes the family of published weights in WORKDIR, fuses it, reports; what is there stays.

Each answerer's scores are a file of their own: a run that was stopped goes on behind the last.
"""

import functools
import itertools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

import converters
from converters.export import to_bytes
from experiments.family import scenes
from experiments.family.members import Quiz, Recipe, make, means
from experiments.family.real import adapter, english, packages, photos
from experiments.family.study import WAYS, Scores, paired, study, table
from experiments.tasks.common import FAMILY
from experiments.tasks.family import save
from vfjax import InputError
from vfjax.atomic import replacing
from vfjax.train import LoRAConfig, Stopped

MEMBERS: dict[str, dict[str, Any]] = {
    "dino": {"encoder": "dinov2", "connector": {"kind": "mlp", "select": 8}},
    "digits": {"encoder": "digits"},
    "clip": {"encoder": "clip"},
    "dino-long": {"encoder": "dinov2", "connector": {"kind": "mlp", "select": 8}, "times": 2},
    "digits-long": {"encoder": "digits", "times": 2},
}
"""Name -> what of `Recipe` tells it from the others. DINOv2-S is read after its eighth block of
twelve, where a linear probe of its patches tells more digits than after the last but one; "-long"
are trained twice as long."""

TOWERS = {"digits": FAMILY / "dino" / "vision_tower", "clip": FAMILY / "clip" / "vision_tower"}
"""Small towers of `experiments.family.encoders`, which ship with the toy family."""

SHIPPED = Path(adapter.__file__).parent / "members"

TEMPLATE = "smollm2"
LENGTHS = (96, 128, 192, 256, 512)
"""Of prompts: few, as each is a program of thirty blocks to compile."""
ADAPTED = r"llm/blocks/.*/attn/.*"
"""Layers with adapters: those of the MLPs would make a step half as long again on CPUs."""


def run(config: ConfigDict, workdir: Path) -> None:
    try:
        _run(config, workdir)
    except Stopped as stopped:
        print(f"stopped at step {stopped}; the same command makes the rest")


def _run(config: ConfigDict, workdir: Path) -> None:
    prepare(config, workdir)
    pairs: dict[str, list[dict[str, Scores]]] = {pair: [] for pair in config.pairs}
    for seed, name in itertools.product(config.seeds, config.members):
        make_member(config, workdir, name, seed)
    tests = quizzes(config, workdir)
    for seed, pair in itertools.product(config.seeds, config.pairs):
        found = {name: scores(config, workdir, pair, seed, name, tests[name]) for name in tests}
        pairs[pair].append(found)
    write_report(workdir, pairs)
    if config.ship:
        for name in config.members:
            folder = member_folder(workdir, name, config.seeds[0]) / "adapter"
            shutil.copytree(folder, Path(config.ship) / name)


def prepare(config: ConfigDict, workdir: Path) -> None:
    """Scenes, the base LLM, towers."""
    for split in ("train", "test"):
        scenes.ensure(workdir / split, split, config.scenes[split], config.seed, turns=1)
    english.write_rows(workdir / "train", config.turns, config.seed)
    if not (workdir / "base").is_dir():
        model, _ = converters.load(packages.smollm2(), dtype="float32")
        converters.export(model, workdir / "base")
    for name in {MEMBERS[member]["encoder"] for member in config.members}:
        folder = workdir / "encoders" / name
        if folder.is_dir():
            continue
        if name in TOWERS:
            shutil.copytree(TOWERS[name], folder)
        else:
            packages.write_dinov2(folder, config.side)


def make_member(config: ConfigDict, workdir: Path, name: str, seed: int) -> None:
    """A member as adapters (bfloat16) and, of these and the packages' weights, as a folder."""
    out = member_folder(workdir, name, seed)
    if not (out / "adapter").is_dir():
        if config.shipped:
            if not (SHIPPED / name).is_dir() or len(config.seeds) > 1:
                raise InputError(
                    "config.members, config.seeds",
                    found=f"{name}, {tuple(config.seeds)}",
                    expected=f"members of {SHIPPED}, one seed",
                    fix="correct it, or leave :shipped",
                )
            shutil.copytree(SHIPPED / name, out / "adapter")
        else:
            train(config, workdir, name, seed, out)
    if not (out / "model").is_dir():
        towers = {path.name: path for path in (workdir / "encoders").iterdir()}
        model, _ = converters.load(
            out / "adapter", base=workdir / "base", towers=towers, dtype="float32"
        )
        converters.export(model, out / "model")


def train(config: ConfigDict, workdir: Path, name: str, seed: int, out: Path) -> None:
    """Trains a member and writes its adapters; its states in `out` are gone on with."""
    print(f"member {out.name}", flush=True)
    own = dict(MEMBERS[name])
    tower, times = own.pop("encoder"), own.pop("times", 1)
    tokenizer = converters.load(workdir / "base")[1].require_tokenizer()
    recipe = Recipe(
        workdir / "encoders" / tower,
        functools.partial(english.captions, tokenizer),
        align=config.align,
        first=times * config.first,
        tune=times * config.tune,
        rate=config.rate,
        first_rate=config.first_rate,
        seed=seed,
        batch=config.batch,
        lora=LoRAConfig(config.rank, 2.0 * config.rank, ADAPTED),
        template=TEMPLATE,
        rows=english.ROWS_FILE,
        length=config.length,
        save_every=25,
        **own,
    )
    model, _ = make(recipe, workdir / "base", workdir / "train", out / "stages")
    adapter.save(
        model,
        out / "adapter",
        base=adapter.BASE,
        tower=tower,
        rank=config.rank,
        alpha=2.0 * config.rank,
    )


def member_folder(workdir: Path, name: str, seed: int) -> Path:
    """Where a member is."""
    return workdir / "members" / f"{name}-{seed}"


def quizzes(config: ConfigDict, workdir: Path) -> dict[str, Quiz]:
    """Name -> held-out questions: scenes, packages' photographs, MMVP's if they are there."""
    out = {
        "scenes": english.quiz(workdir / "test", config.seed),
        "photographs": photos.plain(workdir / "photographs"),
    }
    if found := photos.mmvp(Path(config.mmvp), config.photos):
        out["mmvp"] = found
    else:
        print(f"{config.mmvp}: no questions.jsonl, MMVP is left out")
    return out


def scores(
    config: ConfigDict, workdir: Path, pair: str, seed: int, name: str, test: Quiz
) -> Scores:
    """Everybody's scores in a quiz."""
    out = workdir / "fused" / f"{pair}-{seed}"
    answers = out / name

    def keep(who: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        file = answers / f"{who.replace(' ', '_').replace(':', '').replace(',', '')}.npz"
        if not file.is_file():
            answers.mkdir(parents=True, exist_ok=True)
            found: dict[str, Any] = make()
            save(file, found)
            print(f"{name}: {who}: {means(found)['mean']:.1f}", flush=True)
        return dict(np.load(file))

    members = {n: member_folder(workdir, n, seed) / "model" for n in pair.split("+")}
    found = study(
        workdir / "base",
        members,
        test,
        out / "model",
        {way: WAYS[way] for way in config.ways},
        keep=keep,
        who=config.who,
        rows=config.rows,
        lengths=LENGTHS,
    )
    if name == "scenes":
        found["no picture, usual answers"] = english.blind(workdir / "train", test)
    return found


def write_report(workdir: Path, pairs: Mapping[str, list[dict[str, Scores]]]) -> None:
    """results.json and REPORT.md: means over seeds, paired tests against the best member."""
    record: dict[str, Any] = {}
    lines = ["# The family of published weights, measured", ""]
    for pair, runs in pairs.items():
        for quiz in runs[0]:
            joined = {
                who: {
                    kind: np.mean([run[quiz][who][kind] for run in runs], axis=0)
                    for kind in runs[0][quiz][who]
                }
                for who in runs[0][quiz]
            }
            rows = {who: means(found) for who, found in joined.items()}
            best = max(pair.split("+"), key=lambda name: rows[name]["mean"])
            tests = {who: paired(joined[who], joined[best]) for who in rows if who != best}
            record.setdefault(pair, {})[quiz] = {
                "pictures": len(next(iter(joined[best].values()))),
                "scores": rows,
                "against": best,
                "tests": tests,
            }
            lines += [f"## {pair}, {quiz}", "", "```", table(rows), "```", ""]
            lines += [
                f"- {who}: {test['difference']:+.1f} points over {best}, 95 % interval "
                f"{test['interval'][0]:.1f} to {test['interval'][1]:.1f}, p = {test['p']:.4f}"
                for who, test in tests.items()
            ]
            lines.append("")
    for name, text in {
        "results.json": to_bytes(record),
        "REPORT.md": "\n".join(lines).encode(),
    }.items():
        with replacing(workdir / name) as part:
            part.write_bytes(text)
    print("\n".join(lines))
