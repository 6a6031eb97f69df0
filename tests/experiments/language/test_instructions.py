"""Instructions, each with an answer that follows it and some that don't."""

import pytest

from experiments.language.instructions import ABOUT, RULES, Instruction, instructions

CASES = {
    "one word": (["Loyal.", "bark"], ["A loyal friend", ""]),
    "few words": (
        ["A friend on four legs."],
        ["", "a " * 11],
    ),
    "two sentences": (["Dogs bark. They run!"], ["Dogs bark.", "One. Two. Three.", ""]),
    "capitals": (["DOGS BARK."], ["Dogs bark.", "123", ""]),
    "small letters": (["dogs bark."], ["Dogs bark.", "?"]),
    "three items": (
        ["- a\n- b\n- c", "So:\n1. a\n2) b\n3. c", "* a\n* b\n\n* c"],
        ["a, b, c", "- a"],
    ),
    "end": (["Dogs bark. That is all.", '"Dogs. That is all."'], ["That is all. Dogs bark.", ""]),
    "start": (["Let me see: dogs bark."], ["Dogs. Let me see:", ""]),
    "keyword": (["A happy dog at a window."], ["A happy dog.", "unhappy windows"]),
    "no comma": (["Dogs bark."], ["Dogs, bark.", ""]),
    "quotation": (['"Dogs bark."', "\u201cDogs.\u201d"], ["Dogs bark.", '"', '"Dogs." he said']),
    "title": (["<<A dog>>", "Here it is: <<Dog>>"], ["A dog", "<<>>", "<A dog>"]),
    "choice": (["Yes.", "maybe"], ["Yes, I do", "no yes", ""]),
    "JSON": (
        ['{"name": "Rex"}', '```json\n{"a": 1}\n```'],
        ["[1]", '{"a": ', "", "[" * 100_000],
    ),
}


@pytest.mark.parametrize("kind", RULES)
def test_rules(kind: str) -> None:
    asked = Instruction(kind, "a dog")
    assert "a dog" in asked.prompt and "{" not in asked.prompt
    follows, breaks = CASES[kind]
    assert [text for text in follows if not asked.followed(text)] == []
    assert [text for text in breaks if asked.followed(text)] == []


def test_all_kinds_about_everything() -> None:
    prompts = [each.prompt for each in instructions()]
    assert len(prompts) == len(set(prompts)) == len(RULES) * len(ABOUT)
