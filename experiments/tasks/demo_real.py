"""Ten questions about photographs: what each shipped member and their fusion write, side by side.

Base and tower are published weights, from their packages; the members are adapters and projectors.
"""

import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from ml_collections import ConfigDict
from PIL import Image

import converters
import vfjax
from converters.export import to_bytes
from experiments.family.members import Quiz, load
from experiments.family.real import english, photos
from experiments.tasks import family_real
from vfjax import Model, Processor
from vfjax.atomic import replacing

PHOTOS = (("what", 5), ("there", 2), ("absent", 1))
"""Kind of question about photographs -> how many; a photograph is asked about once."""

SCENES = ("ocr", "colour")
"""What is asked about each of the scenes."""


class Asked(NamedTuple):
    """A picture, a question about it and what is right."""

    picture: Path
    question: str
    right: str


def run(config: ConfigDict, workdir: Path) -> None:
    start = time.perf_counter()
    print("the base LLM, the towers and the members, from packages and adapters", flush=True)
    family_real.prepare(config, workdir)
    members = {}
    for name in config.members:
        family_real.make_member(config, workdir, name, 0)
        members[name] = family_real.member_folder(workdir, name, 0) / "model"
    asked = questions(config, workdir)
    answers: dict[str, list[str]] = {}
    for name, folder in members.items():
        print(f"{name} answers", flush=True)
        answers[name] = ask(*load(folder), asked, config.max_new_tokens)
    print("the fusion answers", flush=True)
    fused, processor = converters.load_fused(
        members,
        base=workdir / "base",
        params={"weights": (1 / len(members),) * len(members)},
        positions=config.positions,
        mask=config.mask,
        dtype="float32",
    )
    assert isinstance(fused, Model) and isinstance(processor, Processor)
    answers["fused"] = ask(fused, processor, asked, config.max_new_tokens)
    print(side_by_side(asked, answers))
    rows = [
        {"picture": one.picture.name, "question": one.question, "right": one.right}
        | {name: texts[i] for name, texts in answers.items()}
        for i, one in enumerate(asked)
    ]
    with replacing(workdir / "answers.json") as part:
        part.write_bytes(to_bytes(rows))
    draw(workdir / "answers.png", asked, answers)
    print(f"{workdir / 'answers.png'}, {workdir / 'answers.json'}")
    print(f"{time.perf_counter() - start:.0f} s")


def questions(config: ConfigDict, workdir: Path) -> list[Asked]:
    """Eight about the packages' photographs, and two about held-out scenes."""
    shown = photos.plain(workdir / "photographs")
    out, at = [], 0
    for kind, count in PHOTOS:
        out += [one(shown, kind, at + i) for i in range(count)]
        at += count
    scenes = english.quiz(workdir / "test", config.seed)
    return out + [one(scenes, kind, i) for i, kind in enumerate(SCENES)]


def one(quiz: Quiz, kind: str, i: int) -> Asked:
    question, answer = quiz.questions[kind][i]
    return Asked(quiz.pictures[i], question, answer.strip())


def ask(model: Model, processor: Processor, asked: Sequence[Asked], most: int) -> list[str]:
    """Greedy answers, of `most` tokens at most."""
    prompts = [processor.chat(one.question) for one in asked]
    batch = processor([one.picture for one in asked], prompts)
    return vfjax.generate(model, processor, batch, max_new_tokens=most)


def side_by_side(asked: Sequence[Asked], answers: Mapping[str, Sequence[str]]) -> str:
    """Picture and question, what is right, and a line an answerer."""
    width = max(map(len, ("right", *answers)))
    lines = []
    for i, one in enumerate(asked):
        lines.append(f"\n{one.picture.name}: {one.question}")
        lines.append(f"  {'right':{width}}  {one.right}")
        lines += [f"  {name:{width}}  {texts[i]}" for name, texts in answers.items()]
    return "\n".join(lines)


def draw(file: Path, asked: Sequence[Asked], answers: Mapping[str, Sequence[str]]) -> None:
    """The pictures, each with its question and all answers."""
    columns = 5
    figure = Figure(figsize=(15, 4.2 * -(-len(asked) // columns)), layout="constrained")
    panels = figure.subplots(-(-len(asked) // columns), columns, squeeze=False).flat
    for i, axes in enumerate(panels):
        axes.axis("off")
        if i >= len(asked):
            continue
        with Image.open(asked[i].picture) as image:
            axes.imshow(image.convert("RGB").resize((192, 192)))
        axes.set_title(textwrap.fill(asked[i].question, 34), fontsize=9)
        said = {"right": asked[i].right, **{name: texts[i] for name, texts in answers.items()}}
        text = "\n".join(textwrap.fill(f"{name}: {words}", 40) for name, words in said.items())
        axes.text(0.5, -0.03, text, transform=axes.transAxes, fontsize=8, ha="center", va="top")
    with replacing(file) as part:
        figure.savefig(part, dpi=100, format="png", bbox_inches="tight")
