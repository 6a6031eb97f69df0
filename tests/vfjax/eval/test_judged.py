"""Judged benchmarks: what is asked, how a reply is read, and the judge itself."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from vfjax import InputError
from vfjax.eval import Data, Judge, Question, get_benchmark, read
from vfjax.eval.judged import extracted, normalised


def scores(name: str, questions: list[Question], texts: list[str], judge: Any) -> dict[str, float]:
    bench = get_benchmark(name)
    assert bench.score is not None and bench.judged
    found = bench.score(questions, texts, {"judge": judge})
    return {key: round(metric.value, 6) for key, metric in found.items()}


def test_mmvet(tmp_path: Path) -> None:
    rows = {
        f"v1_{i}": {
            "imagename": "a.jpg",
            "question": "x?",
            "answer": "-1<AND>-5",
            "capability": kinds,
        }
        for i, kinds in enumerate((["ocr", "math"], ["ocr"], ["math"]))
    }
    (tmp_path / "mm-vet.json").write_text(json.dumps(rows))
    questions = read(get_benchmark("mmvet"), Data(tmp_path), {})
    asked: dict[str, Any] = {}

    def judge(messages: dict[str, Any]) -> dict[str, str]:
        asked.update(messages)
        return {"v1_0": "0.5", "v1_1": "1.0 (right)", "v1_2": "good"}

    found = scores("mmvet", questions, ["one", "two", "three"], judge)
    assert asked["v1_0"][0]["content"].endswith("\nx? | -1 <AND> -5 | one |")
    assert found["score"] == 50 and found["score, ocr"] == 75 and found["score, math"] == 25
    assert found["judgements read"] == pytest.approx(66.666667)


def test_wild(tmp_path: Path) -> None:
    rows = [
        {"question_id": i, "image": "1.jpg", "text": "What?", "category": kind}
        for i, kind in enumerate(("conv", "detail", "conv"))
    ]
    lines = {
        "questions.jsonl": rows,
        "context.jsonl": [{"image": "1.jpg", "caption": "A beach."}],
        "answers_gpt4.jsonl": [{"question_id": i, "text": f"theirs {i}"} for i in range(3)],
    }
    for name, each in lines.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in each))
    questions = read(get_benchmark("llava_wild"), Data(tmp_path), {})
    replies = {"0": "8 6\nGood.", "1": "10, 5", "2": "I can't say"}

    def judge(messages: dict[str, Any]) -> dict[str, str]:
        (message,) = messages["0"]
        assert message["content"].startswith("[Context]\nA beach.\n\n[Question]\nWhat?\n\n")
        assert "[Assistant 1]\ntheirs 0\n" in message["content"]
        assert "[Assistant 2]\nmine\n" in message["content"]
        return replies

    found = scores("llava_wild", questions, ["mine"] * 3, judge)
    assert found["relative score"] == pytest.approx(100 * 11 / 18, abs=1e-6)
    assert found["relative score, conv"] == 75 and found["relative score, detail"] == 50


CHOICE = {"question_type": "multi_choice", "answer_type": "text", "choices": ["red", "blue"]}
WHOLE = {"question_type": "free_form", "answer_type": "integer", "choices": None}
FLOAT = {"question_type": "free_form", "answer_type": "float", "precision": 1.0}


def test_mathvistas_answers_by_hand() -> None:
    assert extracted("red", CHOICE) == "red" and extracted("(A)", CHOICE) is None
    assert extracted("14", WHOLE) == "14" and extracted("It is 14", WHOLE) is None
    assert extracted("0.60", FLOAT) == "0.6" and extracted("", WHOLE) == ""
    assert normalised("(B) blue", CHOICE) == "blue" and normalised("A", CHOICE) == "red"
    assert normalised("reddish", CHOICE) == "red"
    assert normalised("14.0", WHOLE) == "14" and normalised("many", WHOLE) is None
    assert normalised("0.62", FLOAT) == "0.6"


def test_mathvista(tmp_path: Path) -> None:
    row = {"image": "images/1.jpg", "query": "Hint: ...", **WHOLE}
    rows = {str(i): row | {"answer": "14"} for i in range(3)}
    (tmp_path / "testmini.json").write_text(json.dumps(rows))
    questions = read(get_benchmark("mathvista"), Data(tmp_path), {})
    assert questions[0].images == (tmp_path / "1.jpg",)

    def judge(messages: dict[str, Any]) -> dict[str, str]:
        assert set(messages) == {"1", "2"}
        return {"1": "14", "2": "15"}

    found = scores("mathvista", questions, ["14", "Fourteen", "Fifteen"], judge)
    assert found["accuracy"] == pytest.approx(66.666667)


def test_videos(tmp_path: Path) -> None:
    asked = [{"video_name": f"x{i}", "question": "who", "question_id": i} for i in range(2)]
    (tmp_path / "test_q.json").write_text(json.dumps(asked))
    answers = [{"answer": "man", "question_id": i} for i in range(2)]
    (tmp_path / "test_a.json").write_text(json.dumps(answers))
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "v_x1.mkv").write_bytes(b"")
    questions = read(get_benchmark("activitynet"), Data(tmp_path), {})
    assert [q.video and q.video.name for q in questions] == ["x0", "v_x1.mkv"]
    alone = scores("activitynet", questions, ["Man.", "woman"], None)
    assert alone == {"exact match": 50}
    replies = {"0": "{'pred': 'yes', 'score': 4}", "1": '```{"pred": "no", "score": 1.5}```'}
    found = scores("activitynet", questions, ["a man", "woman"], lambda asked: replies)
    assert found["accuracy"] == 50 and found["score"] == 2.75 and found["judgements read"] == 100
    replies = {"0": "{'score': '5', 'pred': 'Yes'}", "1": "{'pred': 'yes', 'score': 45}"}
    found = scores("activitynet", questions, ["a man", "woman"], lambda asked: replies)
    assert found["accuracy"] == 50 and found["score"] == 2.5 and found["judgements read"] == 50
    (tmp_path / "test_a.json").write_text(json.dumps(answers[:1]))
    with pytest.raises(InputError, match="no answer to 1"):
        read(get_benchmark("activitynet"), Data(tmp_path), {})


def test_no_judge_is_said(tmp_path: Path) -> None:
    question = Question("1", "?", answers=("a",), extra={"kinds": ()})
    with pytest.raises(InputError, match="config.judge: found nothing"):
        scores("mmvet", [question], ["a"], None)


class Server(BaseHTTPRequestHandler):
    """An OpenAI-compatible address that repeats; after `left` replies it only fails."""

    left = 2

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        good = Server.left > 0
        Server.left -= 1
        message = {"role": "assistant", "content": asked["messages"][0]["content"].upper()}
        reply: dict[str, Any] = {"id": "1", "object": "chat.completion", "created": 0, "model": "j"}
        reply["choices"] = [{"index": 0, "finish_reason": "stop", "message": message}]
        data = json.dumps(reply if good else {"error": {"message": "closed"}}).encode()
        self.send_response(200 if good else 401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


def test_a_judge_that_fails_goes_on_where_it_was(tmp_path: Path) -> None:
    pytest.importorskip("openai")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/v1"
    asked = {name: [{"role": "user", "content": name}] for name in "abc"}
    judge = Judge(address, "j", "none", tmp_path / "judge.jsonl", clients=1)
    header = {"benchmark": "mmvet"}
    try:
        with pytest.raises(InputError, match="AuthenticationError.*goes on"):
            judge.ask(asked, header)
        Server.left = 1  # the third only
        assert judge.ask(asked, header) == {"a": "A", "b": "B", "c": "C"}
        assert judge.ask(asked, header) == {"a": "A", "b": "B", "c": "C"}
        other = {"a": [{"role": "user", "content": "another"}]}
        with pytest.raises(InputError, match="predictions of asked"):
            judge.ask(other, header)
    finally:
        server.shutdown()
        server.server_close()
