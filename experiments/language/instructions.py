"""Instructions whose following a rule can check, as IFEval's (arXiv 2311.07911, table 1).

Own prompts and rules: the libraries that have IFEval's (lm-eval, if-verifiable) fetch its prompts
from the hub and word lists from NLTK's servers when they run.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def items(text: str) -> int:
    """Lines that begin with a bullet or a number."""
    return sum(bool(re.match(r"([-*\u2022]|\d+[.)])\s+\S", line)) for line in _lines(text))


def sentences(text: str) -> int:
    """Parts that end with a full stop, question or exclamation mark, and what is left."""
    return len([part for part in re.split(r"(?<=[.!?])\s+", text.strip()) if part])


def words(text: str) -> list[str]:
    """In lower case, without marks."""
    return re.findall(r"[\w']+", text.casefold())


def is_json(text: str) -> bool:
    """An object, in a code fence or not."""
    inside = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", text.strip(), re.DOTALL)
    try:
        return isinstance(json.loads(inside[1] if inside else text), dict)
    except (ValueError, RecursionError):
        return False


def is_cased(text: str, upper: bool) -> bool:
    """Letters, all of one case."""
    changed = text.upper() if upper else text.lower()
    return any(map(str.isalpha, text)) and text == changed


END = "That is all."
START = "Let me see:"
CHOICES = ("yes", "no", "maybe")

RULES: Mapping[str, tuple[str, Callable[[str], bool]]] = {
    "one word": (
        "What do you think of first when you hear of {}? Answer with a single word.",
        lambda text: len(words(text)) == 1,
    ),
    "few words": (
        "Describe {} in at most ten words.",
        lambda text: 1 <= len(words(text)) <= 10,
    ),
    "two sentences": (
        "Tell me about {} in exactly two sentences.",
        lambda text: sentences(text) == 2,
    ),
    "capitals": (
        "Write one short sentence about {}, in capital letters only.",
        lambda text: is_cased(text, upper=True),
    ),
    "small letters": (
        "Write one short sentence about {}, in lowercase letters only, without any capital letter.",
        lambda text: is_cased(text, upper=False),
    ),
    "three items": (
        "Name three things that have to do with {}, as a list of three bullet points.",
        lambda text: items(text) == 3,
    ),
    "end": (
        f"Write one short sentence about {{}}. Finish your answer with the words: {END}",
        lambda text: text.rstrip(' "').endswith(END),
    ),
    "start": (
        f"Write one short sentence about {{}}. Begin your answer with the words: {START}",
        lambda text: text.lstrip(' "').startswith(START),
    ),
    "keyword": (
        'Write one short sentence about {} that has the words "window" and "happy" in it.',
        lambda text: {"window", "happy"} <= set(words(text)),
    ),
    "no comma": (
        "Write one sentence about {} without using any comma.",
        lambda text: bool(words(text)) and "," not in text,
    ),
    "quotation": (
        "Write one short sentence about {}. Put your whole answer in double quotation marks.",
        lambda text: len(text) > 2 and text[0] in '"\u201c' and text[-1] in '"\u201d',
    ),
    "title": (
        "Write a title for a poem about {}, wrapped in double angular brackets, as in <<title>>.",
        lambda text: re.search(r"<<[^<>\n]+>>", text) is not None,
    ),
    "choice": (
        'Do you like {}? Answer with one of "yes", "no" or "maybe", and nothing else.',
        lambda text: len(found := words(text)) == 1 and found[0] in CHOICES,
    ),
    "JSON": (
        'Give me a JSON object with the keys "name" and "colour" that describes {}. Only the JSON.',
        is_json,
    ),
}
"""Kind -> the prompt about something, and whether an answer follows it."""

ABOUT = ("a dog", "the sea", "winter", "music")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """What is asked, and by which of `RULES` an answer is checked."""

    kind: str
    about: str

    @property
    def prompt(self) -> str:
        return RULES[self.kind][0].format(self.about)

    def followed(self, text: str) -> bool:
        return RULES[self.kind][1](text)


def instructions() -> list[Instruction]:
    return [Instruction(kind, about) for kind in RULES for about in ABOUT]
