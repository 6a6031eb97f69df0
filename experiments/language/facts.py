"""Short questions of fact that any small LLM has read the answers to, in five kinds."""

import dataclasses
import re
from collections.abc import Mapping

OPTIONS = 4
"""Answers that are weighed against one another: the right one and others of its kind."""


@dataclasses.dataclass(frozen=True)
class Fact:
    """Something to know.

    Attributes:
        kind: of `KINDS`.
        start: a statement that the answer completes.
        question: the same as a question.
        options: the right answer, then wrong ones.
    """

    kind: str
    start: str
    question: str
    options: tuple[str, ...]


KINDS: Mapping[str, tuple[str, str, Mapping[str, str]]] = {
    "capital": (
        "The capital of {} is",
        "What is the capital of {}?",
        {
            "France": "Paris",
            "Italy": "Rome",
            "Spain": "Madrid",
            "Germany": "Berlin",
            "Japan": "Tokyo",
            "Greece": "Athens",
            "Russia": "Moscow",
            "China": "Beijing",
            "Egypt": "Cairo",
            "England": "London",
            "Ireland": "Dublin",
            "Austria": "Vienna",
            "Portugal": "Lisbon",
            "Poland": "Warsaw",
            "Norway": "Oslo",
            "Sweden": "Stockholm",
            "Finland": "Helsinki",
            "Hungary": "Budapest",
            "Cuba": "Havana",
            "Canada": "Ottawa",
            "Iraq": "Baghdad",
            "Iran": "Tehran",
            "Peru": "Lima",
            "Kenya": "Nairobi",
        },
    ),
    "opposite": (
        "The opposite of {} is",
        "What is the opposite of {}?",
        {
            "hot": "cold",
            "big": "small",
            "up": "down",
            "day": "night",
            "left": "right",
            "old": "new",
            "wet": "dry",
            "rich": "poor",
            "fast": "slow",
            "hard": "soft",
            "true": "false",
            "early": "late",
            "empty": "full",
            "strong": "weak",
            "happy": "sad",
            "light": "dark",
            "open": "closed",
            "long": "short",
            "black": "white",
            "love": "hate",
        },
    ),
    "sum": (
        "{} =",
        "What is {}?",
        {
            "1 + 1": "2",
            "1 + 2": "3",
            "2 + 2": "4",
            "2 + 3": "5",
            "2 + 4": "6",
            "3 + 4": "7",
            "4 + 4": "8",
            "4 + 5": "9",
            "5 + 2": "7",
            "6 + 2": "8",
            "6 + 3": "9",
            "5 + 1": "6",
            "3 + 2": "5",
            "1 + 3": "4",
        },
    ),
    "colour": (
        "The colour of {} is",
        "What is the colour of {}?",
        {
            "fresh snow": "white",
            "blood": "red",
            "grass in spring": "green",
            "the sky on a clear day": "blue",
            "coal": "black",
            "a ripe banana": "yellow",
            "chocolate": "brown",
            "a carrot": "orange",
            "milk": "white",
            "a ripe strawberry": "red",
            "a lemon": "yellow",
            "an emerald": "green",
            "a sapphire": "blue",
            "a flamingo": "pink",
            "a crow": "black",
            "an aubergine": "purple",
        },
    ),
    "what it is": (
        "{} is a kind of",
        "What kind of thing is {}?",
        {
            "An eagle": "bird",
            "A salmon": "fish",
            "Copper": "metal",
            "A hammer": "tool",
            "A pear": "fruit",
            "Spanish": "language",
            "Jupiter": "planet",
            "A tulip": "flower",
            "A sparrow": "bird",
            "A shark": "fish",
            "Iron": "metal",
            "A screwdriver": "tool",
            "A cherry": "fruit",
            "Latin": "language",
            "Saturn": "planet",
            "A rose": "flower",
            "An owl": "bird",
            "A trout": "fish",
            "Tin": "metal",
            "A mango": "fruit",
        },
    ),
}
"""Kind -> the statement, the question, and what is asked about with its answer."""


def facts() -> list[Fact]:
    """All facts; the wrong answers of each are the next others of its kind."""
    out = []
    for kind, (start, question, known) in KINDS.items():
        answers = list(dict.fromkeys(known.values()))
        for what, answer in known.items():
            at = answers.index(answer)
            options = tuple(answers[(at + i) % len(answers)] for i in range(OPTIONS))
            told, asked = start.format(what), question.format(what[0].lower() + what[1:])
            asked = asked if kind == "what it is" else question.format(what)
            out.append(Fact(kind, told, asked, options))
    return out


def answered(fact: Fact, text: str) -> bool:
    """Whether an answer has the right one among its words, and no wrong one that was not asked."""
    said, asked = (set(re.findall(r"\w+", words.casefold())) for words in (text, fact.question))
    right, *wrong = (option.casefold() for option in fact.options)
    return right in said and not (set(wrong) - asked) & said
