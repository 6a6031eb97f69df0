"""Questions about scenes as English sentences, and what a patch's words are.

Digits and colours are named by words that are one token each in SmolLM2's vocabulary. A question
of a kind is put in one of several ways, the digit as a word or a numeral, and is answered by a
sentence whose last word tells: what stands before it is the answer's stem, so that a reader is
scored by which of the kind's words it holds likeliest after the stem.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.family import scenes
from experiments.family.members import Quiz
from vfjax.atomic import replacing
from vfjax.eval.data import read_lines
from vfjax.text.tokenizer import Tokenizer

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = ("red", "green", "blue", "yellow", "cyan", "pink")  # as `scenes.COLOURS`
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "middle", "right")
EMPTY = "nothing"

ROWS_FILE = "english.json"


class Asked(NamedTuple):
    """A question, the words that may answer it, and the answer: stem, word, end."""

    question: str
    options: tuple[str, ...]
    stem: str
    word: str
    end: str = "."

    @property
    def answer(self) -> str:
        """The whole sentence."""
        return f"{self.stem} {self.word}{self.end}" if self.stem else f"{self.word}{self.end}"


WAYS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "row": (
        ("In which row is the {}?", "The {} is in the", " row."),
        ("Where is the {}: in the top, middle or bottom row?", "It is in the", " row."),
        ("Which row holds the {}?", "The row that holds it is the", " one."),
    ),
    "column": (
        ("In which column is the {}?", "The {} is in the", " column."),
        ("Where is the {}: in the left, middle or right column?", "It is in the", " column."),
        ("Which column holds the {}?", "The column that holds it is the", " one."),
    ),
    "ocr": (
        ("Which digit is {}?", "The {} digit is", "."),
        ("What number is written in {}?", "The number in {} is", "."),
        ("Name the {} number.", "It is", "."),
    ),
    "colour": (
        ("What colour is the {}?", "The {} is", "."),
        ("In which colour is the {} written?", "It is written in", "."),
        ("Tell me the colour of the {}.", "The colour of the {} is", "."),
    ),
    "count": (
        ("How many {} are there?", "The number of {} is", "."),
        ("Count the {} in the picture.", "The number of {} is", "."),
        ("What is the number of {}?", "It is", "."),
    ),
    "exist": (
        ("Is there a {}?", "", "."),
        ("Does the picture show a {}?", "", "."),
        ("Can you see a {}?", "", "."),
    ),
    "compare": (
        ("Which digit is the {}?", "The {} digit is", "."),
        ("What is the {} number in the picture?", "The {} number is", "."),
        ("Name the {} digit.", "It is", "."),
    ),
}
"""What is asked -> (question, the answer's stem, its end)."""

LISTS = ("List the digits.", "Which digits are there, and where?", "Describe the digits you see.")

OPTIONS: dict[str, tuple[str, ...]] = {
    "row": ROWS,
    "column": COLUMNS,
    "ocr": DIGITS,
    "colour": COLOURS,
    "count": DIGITS[:6],
    "exist": ("Yes", "No"),
    "compare": DIGITS,
}


def tell(kind: str, question: str, answer: str, draw: random.Random) -> Asked:
    """A question of `scenes.ask`, in its family's words, as an English one.

    Args:
        kind: of `scenes.KINDS`, the one that was asked for.
        question: as `scenes.ask` words it.
        answer: its answer.
        draw: chooses among the ways to put it, and row or column where it asks for a place.

    Raises:
        ValueError: a question of another form.
    """
    match question.split():
        case ["where", "is", what, "?"]:
            row, column = divmod(scenes.PLACES.index(answer), 3)
            kind = draw.choice(("row", "column"))
            word = ROWS[row] if kind == "row" else COLUMNS[column]
            about = _digit(what, draw) if what.isdigit() else f"{_colour(what)} digit"
        case ["what", "digit", "is", colour, "?"]:
            kind, about, word = "ocr", _colour(colour), DIGITS[int(answer)]
        case ["what", "colour", "is", digit, "?"]:
            kind, about, word = "colour", _digit(digit, draw), _colour(answer)
        case ["how", "many", "digits", "?"]:
            kind, about, word = "count", "digits", answer
        case ["how", "many", colour, "?"]:
            kind, about, word = "count", f"{_colour(colour)} digits", answer
        case ["is", "there", what, "?"]:
            kind, word = "exist", answer.capitalize()
            about = f"digit {_digit(what, draw)}" if what.isdigit() else f"{_colour(what)} digit"
        case ["which", "is", size, "?"]:
            kind, about, word = "compare", size, DIGITS[int(answer)]
        case _:
            raise ValueError(f"no question of {kind}: {question!r}")
    way, stem, end = draw.choice(WAYS[kind])
    return Asked(way.format(about), OPTIONS[kind], stem.format(about), word, end)


def listed(digits: Sequence[int], colours: Sequence[int]) -> str:
    """All digits of a scene, cell by cell, in one sentence."""
    parts = []
    for i in range(scenes.CELLS):
        if digits[i] >= 0:
            what = f"a {COLOURS[colours[i]]} {DIGITS[digits[i]]}"
            parts.append(f"{what} in the {ROWS[i // 3]} row, {COLUMNS[i % 3]} column")
    return f"I see {'; '.join(parts)}."


def _digit(numeral: str, draw: random.Random) -> str:
    return draw.choice((DIGITS[int(numeral)], numeral))


def _colour(name: str) -> str:
    return COLOURS[scenes.COLOURS.index(name)]


def write_rows(folder: Path, turns: int, seed: int) -> None:
    """Writes english.json into a folder of `scenes.write`: `turns` questions, then a list of all.

    The list comes last, so that no question is answered by it.
    """
    draw, rows = random.Random(f"english {seed}"), []
    for label in read_lines(folder / "scenes.json"):
        talk = []
        for i in range(turns):
            kind = draw.choice(scenes.KINDS)
            asked = tell(kind, *scenes.ask(kind, label["digits"], label["colours"], draw), draw)
            picture = "" if i else "<image>\n"
            talk.append({"from": "human", "value": picture + asked.question})
            talk.append({"from": "gpt", "value": asked.answer})
        talk.append({"from": "human", "value": draw.choice(LISTS)})
        talk.append({"from": "gpt", "value": listed(label["digits"], label["colours"])})
        rows.append({"id": label["image"], "image": label["image"], "conversations": talk})
    with replacing(folder / ROWS_FILE) as part:
        part.write_text(json.dumps(rows))


def quiz(folder: Path, seed: int) -> Quiz:
    """One question of every kind about each scene of a folder of `scenes.write`."""
    draw = random.Random(f"quiz {seed}")
    rows = read_lines(folder / "scenes.json")
    asked: dict[str, list[Asked]] = {}
    for kind in scenes.KINDS:
        plain = [row["questions"][kind] for row in rows]
        asked[kind] = [tell(kind, question, answer, draw) for question, answer in plain]
    return of([folder / "images" / row["image"] for row in rows], asked)


def blind(folder: Path, test: Quiz) -> dict[str, np.ndarray]:
    """What the training's talks tell without a picture: right or wrong, by kind of question.

    Each wording is answered by its most frequent answer among the rows of `write_rows`.
    """
    known: dict[str, Counter[str]] = {}
    for row in read_lines(folder / ROWS_FILE):
        said = [message["value"] for message in row["conversations"]]
        for question, answer in zip(said[:-2:2], said[1:-2:2], strict=True):
            place = re.search(r"the (\w+) (row|column|one)\.$", answer)
            word = place[1] if place else answer.rstrip(".").split()[-1]
            known.setdefault(_wording(question), Counter())[word] += 1
    out = {}
    for kind, asked in test.questions.items():
        usual = [known.get(_wording(question), Counter({"": 1})) for question, _ in asked]
        right = [answer.strip() for _, answer in asked]
        out[kind] = np.array(
            [u.most_common(1)[0][0] == r for u, r in zip(usual, right, strict=True)]
        )
    return out


def _wording(question: str) -> str:
    """A question without what it is about."""
    text = re.sub(rf"\b({'|'.join(DIGITS)}|\d)\b", "D", question.removeprefix("<image>\n"))
    return re.sub(rf"\b({'|'.join(COLOURS)})\b", "C", text)


def of(pictures: list[Path], asked: Mapping[str, Sequence[Asked]]) -> Quiz:
    """A quiz of English questions."""

    def spoken(one: Asked, word: str) -> str:
        return f" {word}" if one.stem else word

    return Quiz(
        pictures,
        {kind: [(x.question, spoken(x, x.word)) for x in each] for kind, each in asked.items()},
        {kind: [x.stem for x in each] for kind, each in asked.items()},
        {
            kind: [tuple(spoken(x, word) for word in x.options) for x in each]
            for kind, each in asked.items()
        },
    )


def captions(tokenizer: Tokenizer, digits: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """What each patch shows, as ids int32[n, 36, 4] of scenes int8[n, 9].

    A patch of a cell says its digit, colour, row and column; one of an empty cell nothing, and
    where it is.
    """

    def ids(words: Sequence[str]) -> np.ndarray:
        found = [tokenizer(f" {word}", add_special_tokens=False).input_ids for word in words]
        return np.array([one for (one,) in found], np.int32)

    full = digits >= 0
    nothing = ids([EMPTY])
    row, column = np.divmod(np.arange(9), 3)
    parts = [
        np.where(full, ids(DIGITS)[digits], nothing),
        np.where(full, ids(COLOURS)[colours], nothing),
        np.broadcast_to(ids(ROWS)[row], digits.shape),
        np.broadcast_to(ids(COLUMNS)[column], digits.shape),
    ]
    grid = np.stack(parts, axis=-1).reshape(-1, 3, 3, 4)
    return grid.repeat(2, axis=1).repeat(2, axis=2).reshape(len(digits), -1, 4)
