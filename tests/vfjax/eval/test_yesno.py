"""POPE by its official rule, MME by lmms-eval."""

import json
from pathlib import Path

import numpy as np
import pytest

from vfjax import InputError
from vfjax.eval import Data, Metric, Question, get_benchmark, read
from vfjax.eval.stats import divided
from vfjax.eval.yesno import read_pope, says_no, score_mme, score_pope


def from_terms(metric: Metric) -> float:
    return sum(s * float(divided(np.sum(top), np.sum(low))) for s, top, low in metric.terms)


@pytest.mark.parametrize(
    ("text", "no"),
    [
        ("Yes.", False),
        ("yes", False),
        ("Yes, there is a dog", False),
        ("No, there is not.", True),
        ("no", True),
        ("There is not a dog in the image.", True),
        ("NO", False),  # the rule knows No and no only
        ("Nothing", False),
        ("Yes. No doubt", False),  # the first sentence counts
        ("", False),
    ],
)
def test_pope_reads_an_answer_by_the_official_rule(text: str, no: bool) -> None:
    assert says_no(text) == no


def pope(labels: str, split: str = "random") -> list[Question]:
    return [
        Question(str(i), "?", answers=({"y": "yes", "n": "no"}[c],), extra={"split": split})
        for i, c in enumerate(labels)
    ]


def test_pope_by_hand() -> None:
    texts = ["Yes.", "No", "Yes, there is", "Sure", "no dog"]  # + - + + -
    found = score_pope(pope("yynnn"), texts, {})
    assert found["accuracy, random"].value == pytest.approx(40)  # the first and the last
    assert found["precision, random"].value == pytest.approx(100 / 3)  # of three said yes, one
    assert found["recall, random"].value == pytest.approx(50)
    assert found["F1, random"].value == pytest.approx(40)  # 2 * 1 / (3 + 2)
    assert found["yes, random"].value == pytest.approx(60)
    assert not any("mean" in name for name in found)


def test_pope_of_splits_and_its_terms_equal_the_library() -> None:
    rng = np.random.default_rng(0)
    questions = [q for s in ("random", "popular") for q in pope("ynnyyn" * 20, s)]
    texts = ["Yes" if yes else "No" for yes in rng.random(len(questions)) < 0.6]
    found = score_pope(questions, texts, {})
    for name, metric in found.items():
        assert from_terms(metric) == pytest.approx(metric.value), name
    mean = (found["F1, random"].value + found["F1, popular"].value) / 2
    assert found["F1, mean of splits"].value == pytest.approx(mean)
    never = score_pope(questions, ["No"] * len(questions), {})
    assert never["F1, random"].value == never["precision, random"].value == 0


def test_pope_of_the_published_files(shared: Path) -> None:
    questions = read(get_benchmark("pope"), Data(shared / "data/pope"), {})
    assert len(questions) == 180 and len({q.id for q in questions}) == 180
    assert {q.extra["split"] for q in questions} == {"random", "popular", "adversarial"}
    assert questions[0].prompt.endswith("?\nAnswer the question using a single word or phrase.")
    found = score_pope(questions, [q.answers[0].title() + "." for q in questions], {})
    assert found["F1, mean of splits"].value == 100
    assert score_pope(questions, ["Yes"] * 180, {})["yes, popular"].value == 100


def test_pope_with_a_missing_column(tmp_path: Path) -> None:
    file = tmp_path / "coco_pope_random.json"
    file.write_text(json.dumps({"question_id": 1, "image": "a.jpg", "text": "?"}))
    with pytest.raises(InputError, match=r"random.json row 1.*expected a value in 'label'"):
        read_pope(Data(tmp_path), {})


def mme_folder(folder: Path) -> Path:
    for subtask, names in {"count": ("a", "b"), "OCR": ("c",)}.items():
        (folder / subtask).mkdir(parents=True)
        for name in names:
            (folder / subtask / f"{name}.png").write_bytes(b"")
            lines = "Is it one? Please answer yes or no.\tYes\nIs it two?\tNo\n"
            (folder / subtask / f"{name}.txt").write_text(lines)
    (folder / "code_reasoning" / "images").mkdir(parents=True)
    texts = folder / "code_reasoning" / "questions_answers_YN"
    texts.mkdir()
    (texts / "d.txt").write_text("Is it?\tYes\nIs it not?\tNo")
    return folder


def test_mme_reads_both_layouts(tmp_path: Path) -> None:
    questions = read(get_benchmark("mme"), Data(mme_folder(tmp_path)), {})
    assert [q.id for q in questions if q.cluster.startswith("count")] == [
        f"count/{x}/{n}" for x in "ab" for n in (1, 2)
    ]
    assert questions[0].prompt == "Is it one?\nAnswer the question using a single word or phrase."
    assert {q.images[0].suffix for q in questions if q.extra["subtask"] == "OCR"} == {".png"}
    assert {q.images[0].parent.name for q in questions} == {"count", "OCR", "images"}


def test_mme_of_a_damaged_file(tmp_path: Path) -> None:
    mme_folder(tmp_path)
    (tmp_path / "count" / "a.txt").write_text("Is it one?\tYes\n")
    with pytest.raises(InputError, match="a.txt line 1.*of 1 line"):
        read(get_benchmark("mme"), Data(tmp_path), {})


def test_mme_by_hand(tmp_path: Path) -> None:
    pytest.importorskip("lmms_eval")
    questions = read(get_benchmark("mme"), Data(mme_folder(tmp_path)), {})
    said = {
        "count/a/1": "Yes.",
        "count/a/2": "No, it is one",
        "count/b/1": "yes",
        "count/b/2": "Yes",
        "OCR/c/1": "Perhaps",  # other: wrong
        "OCR/c/2": "no",
        "code_reasoning/d/1": "y",
        "code_reasoning/d/2": "No",
    }
    found = score_mme(questions, [said[q.id] for q in questions], {})
    assert found["perception, count"].value == 75 + 50  # acc 3 of 4, acc+ 1 of 2
    assert found["perception, OCR"].value == 50
    assert found["cognition, code_reasoning"].value == 200
    assert found["perception"].value == 175 and found["cognition"].value == 200
    for name, metric in found.items():
        assert from_terms(metric) == pytest.approx(metric.value), name


def test_mme_terms_equal_the_library_on_random_answers() -> None:
    pytest.importorskip("lmms_eval")
    rng = np.random.default_rng(1)
    questions, texts = [], []
    for subtask in ("existence", "count", "commonsense_reasoning"):
        for picture in range(20):
            for n, label in enumerate(("Yes", "No")):
                cluster, extra = f"{subtask}/{picture}", {"subtask": subtask}
                questions.append(
                    Question(f"{cluster}/{n}", "?", answers=(label,), cluster=cluster, extra=extra)
                )
                texts.append(rng.choice(["Yes", "No", "no.", "maybe", "Y"]))
    for name, metric in score_mme(questions, texts, {}).items():
        assert from_terms(metric) == pytest.approx(metric.value), name
