"""VQA accuracy with each answer left out, by lmms-eval; GQA."""

import json
import statistics
from pathlib import Path

import numpy as np
import pytest

from vfjax import InputError
from vfjax.eval import Benchmark, Data, Question, get_benchmark, read
from vfjax.eval.yesno import SHORT


def accuracy(name: str, answers: list[str], text: str) -> float:
    bench = get_benchmark(name)
    question = Question("1", "?", answers=tuple(answers), extra={"kind": "other"})
    assert bench.score is not None
    return bench.score([question], [text], {})["accuracy"].value


@pytest.mark.parametrize("name", ["vqav2", "textvqa", "vizwiz"])
@pytest.mark.parametrize(("matches", "expected"), [(0, 0), (1, 30), (2, 60), (3, 90), (4, 100)])
def test_leave_one_out_by_hand(name: str, matches: int, expected: float) -> None:
    pytest.importorskip("lmms_eval")
    answers = ["red"] * matches + [f"thing{i}" for i in range(10 - matches)]
    assert accuracy(name, answers, "Red") == pytest.approx(expected)


@pytest.mark.parametrize("name", ["vqav2", "textvqa"])
def test_answers_are_normalised(name: str) -> None:
    pytest.importorskip("lmms_eval")
    assert accuracy(name, ["2"] * 10, "Two") == 100
    assert accuracy(name, ["the dog"] * 10, "A dog.") == 100
    assert accuracy(name, ["don't"] * 10, "dont") == 100
    assert accuracy(name, ["cat"] * 10, "dog") == 0


def test_random_cases_equal_the_formula() -> None:
    pytest.importorskip("lmms_eval")
    rng = np.random.default_rng(0)
    for _ in range(50):
        answers, text = list(map(str, rng.choice(list("xyz"), 10))), str(rng.choice(list("xyz")))
        others = [answers[:i] + answers[i + 1 :] for i in range(10)]
        formula = statistics.mean(min(1, each.count(text) / 3) for each in others)
        for name in ("vqav2", "textvqa"):
            assert accuracy(name, answers, text) == pytest.approx(100 * formula)


def test_without_lmms_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lmms_eval.tasks.textvqa.utils", None)
    with pytest.raises(InputError, match=r"no lmms-eval.*'vfjax\[lmms-eval\]'"):
        accuracy("textvqa", ["red"] * 10, "red")


def loaded(name: str, path: Path) -> tuple[Benchmark, list[Question]]:
    bench = get_benchmark(name)
    return bench, read(bench, Data(path), bench.options)


def test_vqav2_files(tmp_path: Path) -> None:
    question = {"question_id": 420, "image_id": 42, "question": "What is it?"}
    file = tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json"
    file.write_text(json.dumps({"questions": [question], "data_subtype": "val2014"}))
    bench, (asked,) = loaded("vqav2", tmp_path)
    assert asked.images[0] == tmp_path / "COCO_val2014_000000000042.jpg"
    assert asked.prompt == "What is it?" + SHORT and not asked.answers
    if asked.answers == ():
        with pytest.raises(InputError, match="no published answers|no lmms-eval"):
            assert bench.score is not None
            bench.score([asked], ["a"], {})
    label = {"question_id": 420, "answer_type": "other", "answers": [{"answer": "cat"}] * 10}
    labels = tmp_path / "v2_mscoco_val2014_annotations.json"
    labels.write_text(json.dumps({"annotations": [label]}))
    assert loaded("vqav2", tmp_path)[1][0].answers == ("cat",) * 10
    labels.write_text(json.dumps({"annotations": []}))
    assert not loaded("vqav2", tmp_path)[1][0].answers
    labels.write_text(json.dumps({"annotations": [label | {"question_id": 1}]}))
    with pytest.raises(InputError, match="annotations without question 420"):
        loaded("vqav2", tmp_path)


def test_textvqa_and_vizwiz_files(tmp_path: Path) -> None:
    row = {"question_id": 3, "image_id": "ab", "question": "what IS it?", "answers": ["x"] * 10}
    file = tmp_path / "TextVQA_0.5.1_val.json"
    file.write_text(json.dumps({"data": [row]}))
    _, (asked,) = loaded("textvqa", tmp_path)
    assert asked.prompt == "What is it?" + SHORT and asked.images[0].name == "ab.jpg"
    file.unlink()
    row = {"image": "v.jpg", "question": "what?", "answers": [{"answer": "x"}] * 10}
    (tmp_path / "val.json").write_text(json.dumps([row]))
    _, (asked,) = loaded("vizwiz", tmp_path)
    assert asked.answers == ("x",) * 10
    assert asked.prompt == (
        "What?\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT
    )


def test_gqa(tmp_path: Path) -> None:
    rows = {str(i): {"question": "?", "imageId": "n1", "answer": "Yes"} for i in range(4)}
    (tmp_path / "testdev_balanced_questions.json").write_text(json.dumps(rows))
    bench, questions = loaded("gqa", tmp_path)
    assert bench.score is not None
    found = bench.score(questions, ["yes", "Yes.", "no", "yes sir"], {})
    assert found["accuracy"].value == 50
    assert {q.cluster for q in questions} == {"n1"}
