"""Signals at random moments of tasks on the shipped family; see test_signalled.py.

`python -m tests.signalled` sends each of them to each task, several times, and counts.
"""

import argparse
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

import converters
from converters.export import to_bytes

ROOT = Path(__file__).resolve().parents[1]
FAMILY = ROOT / "experiments" / "family" / "models"
MOST = 10.0
"""Seconds for a task to end."""


@dataclasses.dataclass
class Task:
    """A command, and what must be true of its folder after it has been ended.

    Attributes:
        flags: of `experiments/run.py`, with {out} for its folder.
        seconds: that it takes about, among which the moment is drawn.
        check: raises AssertionError for what a later command would read wrong.
    """

    flags: list[str]
    seconds: float
    check: Callable[[Path], None]


def loads(out: Path) -> None:
    """Every folder below that has a model's name is whole, and nothing else looks like one."""
    for config in out.rglob("config.json"):
        folder = config.parent
        if folder.name == "states" or any(part.startswith(".") for part in folder.parts):
            continue
        source = converters.open_source(folder)
        for tensors in source.parts.values():
            for tensor in tensors.values():
                np.asarray(tensor[...])


def answers(out: Path) -> None:
    """Lines of answers are whole but for the last."""
    for file in out.glob("predictions*"):
        for line in file.read_text().split("\n")[:-1]:
            json.loads(line)


def tasks(root: Path) -> dict[str, Task]:
    """All tasks on the shipped family; what they read is made in `root`."""
    pictures = np.random.default_rng(0).integers(0, 256, (8, 30, 40, 3), np.uint8)
    rows, questions = [], []
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(root / f"{i}.png")
        turns = [("human", f"<image>\nwhat is {i}?"), ("gpt", "a " * (i + 1))]
        turns = [{"from": name, "value": value} for name, value in turns]
        rows.append({"id": str(i), "image": f"{i}.png", "conversations": turns})
        asked = {"question_id": i, "image": f"{i}.png", "text": "what is it?"}
        questions.append(json.dumps({**asked, "label": "yes"}))
    (root / "rows.json").write_bytes(to_bytes(rows))
    (root / "coco_pope_random.json").write_text("\n".join(questions))
    model, picture = f"--config.model={FAMILY / 'clip'}", f"--config.image={root / '0.png'}"
    members = f"--config.members={(str(FAMILY / 'clip'), str(FAMILY / 'dino'))}"
    align = f"--config.stages.align.data={(f'{root}/rows.json={root}',)}"
    fuse = ["fuse", members, f"--config.base={FAMILY / 'base'}", "--config.output={out}/fused"]
    train = ["train", model, align, f"{align.replace('align', 'tune')}", "--config.report=False"]
    for stage in ("align", "tune"):
        for key, value in (("batch", 4), ("steps", 40), ("length", 64), ("template", "plain")):
            train.append(f"--config.stages.{stage}.{key}={value}")
    train.append("--config.save_every=5")
    data = ["--config.data={root}".replace("{root}", str(root)), "--config.max_new_tokens=4"]
    evaluate = ["evaluate:pope", model, *data, f"--config.images={root}", "--config.batch=2"]
    return {
        "fuse": Task(fuse, 14, loads),
        "fuse, resumed": Task([*fuse, "--config.resume=True"], 14, loads),
        "train": Task(train, 40, loads),
        "evaluate": Task(evaluate, 16, answers),
        "generate": Task(["generate", model, picture, "--config.prompt=what is it?"], 14, loads),
        "serve": Task(["serve", model, "--config.port=0", "--config.warm_up=True"], 16, loads),
        "analyze": Task(["analyze", model, f"--config.data={root}"], 20, loads),
    }


def started(task: Task, out: Path) -> subprocess.Popen[str]:
    name, *flags = (flag.replace("{out}", str(out)) for flag in task.flags)
    task_name, colon, rest = name.partition(":")
    config = f"--config={ROOT}/experiments/configs/{task_name}.py{colon}{rest}"
    command = [sys.executable, str(ROOT / "experiments" / "run.py"), config, *flags]
    return subprocess.Popen(
        [*command, f"--workdir={out}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
    )


def strike(task: Task, out: Path, number: int, moment: float) -> tuple[str, float]:
    """Sends a signal at a moment: how the task ended, and how many seconds after it.

    Raises:
        AssertionError: it does not end in time, or without its line, or leaves what it does not
            name, or what would be read wrong.
    """
    out.mkdir(exist_ok=True)
    with started(task, out) as process:
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
        sent = time.monotonic()
        try:
            said = process.communicate(timeout=60)[1]
        finally:
            process.kill()
        took, code = time.monotonic() - sent, process.returncode
    task.check(out)
    if number == signal.SIGKILL:
        return ("killed" if code == -number else "done"), took
    assert took < MOST, f"it took {took:.1f} s: {said}"
    if code == 0:
        return "done, or saved", took
    what = "interrupted" if number == signal.SIGINT else f"ended by {signal.strsignal(number)}"
    early = code == -number  # before Python runs any line of it
    assert early or (code == 128 + number and what in said.split("\n")), f"{code}: {said}"
    assert "Traceback" not in said, said
    for path in out.rglob(".*.part"):
        assert re.search(re.escape(str(path)), said), f"{path} is left unnamed: {said}"
    return ("ended before its first line" if early else "ended"), took


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tasks", nargs="*")
    parser.add_argument("--signals", nargs="*", default=["SIGTERM", "SIGINT", "SIGHUP"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--slow", type=float, default=1.0, help="how much slower the machine is")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw, failed = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name, task in tasks(root).items():
            for word in args.signals if not args.tasks or name in args.tasks else ():
                ends, longest = Counter[str](), 0.0
                for i in range(args.runs):
                    moment = draw.uniform(0, task.seconds * args.slow)
                    out = root / f"{name.replace(', ', '-')}-{word}-{i if i % 3 == 0 else i // 3}"
                    try:
                        end, took = strike(task, out, getattr(signal, word), moment)
                    except Exception as error:
                        failed += 1
                        print(f"{name}, {word} after {moment:.2f} s: {error}", flush=True)
                        continue
                    ends[end] += 1
                    longest = max(longest, took)
                print(f"{name}, {word}: {dict(ends)}, {longest:.1f} s at most", flush=True)
    print(f"{failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
