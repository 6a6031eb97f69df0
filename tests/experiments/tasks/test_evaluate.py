"""The evaluation runner: answers, scores, kills, chunks, bad input."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import converters
from experiments.configs.evaluate import get_config
from experiments.tasks import evaluate
from experiments.tasks.common import FAMILY
from vfjax import InputError, generate, open_video
from vfjax.eval import Data, Question, get_benchmark, log, predict, read
from vfjax.eval.predict import plan, prompt_ids
from vfjax.sharding import make_mesh

ROOT = Path(__file__).resolve().parents[3]
HEADER = {"benchmark": "mmvp", "questions": "any", "model": "clip"}


def command(benchmark: str, workdir: Path, *args: str) -> list[str]:
    config = f"--config=experiments/configs/evaluate.py:{benchmark}"
    return [sys.executable, "experiments/run.py", config, f"--workdir={workdir}", *args]


def run(benchmark: str, workdir: Path, **settings) -> None:
    """The task, without a process of its own."""
    config = get_config(benchmark)
    config.update({key: str(x) if isinstance(x, Path) else x for key, x in settings.items()})
    evaluate.run(config, workdir)


@pytest.fixture(scope="module")
def mmvp(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first pairs of MMVP."""
    folder = tmp_path_factory.mktemp("mmvp")
    (folder / "images").mkdir()
    rows = (shared / "data/mmvp/questions.jsonl").read_text().splitlines()[:6]
    (folder / "questions.jsonl").write_text("\n".join(rows) + "\n")
    for row in rows:
        image = json.loads(row)["image"]
        shutil.copy(shared / "data/mmvp" / image, folder / image)
    return folder


@pytest.fixture(scope="module")
def clip():
    return converters.load(FAMILY / "clip")


def asked(data: Path) -> list:
    bench = get_benchmark("mmvp")
    return read(bench, Data(data), bench.options)


def answers(model, processor, questions: list, folder: Path, **how) -> dict[str, str]:
    predict(model, processor, questions, folder, HEADER, **({"max_new_tokens": 8} | how))
    return log.read_parts(folder, HEADER)


