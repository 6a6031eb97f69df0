"""A folder's own chat template, rendered by its tokenizer as transformers renders it."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

from vfjax.errors import InputError, counted
from vfjax.text.prompts import IGNORE, IMAGE_TOKEN, Turn, check_turns, get_template
from vfjax.text.tokenizer import Tokenizer

CHAT_TEMPLATE = "chat_template"
"""In place of a name of `vfjax.text.prompts.TEMPLATES`: the folder's own chat template."""


def known(template: str) -> str:
    """The name of a template.

    Raises:
        InputError: it is neither `CHAT_TEMPLATE` nor one of `vfjax.text.prompts.TEMPLATES`.
    """
    return template if template == CHAT_TEMPLATE else get_template(template).name


Messages = list[dict[str, Any]]
"""As transformers' apply_chat_template takes them: `role`, and `content`, a list of parts."""

PICTURE = {"type": "image"}
"""The part of a message that is a picture."""


def words(text: str) -> dict[str, str]:
    """The part of a message that is text."""
    return {"type": "text", "text": text}


def from_turns(turns: Sequence[Turn]) -> Messages:
    """A conversation as messages; `<image>` in a question is a picture, newlines around it go.

    Raises:
        InputError: no turns, or an unanswered one before the last.
    """
    check_turns(turns)
    out: Messages = []
    for question, answer in turns:
        pieces = question.split(IMAGE_TOKEN)
        parts: list[dict[str, str]] = []
        for i, piece in enumerate(pieces):
            parts += [PICTURE] * (i > 0)
            piece = piece if len(pieces) == 1 else piece.strip("\n")
            parts += [words(piece)] if piece else []
        out.append({"role": "user", "content": parts})
        if answer is not None:
            out.append({"role": "assistant", "content": [words(answer)]})
    return out


def render(
    tokenizer: Tokenizer,
    template: str,
    messages: Messages,
    image_token: str,
    *,
    answer: bool = True,
    variables: Mapping[str, object] = MappingProxyType({}),
) -> str:
    """What transformers' apply_chat_template makes of a conversation.

    A template that knows parts decides where pictures stand. One that takes texts alone, or writes
    nothing for a picture, is given each picture as `image_token` and a newline: transformers gives
    all templates parts, of which such a one would write what Python prints of a list.

    Args:
        tokenizer: of transformers, which runs templates in Jinja's sandbox.
        template: Jinja.
        messages: see `Messages`.
        image_token: what stands for a picture in the text.
        answer: whether an answer is to follow.
        variables: more of the template's, none of which is an argument of apply_chat_template.

    Raises:
        InputError: the template fails, on a part that is a picture too if it takes parts; or it
            writes another number of pictures.
    """
    if not _knows_parts(tokenizer, template, image_token):
        messages = [{**m, "content": _as_text(m["content"], image_token)} for m in messages]
        count = sum(m["content"].count(image_token) for m in messages)
    else:
        count = sum(part == PICTURE for m in messages for part in m["content"])
        count += sum(p.get("text", "").count(image_token) for m in messages for p in m["content"])
    try:
        text = _apply(tokenizer, template, messages, answer, variables)
    except Exception as error:  # what a template raises is its own affair
        raise _wrong(
            f"one that fails ({type(error).__name__}: {error})", "a conversation that it takes"
        ) from error
    if text.count(image_token) != count:
        raise _wrong(
            f"one that writes {text.count(image_token)} {image_token} "
            f"for {counted(count, 'picture')}",
            "as many of one as of the other",
        )
    return text


def _apply(
    tokenizer: Tokenizer,
    template: str,
    messages: Messages,
    answer: bool,
    variables: Mapping[str, object] = MappingProxyType({}),
) -> str:
    return tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=answer, **variables
    )


def _knows_parts(tokenizer: Tokenizer, template: str, image_token: str) -> bool:
    """Whether a template writes pictures that are parts.

    Raises:
        InputError: it takes parts, as it writes a text alike as one, but fails on a picture.
    """

    def said(content: object) -> str:
        return _apply(tokenizer, template, [{"role": "user", "content": content}], True)

    try:
        return image_token in said([PICTURE, words("x")])
    except Exception as error:  # what a template raises is its own affair
        failed = error
    try:
        takes_parts = said([words("x")]) == said("x")
    except Exception:  # as of a list added to a text
        takes_parts = False
    if takes_parts:
        raise _wrong(
            f"one that takes parts and fails on a picture ({type(failed).__name__}: {failed})",
            "one that writes it",
        ) from failed
    return False


def _as_text(parts: Sequence[dict[str, str]], image_token: str) -> str:
    return "".join(f"{image_token}\n" if part == PICTURE else part["text"] for part in parts)


def _wrong(found: str, expected: str) -> InputError:
    return InputError(
        "chat_template",
        found=found,
        expected=expected,
        fix="change the conversation, or name a template of vfjax.text.prompts.TEMPLATES",
    )


class Prompter(Protocol):
    """What `labels` asks of a processor."""

    @property
    def stops(self) -> Sequence[int]:
        """Ids that end an answer."""

    def render_messages(self, messages: Messages, *, answer: bool = True) -> str:
        """A conversation as a prompt; `answer`: whether one is to follow."""

    def tokenize(self, prompt: str) -> list[int]:
        """Its ids."""


def labels(processor: Prompter, turns: Sequence[Turn]) -> tuple[list[int], list[int]]:
    """Training ids and the loss mask: what the template writes from an answer's first letter on.

    Args:
        processor: whose template is its folder's own.
        turns: (question, answer) pairs, all answered.

    Returns:
        (input_ids, labels) of equal length; labels are the ids where trained on, else `IGNORE`.

    Raises:
        InputError: an open or empty turn, or a template under which no answer ends, or that writes
            a talk otherwise once it goes on.
    """
    check_turns(turns, trained=True)
    messages, text, spans, ids = from_turns(turns), "", [], list[int]()
    if len(messages) != 2 * len(turns):
        raise InputError("turns", found="an open turn", expected="an answer", fix="drop the row")
    for end in range(2, len(messages) + 1, 2):
        asked = processor.render_messages(messages[: end - 1])
        said = processor.render_messages(messages[:end], answer=False)
        if not asked.startswith(text) or not said.startswith(asked):
            raise _wrong("one that writes a question otherwise once it is answered", "one to train")
        text, start = said, len(processor.tokenize(asked))
        ids = processor.tokenize(said)
        if not set(ids[start:]) & set(processor.stops):
            raise _wrong("one with no stop token after an answer", "one that ends answers")
        spans.append((start, len(ids)))
    targets = [IGNORE] * len(ids)
    for start, end in spans:
        targets[start:end] = ids[start:end]
    return ids, targets
