"""Questions about photographs."""

import json
from pathlib import Path

from experiments.family.real import photos


def test_plain(tmp_path: Path):
    """Of each photograph the right word, once rightly and once wrongly said to be there."""
    quiz = photos.plain(tmp_path)
    assert len(quiz.pictures) == len(photos.SHOWN) and all(p.is_file() for p in quiz.pictures)
    said = [answer.strip() for _, answer in quiz.questions["what"]]
    assert said == list(photos.SHOWN.values())
    for i, word in enumerate(said):
        assert word in quiz.questions["there"][i][0] and quiz.questions["there"][i][1] == "Yes"
        assert word not in quiz.questions["absent"][i][0].split("a ", 1)[1]
        assert quiz.questions["absent"][i][1] == "No"


def test_mmvp(tmp_path: Path):
    assert photos.mmvp(tmp_path, 9) is None
    asked = (
        ("Open?", "(a) Open (b) Closed", "(b)"),
        ("Where?", "(a) the top (b) the end", "(a)"),
        ("Is it?", "(a) Yes (b) No", "(a)"),
    )
    rows = [
        {"image": f"images/{i}.jpg", "question": question, "options": options, "answer": answer}
        for i, (question, options, answer) in enumerate(asked, 1)
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    quiz = photos.mmvp(tmp_path, 9)
    assert quiz is not None
    assert [p.name for p in quiz.pictures] == ["1.jpg", "3.jpg"], "the same first word: left out"
    assert quiz.questions["mmvp"] == [("Open?", " closed"), ("Is it?", " yes")]
    assert quiz.options["mmvp"] == [(" open", " closed"), (" yes", " no")]
