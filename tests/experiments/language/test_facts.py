"""Questions of fact, and what counts as an answer."""

import pytest

from experiments.language.facts import KINDS, OPTIONS, answered, facts


def test_every_fact_has_one_right_answer() -> None:
    found = facts()
    assert len(found) == len({fact.question for fact in found}) > 80
    for fact in found:
        assert len(set(fact.options)) == OPTIONS
        _, _, known = KINDS[fact.kind]
        assert any(
            fact.options[0] == answer and what in fact.start for what, answer in known.items()
        )
        assert not answered(fact, fact.question), "the question has its answer in it"


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("The capital of France is Paris.", True),
        ("paris", True),
        ("Parisian", False),
        ("Paris or Rome", False),
        ("", False),
    ],
)
def test_answered(text: str, right: bool) -> None:
    (fact,) = (fact for fact in facts() if fact.question == "What is the capital of France?")
    assert answered(fact, text) == right


def test_a_wrong_option_may_stand_in_the_question() -> None:
    (fact,) = (fact for fact in facts() if fact.question == "What is 5 + 2?")
    assert "2" in fact.options and answered(fact, "5 + 2 = 7") and not answered(fact, "5 + 2 = 9")
