"""Conversations of roles, texts and pictures -> token ids, by the model's own template."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from vfjax import prompts
from vfjax.errors import InputError
from vfjax.processor import Picture, Processor
from vfjax.prompts import IMAGE_TOKEN

_LITERAL = "\0image\0"
"""Stands for `<image>` in people's words until the pictures' places are found."""


@dataclasses.dataclass(frozen=True)
class Message:
    """What somebody says.

    Attributes:
        role: "system", "user" or "assistant".
        parts: texts (str), and pictures or videos (anything else), in order.
    """

    role: str
    parts: tuple[Any, ...]


def tokenize(processor: Processor, messages: Sequence[Message]) -> tuple[list[int], list[Picture]]:
    """A conversation as a row of `processor(pictures, input_ids=...)`, its answer open.

    The templates have system texts of their own, which the models were trained with; a system
    message goes before the first question. Pictures come first in their message, as in training,
    unless they stand between texts. `<image>` in a text is text.

    Args:
        processor: of the model.
        messages: any system messages first, then user and assistant in turn, a user last; several
            messages of a user are one question.

    Returns:
        Ids with -200 at each picture, and the pictures in that order.

    Raises:
        InputError: roles in another order, an empty text, or a picture of the assistant.
    """
    rest = list(itertools.dropwhile(lambda m: m.role == "system", messages))
    system = messages[: len(messages) - len(rest)]
    turns: list[prompts.Turn] = []
    pictures: list[Picture] = []
    at = len(system)
    for role, group in itertools.groupby(rest, key=lambda m: m.role):
        said = list(group)
        if role == "user":
            parts = [part for message in said for part in message.parts]
            pictures += [part for part in parts if not isinstance(part, str)]
            turns.append((_question(parts), None))
        elif role == "assistant" and turns and len(said) == 1:
            turns[-1] = (turns[-1][0], _words(said, at))
        else:
            raise _wrong(at, f"a message of {role!r}")
        at += len(said)
    if not turns or turns[-1][1] is not None:
        raise _wrong(len(messages) - 1, "no question at the end")
    first = _words(system, 0)
    if first:
        turns[0] = (f"{first}\n\n{turns[0][0]}", turns[0][1])
    text = prompts.render(prompts.get_template(processor.template), turns)
    return prompts.tokenize(_Literal(processor.require_tokenizer()), text), pictures


def _question(parts: Sequence[Any]) -> str:
    """The parts of a question as text with an `<image>` at each picture."""
    said = [_plain(part) if isinstance(part, str) else None for part in parts]
    runs = [key for key, _ in itertools.groupby(said, key=lambda text: text is None)]
    if runs.count(False) < 2:  # no picture between texts
        said.sort(key=lambda text: text is not None)
    return "\n".join(IMAGE_TOKEN if text is None else text for text in said)


def _words(messages: Sequence[Message], at: int) -> str:
    parts = [part for message in messages for part in message.parts]
    if not all(isinstance(part, str) for part in parts):
        raise _wrong(at, f"a picture in a message of {messages[0].role!r}")
    return _plain("\n".join(parts))


def _plain(text: str) -> str:
    return text.replace(IMAGE_TOKEN, _LITERAL)


@dataclasses.dataclass(frozen=True)
class _Literal:
    """A tokenizer that reads `<image>` where `_LITERAL` stands."""

    tokenizer: Any

    @property
    def bos_token_id(self) -> int | None:
        return self.tokenizer.bos_token_id

    def __call__(self, text: str) -> Any:
        return self.tokenizer(text.replace(_LITERAL, IMAGE_TOKEN))


def _wrong(at: int, found: str) -> InputError:
    return InputError(
        f"messages[{max(at, 0)}]",
        found=found,
        expected="system messages of text, then user and assistant in turn, a user last",
        fix="change the conversation",
    )
