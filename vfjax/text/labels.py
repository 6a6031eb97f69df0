"""Training ids and loss masks of conversations in the named templates.

"Upstream" is `train/train.py` of the repositories in `vfjax.text.prompts`.
"""

import warnings
from collections.abc import Sequence

from vfjax.errors import InputError, counted
from vfjax.text.prompts import IGNORE, IMAGE_TOKEN, Template, Turn, check_turns, encoded
from vfjax.text.tokenizer import Tokenizer


def labels(
    tokenizer: Tokenizer, template: Template, turns: Sequence[Turn], image_token: str = ""
) -> tuple[list[int], list[int]]:
    """Makes training ids and the loss mask of one conversation.

    As in upstream's `preprocess_multimodal` and `preprocess_*`: the pictures of a question become
    one `<image>` line at its front; answers and their end tokens are trained on, all else is
    masked; with `plain`, the text is `<image>`, caption, newline. Upstream finds the answers by
    adding up the lengths of separately tokenised rounds, here they are the spans between
    tokenised prefixes. Those sums go wrong in talks of several turns when the tokenizer's BOS
    does not fit the template; upstream then masks the whole sample, and so does this.

    Args:
        tokenizer: a transformers tokenizer.
        template: one of `TEMPLATES`.
        turns: (question, answer) pairs, all answered.
        image_token: of a model whose prompts are tokenised whole, see `tokenize_whole`.

    Returns:
        (input_ids, labels) of equal length; labels are the ids where trained on, else `IGNORE`.

    Raises:
        InputError: as `render`; also an open turn, an `<image>` in an answer, a template without
            a training form here (LLaVA v0 styles), or a `plain` sample that is not one caption.
    """
    _check_trainable(template, turns)
    text, spans = "", []
    for i, (question, answer) in enumerate(turns):
        text += _before_answer(template, question, first=i == 0)
        start = len(encoded(tokenizer, text, image_token))
        text += f"{template.space}{answer}{template.trained_tail}"
        ids = encoded(tokenizer, text, image_token)
        spans.append((start, len(ids)))

    targets = [IGNORE] * len(ids)
    adds_bos = tokenizer.bos_token_id in tokenizer("").input_ids
    if not image_token and len(turns) > 1 and adds_bos != template.auto_bos:
        warnings.warn(
            f"template {template.name!r} is trained with tokenizers that "
            f"{'add BOS by themselves' if template.auto_bos else 'do not add BOS'}, unlike this "
            "one: conversations of several turns are masked whole (tokenization mismatch)",
            stacklevel=2,
        )
        return ids, targets
    for start, end in spans:
        targets[start:end] = ids[start:end]
    return ids, targets


def _before_answer(template: Template, question: str, *, first: bool) -> str:
    """The training text from the end of the last answer to the start of this one."""
    if template.tail is None:  # captions: the picture is the whole question
        return IMAGE_TOKEN
    if IMAGE_TOKEN in question:
        question = f"{IMAGE_TOKEN}\n{question.replace(IMAGE_TOKEN, '').strip()}".strip()
        question = question.replace(IMAGE_TOKEN, template.image)
    return (template.head if first else template.again) + question + template.middle


def _check_trainable(template: Template, turns: Sequence[Turn]) -> None:
    check_turns(turns, trained=True)
    if template.trained_tail is None:
        raise InputError(
            f"template {template.name!r}",
            found="a template that is for prompting only",
            expected="one with a training form",
            fix="use vicuna_v1",
        )
    for i, (_, answer) in enumerate(turns):
        if answer is None or IMAGE_TOKEN in answer:
            raise InputError(
                f"turns[{i}]",
                found="an open turn" if answer is None else f"{IMAGE_TOKEN} in the answer",
                expected="an answer in words",
                fix="correct or drop the sample",
            )
    if template.tail is None and (len(turns) != 1 or IMAGE_TOKEN not in turns[0][0]):
        raise InputError(
            f"template {template.name!r}",
            found=f"{counted(len(turns), 'turn')}, first question {turns[0][0][:40]!r}",
            expected=f"one turn with {IMAGE_TOKEN}",
            fix="use a conversation template",
        )