@pytest.fixture(scope="module")
def alone(mmvp: Path, clip, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Answers of an unbroken run, in batches of two."""
    return answers(*clip, asked(mmvp), tmp_path_factory.mktemp("alone"), batch=2)


def test_batch_and_order_change_no_answer(mmvp: Path, clip, alone, tmp_path: Path) -> None:
    questions = asked(mmvp)
    assert set(alone) == {q.id for q in questions} and len(set(alone.values())) > 2
    assert answers(*clip, questions[::-1], tmp_path, batch=4) == alone


def test_a_mesh_changes_no_answer(mmvp: Path, clip, alone, tmp_path: Path) -> None:
    model, _ = converters.load(FAMILY / "clip", mesh=make_mesh(4, 2))
    some = answers(model, clip[1], asked(mmvp)[:4], tmp_path, batch=4)
    assert some == {id: alone[id] for id in some} and len(some) == 4


def test_plan_fills_batches_with_questions_of_like_length(mmvp: Path, clip) -> None:
    questions, (_, processor) = asked(mmvp), clip
    ids = prompt_ids(processor, questions)
    batches = plan(questions, ids, processor, batch=4, max_new_tokens=8)
    assert [len(picks) for picks in batches] == [4, 2]
    assert sorted(i for picks in batches for i in picks) == list(range(6))
    lengths = [len(ids[i]) for picks in batches for i in picks]
    assert lengths == sorted(lengths)
    with pytest.raises(InputError, match=r"question 1: found \d+ tokens of text and 900 new ones"):
        plan(questions, ids, processor, batch=4, max_new_tokens=900)


def test_whatever_is_left_is_answered_as_in_an_unbroken_run(
    mmvp: Path, clip, alone, tmp_path: Path
) -> None:
    """After a kill in the middle of a batch, and in chunks."""
    questions = asked(mmvp)
    whole = answers(*clip, questions, tmp_path / "whole", batch=2)
    lines = log.part(tmp_path / "whole", 0, 1).read_bytes()
    for size in (len(lines) // 3, len(lines) // 2):
        folder = tmp_path / str(size)
        folder.mkdir()
        log.part(folder, 0, 1).write_bytes(lines[:size])
        assert answers(*clip, questions, folder, batch=2) == whole == alone
        assert log.part(folder, 0, 1).read_bytes() == lines
    for chunk in (1, 0):
        some = answers(*clip, questions, tmp_path / "chunks", batch=2, chunk=(chunk, 2))
        assert len(some) == (2 if chunk else 6)
    assert some == whole
    steps: list[int] = []
    answers(*clip, questions, tmp_path / "whole", batch=2, progress=steps.append)
    assert steps == [6]  # nothing was asked again


def test_a_killed_command_goes_on_and_prints_scores(
    mmvp: Path, alone, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = (f"--config.data={mmvp}", f"--config.model={FAMILY / 'clip'}", "--config.batch=2")
    start = command("mmvp", tmp_path, *args, "--config.max_new_tokens=8")
    part = log.part(tmp_path, 0, 1)
    with subprocess.Popen(start, cwd=ROOT, stderr=subprocess.DEVNULL) as killed:
        while killed.poll() is None and not (part.exists() and part.read_bytes().count(b"\n") > 1):
            time.sleep(0.01)
        killed.send_signal(signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "results.json").exists()
    run("mmvp", tmp_path, data=mmvp, model=FAMILY / "clip", batch=2, max_new_tokens=8)
    said = capsys.readouterr().out
    assert "clip on mmvp: 6 questions, 95 % intervals over 3 clusters" in said
    header, texts = log.read(tmp_path / log.NAME)
    assert texts == alone and header["model"] == "clip" and header["max_new_tokens"] == 8
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["metrics"]) == {"accuracy", "pair accuracy", "option read"}
    assert set(results["metrics"]["accuracy"]) == {"value", "low", "high"}
    with pytest.raises(InputError, match="predictions of max_new_tokens 8, expected 9"):
        run("mmvp", tmp_path, data=mmvp, model=FAMILY / "clip", batch=2, max_new_tokens=9)
    other = shutil.copytree(FAMILY / "clip", tmp_path / "other" / "clip")  # with the same weights
    (other / "config.json").write_text((other / "config.json").read_text().replace("{", "{ ", 1))
    with pytest.raises(InputError, match="predictions of config '"):
        run("mmvp", tmp_path, data=mmvp, model=other, batch=2, max_new_tokens=8)


def test_processes_share_the_questions(mmvp: Path, alone, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    args = (f"--config.data={mmvp}", f"--config.model={FAMILY / 'clip'}", "--config.batch=2")
    together = {"VFJAX_DISTRIBUTED": "1", "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}"}
    together |= {"JAX_NUM_PROCESSES": "2"}
    runs = [
        subprocess.Popen(
            command("mmvp", tmp_path, *args, "--config.max_new_tokens=8", "--config.limit=4"),
            cwd=ROOT,
            env=os.environ | together | {"JAX_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    out = [each.communicate() for each in runs]
    assert [each.returncode for each in runs] == [0, 0], out
    assert "clip on mmvp: 4 questions" in out[0][0] and not out[1][0]
    assert log.read(tmp_path / log.NAME)[1] == {str(i): alone[str(i)] for i in range(1, 5)}
    assert [path.name for path in log.parts(tmp_path)] == [log.NAME]


def test_a_constant_and_another_model(
    mmvp: Path, alone, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = {q.id: q.answers[0] for q in asked(mmvp)}
    run("mmvp", tmp_path / "a", data=mmvp, constant="(a)")
    header = log.read(tmp_path / "a" / log.NAME)[0] | {"model": "right"}
    (tmp_path / "b").mkdir()
    other = log.join(tmp_path / "b", header, right)
    run("mmvp", tmp_path / "a", data=mmvp, mode="score", against=other)
    assert "against right, paired:" in capsys.readouterr().out
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert results["metrics"]["accuracy"] == {"value": 50, "low": 50, "high": 50}
    assert results["metrics"]["pair accuracy"]["value"] == 0
    assert results["against"]["metrics"]["accuracy"]["difference"] == -50
    log.join(tmp_path / "b", header | {"questions": "x"}, right)
    with pytest.raises(InputError, match="predictions of other questions"):
        run("mmvp", tmp_path / "a", data=mmvp, mode="score", against=other)
    with pytest.raises(InputError, match="predictions of text '\\(a\\)', expected '\\(b\\)'"):
        run("mmvp", tmp_path / "a", data=mmvp, constant="(b)")
    log.join(tmp_path / "a", log.read(tmp_path / "a" / log.NAME)[0], {"1": "A"})
    with pytest.raises(InputError, match="no answer to 5 of 6 questions"):
        run("mmvp", tmp_path / "a", data=mmvp, mode="score")


def test_a_video_and_words_alone(shared: Path, clip, tmp_path: Path) -> None:
    video = Question("v", "who is there ?", video=shared / "data/video/sample_demo_3.mp4")
    questions = [video, Question("t", "how many digits ?")]
    texts = answers(*clip, questions, tmp_path, batch=1, max_new_tokens=2, frames=2)
    model, processor = clip
    direct = processor(
        [open_video(str(video.video), frames=2)], [processor.chat(video.prompt, images=1)]
    )
    assert texts["v"] == generate(model, processor, direct, max_new_tokens=2)[0]
    assert len(texts) == 2


def test_llava_questions(mmvp: Path, tmp_path: Path) -> None:
    rows = [{"question_id": i, "image": f"{i}.jpg", "text": "?"} for i in (1, 2)]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"data": file, "images": mmvp / "images", "constant": "yes", "chunks": 2}
    run("llava", tmp_path / "out", **settings, chunk=1)
    assert not (tmp_path / "out" / "answers.jsonl").exists()
    run("llava", tmp_path / "out", data=file, mode="score")
    lines = (tmp_path / "out" / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["yes", "yes"]


@pytest.mark.parametrize(
    ("benchmark", "settings", "words"),
    [
        ("mmpv", {}, "config.benchmark: found 'mmpv', expected one of llava"),
        ("mmvp", {"data": None}, "config.data: found nothing"),
        ("mmvp", {"data": "nowhere"}, "nowhere: found nothing, expected a benchmark's files"),
        ("mmvp", {"mode": "guess"}, "config.mode: found 'guess'"),
        ("mmvp", {"chunk": 1}, "config.chunk: found 1"),
        ("mmvp", {"limit": -1}, "config.limit: found -1"),
        ("mmvp", {"constant": "a", "model": "b"}, "config.constant: found 'a'"),
        ("mmvp", {"mode": "score"}, "found no predictions"),
        ("mmvp", {"images": "tests"}, "1.jpg: found no file, expected the picture of question 1"),
        ("mmvp", {"model": "nowhere"}, "nowhere: found no folder"),
    ],
)
def test_what_is_wrong_is_said(
    mmvp: Path, tmp_path: Path, benchmark: str, settings: dict, words: str
) -> None:
    with pytest.raises(InputError) as error:
        run(benchmark, tmp_path, **{"data": mmvp, **settings})
    assert words in str(error.value)
