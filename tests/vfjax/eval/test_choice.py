"""MMVP's pairs, MMBench's circles, letters of options."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vfjax import InputError
from vfjax.eval import Data, Question, get_benchmark, read
from vfjax.eval.choice import choose, scienceqa_letter, score_mmvp
from vfjax.eval.data import first

OPTIONS = {"A": "Open", "B": "Closed", "C": "Half open"}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A", "A"),
        ("(a)", "A"),
        ("(b) Closed", "B"),
        ("B.", "B"),
        ("c) half open", "C"),
        ("The answer is (B).", "B"),
        ("The correct answer is: C", "C"),
        ("closed.", "B"),
        ("It is closed", "B"),
        ("Half open", "C"),
        ("It is half open", ""),  # holds two options' words
        ("A cat", ""),
        ("The correct option is B", "B"),
        ("Answer: (B)", "B"),
        ("**B**", "B"),
        ("The answer is:\nB", "B"),
        ("The answer is B because the door is.", "B"),
        ("Option A is right.", "A"),
        ("A half open one", ""),
        ("A dog, so B", "B"),
        ("B or C", ""),
        ("D", ""),
        ("", ""),
        ("disclosed", ""),
    ],
)
def test_choose(text: str, letter: str) -> None:
    assert choose(text, OPTIONS) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [("A", "A"), ("B. one", "B"), ("So. The answer is C.", "C"), ("(A)", ""), ("Either", "")],
)
def test_scienceqa_letter(text: str, letter: str) -> None:
    assert scienceqa_letter(text) == letter


def test_mmvp_of_the_whole_benchmark(shared: Path) -> None:
    mmvp = get_benchmark("mmvp")
    data = Data(shared / "data/mmvp")
    questions, original = (read(mmvp, data, {"original_labels": o}) for o in (False, True))
    assert len(questions) == 300 and len({q.cluster for q in questions}) == 150
    changed = [a.id for a, b in zip(questions, original, strict=True) if a.answers != b.answers]
    assert changed == ["99", "100", "279", "280"]
    assert [questions[i - 1].answers[0] for i in (99, 100, 279, 280)] == ["B", "A", "B", "A"]
    assert all(q.images[0].is_file() for q in questions)
    assert questions[0].prompt == (
        "Are the butterfly's wings closer to being open or closed? (a) Open (b) Closed\n"
        "Answer with the option's letter from the given choices directly."
    )
    same = score_mmvp(questions, ["(a)"] * 300, {})
    assert (same["accuracy"].value, same["pair accuracy"].value) == (50, 0)
    right = score_mmvp(questions, [f"{q.answers[0]}." for q in questions], {})
    assert (right["accuracy"].value, right["pair accuracy"].value) == (100, 100)
    texts = [q.answers[0] for q in questions]
    texts[0] = texts[5] = "neither"
    two = score_mmvp(questions, texts, {})
    assert two["accuracy"].value == pytest.approx(100 * 298 / 300)
    assert two["pair accuracy"].value == pytest.approx(100 * 148 / 150)


def test_mmvp_equals_lmms_eval_on_random_answers(shared: Path) -> None:
    mmvp = pytest.importorskip("lmms_eval.tasks.mmvp.utils")
    data = Data(shared / "data/mmvp")
    questions = read(get_benchmark("mmvp"), data, {"original_labels": False})
    rng = np.random.default_rng(0)
    texts = [str(rng.choice(["A", "(b)", "b.", "The answer is A", "C"])) for _ in questions]
    docs = [{"Index": int(q.id), "answer": q.answers[0]} for q in questions]
    rows = [
        mmvp.mmvp_process_results(doc, [text])["mmvp_accuracy"]
        for doc, text in zip(docs, texts, strict=True)
    ]
    found = score_mmvp(questions, texts, {})
    assert found["accuracy"].value == pytest.approx(100 * mmvp.mmvp_aggregate_results(rows))
    pairs = mmvp.mmvp_aggregate_pair_results(rows)
    assert found["pair accuracy"].value == pytest.approx(100 * pairs) and 0 < pairs < 1


def test_mmvp_as_published(tmp_path: Path) -> None:
    (tmp_path / "MMVP Images").mkdir()
    (tmp_path / "Questions.csv").write_text(
        'Index,Question,Options,Correct Answer\n1,"Is it, then?",(a) Yes (b) No,(b)\n'
    )
    data = Data(tmp_path)
    (question,) = read(get_benchmark("mmvp"), data, {"original_labels": False})
    assert question.images == (tmp_path / "MMVP Images" / "1.jpg",)
    assert question.answers == ("B",)
    assert question.extra["options"] == {"A": "Yes", "B": "No"}


def picture() -> str:
    out = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def mmbench(path: Path) -> Path:
    """Two questions, the first in two rotations."""
    rows = [
        ("7", "What?", "", "red", "blue", "A", "colour", picture()),
        ("1000007", "What?", "", "blue", "red", "B", "colour", "7"),
        ("8", "Where?", "Look.", "left", "right", "B", "place", picture()),
    ]
    head = "index\tquestion\thint\tA\tB\tanswer\tcategory\timage"
    path.write_text("\n".join([head, *("\t".join(row) for row in rows)]) + "\n")
    return path


def test_mmbench_counts_a_question_only_if_all_its_rotations_are_right(tmp_path: Path) -> None:
    bench = get_benchmark("mmbench")
    questions = read(bench, Data(mmbench(tmp_path / "dev.tsv")), {"chinese": False})
    assert [q.cluster for q in questions] == ["7", "7", "8"]
    assert questions[0].images == questions[1].images
    assert questions[2].prompt == (
        "Look.\nWhere?\nA. left\nB. right\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert bench.score is not None
    always_a = bench.score(questions, ["A", "A", "B"], {})
    assert always_a["circular accuracy"].value == 50  # only the second
    assert always_a["accuracy of rows"].value == pytest.approx(200 / 3)
    assert always_a["circular accuracy, colour"].value == 0
    right = bench.score(questions, ["A", "red", "(B) right"], {})
    assert right["circular accuracy"].value == 100


def test_mmbench_without_labels_or_pictures(tmp_path: Path) -> None:
    bench, path = get_benchmark("mmbench"), tmp_path / "test.tsv"
    path.write_text(f"index\tquestion\tA\tB\timage\n1\tWhat?\tred\tblue\t{picture()}\n")
    questions = read(bench, Data(path), {"chinese": True})
    assert questions[0].prompt.endswith("请直接回答选项字母。")
    assert bench.score is not None
    with pytest.raises(InputError, match="question 1: found no published answers"):
        bench.score(questions, ["A"], {})
    path.write_text("index\tquestion\tA\tB\timage\n1\tWhat?\tred\tblue\t\n")
    with pytest.raises(InputError, match="row 1: found no picture"):
        read(bench, Data(path), {"chinese": False})


def test_scienceqa(tmp_path: Path) -> None:
    rows = {
        "1": {"question": "Which?", "choices": ["x", "y"], "answer": 1, "split": "test"}
        | {"image": "image.png", "hint": "Look."},
        "2": {"question": "What?", "choices": ["x", "y"], "answer": 0, "split": "test"}
        | {"image": None, "hint": ""},
        "3": {"question": "Who?", "choices": ["x"], "answer": 0, "split": "train"},
    }
    (tmp_path / "problems.json").write_text(json.dumps(rows))
    bench = get_benchmark("scienceqa")
    questions = read(bench, Data(tmp_path), bench.options)
    assert [q.id for q in questions] == ["1", "2"]
    assert questions[0].images == (tmp_path / "test/1/image.png",) and not questions[1].images
    assert questions[0].prompt.startswith("Context: Look.\nWhich?\nA. x\nB. y\nAnswer with")
    assert bench.score is not None
    found = bench.score(questions, ["B. y", "(A)"], {})
    assert found["accuracy"].value == 50 and found["accuracy, with picture"].value == 100


def test_seed(tmp_path: Path) -> None:
    row = {"question": "Which?", "answer": "C", "data_id": "x", "question_type_id": 2}
    row |= {f"choice_{letter}": letter * 3 for letter in "abcd"}
    whole = {
        "questions": [
            row | {"question_id": "0", "data_type": "image"},
            row | {"question_id": "1", "data_type": "video"},
            row | {"question_id": "2", "data_type": "image", "question_type_id": 3},
        ],
        "question_type": {"Counting": 2, "Text": 3},
    }
    (tmp_path / "SEED-Bench.json").write_text(json.dumps(whole))
    bench = get_benchmark("seed")
    questions = read(bench, Data(tmp_path), {})
    assert [q.id for q in questions] == ["0", "2"] and bench.score is not None
    found = bench.score(questions, ["C", "A"], {})
    values = {name: metric.value for name, metric in found.items()}
    kinds = {"accuracy, Counting": 100, "accuracy, Text": 0}
    assert values == {"accuracy": 50, "option read": 100, **kinds}


def test_what_is_wrong_with_the_files(tmp_path: Path) -> None:
    bench = get_benchmark("mmvp")
    with pytest.raises(InputError, match="found nothing, expected a benchmark's files"):
        Data(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no such file, expected Questions.csv or questions.jsonl"):
        read(bench, Data(tmp_path), bench.options)
    row = {"index": 1, "question": "?", "options": "(a) x (b) y", "answer": "(a)"}
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(InputError, match="two questions with id 1"):
        read(bench, Data(tmp_path), bench.options)
    file.write_text("{")
    with pytest.raises(InputError, match=r"questions.jsonl line 1: found no JSON"):
        read(bench, Data(tmp_path), bench.options)
    file.write_text("")
    with pytest.raises(InputError, match="no questions"):
        read(bench, Data(tmp_path), bench.options)
    with pytest.raises(InputError, match="found 'mmpv', expected one of llava, mmvp,"):
        get_benchmark("mmpv")


def test_options_are_a_questions_own() -> None:
    question = Question("1", "?", answers=("A",), cluster="1", extra={"options": {"A": "x"}})
    assert score_mmvp([question], ["B"], {})["accuracy"].value == 0


def test_a_limit_keeps_pairs_and_rotations_whole() -> None:
    rotations = [
        Question(id=f"{i + turn * 1_000_000}", prompt="?", cluster=str(i))
        for turn in range(2)
        for i in range(4)
    ]
    found = first(rotations, 3)
    assert [q.id for q in found] == ["0", "1", "1000000", "1000001"]
    assert first(rotations, None) == first(rotations, 8) == rotations
