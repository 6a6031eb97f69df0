"""Questions in English: each form of the scenes' is told, and answered by one of its options."""

import random

import numpy as np
import pytest

from experiments.family import scenes
from experiments.family.real import english
from vfjax.data import Conversations


def test_every_question_is_told():
    draw, rng = random.Random(0), np.random.default_rng(0)
    digits, colours = scenes.layouts(200, rng)
    seen = set()
    for d, c in zip(digits.tolist(), colours.tolist(), strict=True):
        for kind in scenes.KINDS:
            plain = scenes.ask(kind, d, c, draw)
            asked = english.tell(kind, *plain, draw)
            assert asked.word in asked.options
            assert asked.answer.startswith(asked.stem) and asked.answer.endswith(asked.end)
            assert "{" not in asked.question + asked.answer
            seen.add((asked.question.split()[0], asked.options))
    assert {options for _, options in seen} == set(english.OPTIONS.values())


def test_answers():
    draw = random.Random(0)
    asked = english.tell("ocr", "what digit is magenta ?", "7", draw)
    assert asked.word == "seven" and "pink" in asked.question + asked.stem
    asked = english.tell("locdig", "where is 3 ?", "bottom-left", draw)
    assert asked.word in ("bottom", "left")
    assert "3" in asked.question or "three" in asked.question
    asked = english.tell("exist", "is there 3 ?", "no", draw)
    assert asked.answer == "No."
    with pytest.raises(ValueError, match="no question of count"):
        english.tell("count", "how high ?", "9", draw)


def test_rows_and_quiz(tmp_path):
    folder = tmp_path / "scenes"
    scenes.write(folder, "test", 6, 0, turns=1)
    english.write_rows(folder, 3, 0)
    first = (folder / english.ROWS_FILE).read_bytes()
    english.write_rows(folder, 3, 0)
    assert (folder / english.ROWS_FILE).read_bytes() == first
    rows = Conversations(folder / english.ROWS_FILE, folder / "images")
    assert len(rows) == 6 and len(rows[0].turns) == 4
    assert rows[0].turns[-1][1].startswith("I see a ")
    quiz = english.quiz(folder, 0)
    found = english.blind(folder, quiz)
    assert {kind: len(right) for kind, right in found.items()} == dict.fromkeys(quiz.questions, 6)
    for kind, asked in quiz.questions.items():
        for (_, answer), options in zip(asked, quiz.options[kind], strict=True):
            assert answer in options and answer.startswith(" ") == (kind != "exist")


def test_captions():
    """A word is an id; a patch says what its cell holds, and where that is."""

    class Words:
        known: dict[str, int] = {}

        def __call__(self, text, *, add_special_tokens):
            assert not add_special_tokens
            self.input_ids = [self.known.setdefault(text, len(self.known))]
            return self

    digits, colours = np.full((2, 1, 9), -1, np.int8)
    digits[0, 5], colours[0, 5] = 7, 2  # the middle row's right cell
    words = Words()
    found = english.captions(words, digits, colours)
    names = {i: word for word, i in words.known.items()}
    grid = found.reshape(6, 6, 4)
    assert [names[i] for i in grid[3, 4]] == [" seven", " blue", " middle", " right"]
    assert [names[i] for i in grid[0, 0]] == [" nothing", " nothing", " top", " left"]
