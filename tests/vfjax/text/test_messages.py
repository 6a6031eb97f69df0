"""Conversations as token ids."""

from types import SimpleNamespace

import pytest

from vfjax import InputError, Processor
from vfjax.text.messages import Message, tokenize
from vfjax.text.prompts import IMAGE_ID


class Letters:
    """One id a letter (its code point), BOS first."""

    bos_token_id = 1

    def __call__(self, text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[1, *map(ord, text)])


PROCESSOR = Processor(SimpleNamespace(), Letters(), "mistral_instruct")
A, B = object(), object()


def user(*parts) -> Message:
    return Message("user", parts)


def assistant(*parts) -> Message:
    return Message("assistant", parts)


def system(*parts) -> Message:
    return Message("system", parts)


def said(*messages: Message) -> tuple[str, list]:
    """The prompt with `@` at each picture, and the pictures."""
    ids, pictures = tokenize(PROCESSOR, messages)
    assert ids[0] == 1
    return "".join("@" if i == IMAGE_ID else chr(i) for i in ids[1:]), pictures


@pytest.mark.parametrize(
    ("messages", "text", "pictures"),
    [
        ([user("why ?")], "[INST] why ? [/INST]", []),
        ([user(A, "why ?")], "[INST] @\nwhy ? [/INST]", [A]),
        ([user("why ?", A, B)], "[INST] @\n@\nwhy ? [/INST]", [A, B]),
        ([user("a", A, "b", B)], "[INST] a\n@\nb\n@ [/INST]", [A, B]),
        ([user(A), user("a")], "[INST] @\na [/INST]", [A]),
        ([user("<image> ?")], "[INST] <image> ? [/INST]", []),
        ([user(A, "<image> ?")], "[INST] @\n<image> ? [/INST]", [A]),
        ([system("s"), system("t"), user("a")], "[INST] s\nt\n\na [/INST]", []),
        ([system(""), user("a")], "[INST] a [/INST]", []),
        ([user("")], "[INST]  [/INST]", []),
        ([user("", A)], "[INST] @\n [/INST]", [A]),
        ([user("a"), assistant(""), user("b")], "[INST] a [/INST]  </s>[INST] b [/INST]", []),
        (
            [user("a", A), assistant("<image>"), user(B, "b")],
            "[INST] @\na [/INST] <image> </s>[INST] @\nb [/INST]",
            [A, B],
        ),
    ],
)
def test_prompts(messages: list[Message], text: str, pictures: list):
    assert said(*messages) == (text, pictures)


def test_one_question_is_what_chat_makes():
    prompt = PROCESSOR.chat("why ?", images=2).replace("<image>", "@")
    assert said(user(A, B, "why ?"))[0] == prompt


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "no question at the end"),
        ([system("a")], r"messages\[0\]: found no question"),
        ([assistant("a"), user("a")], r"messages\[0\]: found a message of 'assistant'"),
        ([user("a"), assistant("b")], r"messages\[1\]: found no question"),
        ([user("a"), assistant("b"), assistant("c"), user("d")], r"messages\[1\]"),
        ([user("a"), system("b"), user("c")], r"messages\[1\]: found a message of 'system'"),
        ([user("a"), assistant(A), user("b")], r"messages\[1\]: found a picture in a message of"),
        ([system(A), user("b")], r"messages\[0\]: found a picture in a message of 'system'"),
    ],
)
def test_what_is_wrong(messages: list[Message], words: str):
    with pytest.raises(InputError, match=words):
        tokenize(PROCESSOR, messages)
