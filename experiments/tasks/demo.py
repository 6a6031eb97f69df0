"""Fuses the shipped family, measures everybody on held-out pictures, and shows one answer each."""

import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from PIL import Image

import converters
import vfjax
from converters.export import to_bytes
from experiments.family import scenes
from experiments.family.members import Quiz, means
from experiments.family.study import FUSED, WAYS, paired, study, table
from experiments.tasks.common import FAMILY
from vfjax import InputError
from vfjax.atomic import JSON, empty, replacing


def run(config: ConfigDict, workdir: Path) -> None:
    start = time.perf_counter()
    for name in config.members:
        if not (FAMILY / name).is_dir():
            shipped = ", ".join(sorted(p.name for p in FAMILY.iterdir() if p.name != "base"))
            raise InputError(
                "config.members", found=repr(name), expected=f"some of {shipped}", fix="correct it"
            )
    empty(workdir)
    print(
        f"asks {' and '.join(config.members)}, and fusions of them, about {config.scenes} pictures"
    )
    print("this takes one to two minutes on two cores; nothing is trained", flush=True)
    members = {name: FAMILY / name for name in config.members}
    scenes.write(workdir / "scenes", "test", config.scenes, config.seed, turns=1)
    test = Quiz.read(workdir / "scenes")
    ways = dict(list(WAYS.items())[-1:])
    found = study(FAMILY / "base", members, test, workdir / "fused", ways)
    rows = {who: means(scores) for who, scores in found.items()}
    print(f"\nright answers in per cent, {config.scenes} held-out pictures, one seed of members\n")
    print(table(rows))
    best = max(members, key=lambda name: rows[name]["mean"])
    gain = paired(found[FUSED], found[best])
    print(
        f"\n{FUSED}: {gain['difference']:+.1f} points over {best}, the best member; 95 % interval "
        f"{gain['interval'][0]:.1f} to {gain['interval'][1]:.1f}, p = {gain['p']:.4f}"
    )
    print(f"\n{reading(config.members)}")
    draw(workdir / "results.png", {who: rows[who] for who in (*members, FUSED, *ways)})
    answers = ask(members, workdir, test)
    record: JSON = {
        "members": {name: rows[name]["mean"] for name in members},
        "controls": {w: r["mean"] for w, r in rows.items() if w not in members and w != FUSED},
        "fused": rows[FUSED]["mean"],
        "by_task": {
            who: {k: v for k, v in row.items() if k != "mean"} for who, row in rows.items()
        },
        "seeds": [0],
        "against the best member": gain,
        "answers": answers,
    }
    with replacing(workdir / "results.json") as part:
        part.write_bytes(to_bytes(record))
    print(f"\n{workdir}/fused is the fused model; results.json and results.png lie beside it")
    print(f"{time.perf_counter() - start:.0f} s")


COLUMNS = {
    "locdig": "where a digit is",
    "loccol": "where a colour is",
    "ocr": "which digit has a colour",
    "colour": "which colour a digit has",
    "count": "how many there are",
    "exist": "is there one",
    "compare": "which is largest",
}


def reading(members: Sequence[str]) -> str:
    """What the table's columns and rows mean, in words."""
    columns = ", ".join(f"{name} ({what})" for name, what in COLUMNS.items())
    return "\n".join(
        (
            textwrap.fill(f"Columns, the kinds of questions: {columns}; and their mean.", 100),
            f"  {' and '.join(members)}: the members, each with its own eyes.",
            f"  {FUSED}: VisionFuse; one merged LLM reads the tokens of all eyes.",
            "  ... parallel and block: the same model, each member's tokens at the positions that",
            "    it was trained with and out of the others' sight. The one to choose.",
            "  base LLM, LLM of ...: controls that read the same tokens without the merge. The row",
            "    of the base says what it is worth to read with all eyes: most of the gain.",
            "  cache, logits: other ways to combine; they cost a prefill or a decode a member.",
            "  merged LLM, ... alone: what the merge does to one member's own tokens.",
        )
    )


def ask(members: Mapping[str, Path], workdir: Path, test: Quiz) -> dict[str, dict[str, str]]:
    """Questions about one picture: what every member and the fused model write."""
    picture = test.pictures[0]
    print(f"\n{picture}")
    asked = {kind: test.questions[kind][0] for kind in ("ocr", "colour", "locdig", "loccol")}
    out: dict[str, dict[str, str]] = {q: {"right": answer} for q, answer in asked.values()}
    for name, folder in {**members, "fused": workdir / "fused"}.items():
        model, processor = converters.load(folder)
        prompts = [processor.chat(question) for question in out]
        batch = processor([picture] * len(prompts), prompts)
        texts = vfjax.generate(model, processor, batch, max_new_tokens=4)
        for question, text in zip(out, texts, strict=True):
            out[question][name] = text
    for question, answers in out.items():
        said = "   ".join(f"{name}: {answer}" for name, answer in answers.items())
        print(f"  {question:<24} {said}")
    Image.open(picture).resize((384, 384), Image.Resampling.NEAREST).save(workdir / "picture.png")
    return out


def draw(file: Path, rows: Mapping[str, Mapping[str, float]]) -> None:
    """Bars of the scores by kind of question."""
    kinds = list(next(iter(rows.values())))
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(rows)
    for i, (who, row) in enumerate(rows.items()):
        at = np.arange(len(kinds)) + (i - (len(rows) - 1) / 2) * width
        axes.bar(at, [row[kind] for kind in kinds], width, label=who)
    names = [textwrap.fill(COLUMNS.get(kind, kind), 12) for kind in kinds]
    axes.set_xticks(np.arange(len(kinds)), names)
    axes.set(ylabel="right answers (%)", ylim=(0, 100))
    axes.legend(frameon=False, ncols=len(rows))
    with replacing(file) as part:
        figure.savefig(part, dpi=120, format="png")
