"""LLaVA's questions in, LLaVA's answers out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vfjax import InputError
from vfjax.eval import Data, check_pictures, digest, get_benchmark, read
from vfjax.eval.llava import write_answers


def test_questions_and_answers(tmp_path: Path) -> None:
    rows = [
        {"question_id": 5, "image": "a.jpg", "text": "What?", "category": "conv"},
        {"question_id": "x", "image": ["a.jpg", "b.jpg"], "text": "Which?"},
        {"question_id": 7, "text": "Why?"},
    ]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = read(get_benchmark("llava"), Data(file, tmp_path), {})
    assert [len(q.images) for q in questions] == [1, 2, 0]
    out = tmp_path / "answers.jsonl"
    texts = {"5": "A cat.", "x": "Both.", "7": "Über"}
    write_answers(out, questions, texts, "llava-v1.5-7b")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    keys = ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert all(list(line) == keys for line in lines)
    assert [line["question_id"] for line in lines] == [5, "x", 7]
    assert lines[0]["prompt"] == "What?" and lines[0]["model_id"] == "llava-v1.5-7b"
    assert lines[2]["text"] == "Über" and lines[0]["metadata"] == {}
    assert len({line["answer_id"] for line in lines}) == 3
    before = out.read_bytes()
    write_answers(out, questions, texts, "llava-v1.5-7b")
    assert out.read_bytes() == before
    with pytest.raises(InputError, match=r"a.jpg: found no file.*question 5"):
        check_pictures(questions)


def test_digest_is_of_what_is_asked(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    seen = set()
    for image, text in (("a.jpg", "What?"), ("b.jpg", "What?"), ("a.jpg", "Why?")):
        file.write_text(json.dumps({"question_id": 1, "image": image, "text": text}))
        seen.add(digest(read(get_benchmark("llava"), Data(file), {})))
    assert len(seen) == 3
    file.rename(tmp_path / "moved.jsonl")
    moved = read(get_benchmark("llava"), Data(tmp_path, tmp_path), {})
    assert digest(moved) in seen


def test_heavy_libraries_wait_until_they_score() -> None:
    heavy = ("sklearn", "pycocoevalcap", "lmms_eval", "openai", "torch", "huggingface_hub")
    code = (
        "import sys, vfjax; assert 'vfjax.eval' not in sys.modules; import vfjax.eval;"
        f"assert not set({heavy!r}) & set(sys.modules), set({heavy!r}) & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
