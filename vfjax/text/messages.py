"""Conversations of roles, texts and pictures -> token ids, by the model's own template."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

from vfjax.errors import InputError
from vfjax.processor import Processor
from vfjax.rows import Picture
from vfjax.text import chat, prompts
from vfjax.text.prompts import IMAGE_TOKEN
from vfjax.text.tokenizer import Encoding, TextTokenizer

_LITERAL = "\ue000image\ue000"
"""Stands for `<image>` in people's words until the pictures' places are found."""


@dataclasses.dataclass(frozen=True)
class Message:
    """What somebody says.

    Attributes:
        role: "system", "user" or "assistant".
        parts: texts (str), and pictures or videos (anything else), in order.
        more: other keys of the message (`name`), for a folder's own chat template alone.
    """

    role: str
    parts: tuple[str | Picture, ...]
    more: Mapping[str, object] = dataclasses.field(default_factory=dict)


def tokenize(
    processor: Processor,
    messages: Sequence[Message],
    variables: Mapping[str, object] | None = None,
) -> tuple[list[int], list[Picture]]:
    """A conversation as a row of `processor(pictures, input_ids=...)`, its answer open.

    The named templates have system texts of their own, which the models were trained with; a system
    message goes before the first question. Pictures come first in their message, as in training,
    unless they stand between texts. A folder's own chat template is given all messages as they are.
    `<image>` in a text is text.

    Args:
        processor: of the model.
        messages: any system messages first, then user and assistant in turn, a user last; several
            messages of a user are one question. A folder's own template may take others.
        variables: see `vfjax.text.chat.render`; for a folder's own template alone.

    Returns:
        Ids with -200 at each picture, and the pictures in that order.

    Raises:
        InputError: roles in another order, or a picture of the assistant; or what a folder's own
            template says.
    """
    text, pictures = _rendered(processor, messages, variables)
    return _ids(processor, text), pictures


def render(
    processor: Processor,
    messages: Sequence[Message],
    variables: Mapping[str, object] | None = None,
    *,
    answer: bool = True,
) -> tuple[str, list[Picture]]:
    """A conversation as a prompt of `processor(pictures, [prompt])`, and its pictures.

    Arguments and errors as of `tokenize`, but `<image>` in a text is a picture's place, and so is
    refused; and where no `answer` is to follow, the assistant may be last.
    """
    text, pictures = _rendered(processor, messages, variables, answer)
    if _LITERAL in text:
        raise InputError(
            "messages",
            found=f"{processor.image_token or IMAGE_TOKEN} in a text",
            expected="pictures as parts of their own",
            fix="leave it out of the text, or take the ids in place of the prompt",
        )
    return text, pictures


def _rendered(
    processor: Processor,
    messages: Sequence[Message],
    variables: Mapping[str, object] | None,
    answer: bool = True,
) -> tuple[str, list[Picture]]:
    """A prompt with `_LITERAL` where people wrote the placeholder, and its pictures."""
    if processor.template == chat.CHAT_TEMPLATE:
        return _own(processor, messages, variables, answer)
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
            turns.append((_question(parts, processor), None))
        elif role == "assistant" and turns and len(said) == 1:
            turns[-1] = (turns[-1][0], _words(said, at, processor))
        else:
            raise _wrong(at, f"a message of {role!r}")
        at += len(said)
    if not turns or (answer and turns[-1][1] is not None):
        raise _wrong(len(messages) - 1, "no question at the end")
    first = _words(system, 0, processor)
    if first:
        turns[0] = (f"{first}\n\n{turns[0][0]}", turns[0][1])
    return processor.render(turns), pictures


def _own(
    processor: Processor,
    messages: Sequence[Message],
    variables: Mapping[str, object] | None,
    answer: bool,
) -> tuple[str, list[Picture]]:
    """By the folder's own chat template."""
    if not messages or (answer and messages[-1].role == "assistant"):
        raise _wrong(len(messages) - 1, "no question at the end")
    said: chat.Messages = []
    pictures: list[Picture] = []
    for message in messages:
        pictures += [part for part in message.parts if not isinstance(part, str)]
        parts = [
            chat.words(_plain(part, processor)) if isinstance(part, str) else chat.PICTURE
            for part in message.parts
        ]
        said.append({**message.more, "role": message.role, "content": parts})
    return processor.render_messages(said, answer=answer, variables=variables), pictures


def _ids(processor: Processor, text: str) -> list[int]:
    """Ids of a prompt with `_LITERAL` where people wrote the placeholder."""
    tokenizer = processor.require_tokenizer()
    if not processor.image_token:
        return prompts.tokenize(_Literal(tokenizer), text)
    # Cut inside the placeholder, no piece has it; a newline before a piece keeps its first word.
    token = processor.image_token
    first, *rest = text.split(_LITERAL)
    half = len(token) // 2
    pieces = [first, *(token[half:] + piece for piece in rest)]
    pieces = [piece + token[:half] for piece in pieces[:-1]] + pieces[-1:]
    ids, newline = processor.tokenize(pieces[0]), tokenizer("\n", add_special_tokens=False)
    for piece in pieces[1:]:
        more = prompts.tokenize_whole(tokenizer, "\n" + piece, token, special=False)
        ids += more[len(newline.input_ids) :]
    return ids


def _question(parts: Sequence[str | Picture], processor: Processor) -> str:
    """The parts of a question as text with an `<image>` at each picture."""
    said = [_plain(part, processor) if isinstance(part, str) else None for part in parts]
    runs = [key for key, _ in itertools.groupby(said, key=lambda text: text is None)]
    if runs.count(False) < 2:  # no picture between texts
        said.sort(key=lambda text: text is not None)
    return "\n".join(IMAGE_TOKEN if text is None else text for text in said)


def _words(messages: Sequence[Message], at: int, processor: Processor) -> str:
    parts = [part for message in messages for part in message.parts]
    said = [part for part in parts if isinstance(part, str)]
    if len(said) < len(parts):
        raise _wrong(at, f"a picture in a message of {messages[0].role!r}")
    return _plain("\n".join(said), processor)


def _plain(text: str, processor: Processor) -> str:
    """A text with `_LITERAL` where it has what stands for pictures."""
    return text.replace(processor.image_token or IMAGE_TOKEN, _LITERAL)


@dataclasses.dataclass(frozen=True)
class _Literal:
    """A tokenizer that reads `<image>` where `_LITERAL` stands."""

    tokenizer: TextTokenizer

    @property
    def bos_token_id(self) -> int | None:
        return self.tokenizer.bos_token_id

    def __call__(self, text: str) -> Encoding:
        return self.tokenizer(text.replace(_LITERAL, IMAGE_TOKEN))


def _wrong(at: int, found: str) -> InputError:
    return InputError(
        f"messages[{max(at, 0)}]",
        found=found,
        expected="system messages of text, then user and assistant in turn, a user last",
        fix="change the conversation",
    )
