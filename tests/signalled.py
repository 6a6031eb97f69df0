"""Signals at random moments of every task on the shipped family; see test_signalled.py.

`python -m tests.signalled` runs each task once to its end, for its flags, seconds and files. Then
it ends it at random moments by SIGTERM, SIGINT, SIGHUP and two SIGTERMs; fuse, train and evaluate
by SIGKILL, too, after which the same command must make the same files.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

import converters
from converters.export import to_bytes
from vfjax.atomic import MARK

ROOT = Path(__file__).resolve().parents[1]
FAMILY = ROOT / "experiments" / "family" / "models"
MOST = 10.0
"""Seconds for a task to end after a signal."""
TWICE = 3.0
"""Seconds after a second one."""
KILLS = {"fuse": 30, "fuse, resumed": 30, "train": 20, "evaluate": 5}
"""How often SIGKILL ends a task by default."""
SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "twice")


@dataclasses.dataclass(frozen=True)
class Task:
    """A command to end.

    Attributes:
        flags: of `experiments/run.py`, with {out} for its folder; or of `python -m converters`.
        made: folders that lie in {out} already, by name.
        serves: it runs until it is ended; it is asked something all the while.
        saves: it may end with code 0 before its end, and goes on from there.
        same: files, as patterns, that are equal whatever has ended it before.
    """

    flags: list[str]
    made: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    serves: bool = False
    saves: bool = False
    same: tuple[str, ...] = ()


def tasks(root: Path) -> dict[str, Task]:
    """All tasks, small; what they read is made in `root`."""
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
    half = {"weight": 0.5}
    union = {
        "merge_method": "linear",
        "models": [{"model": str(FAMILY / x), "parameters": half} for x in ("clip", "dino")],
        "tokenizer_source": "union",
        "dtype": "float32",
    }
    (root / "union.yml").write_bytes(to_bytes(union))  # JSON is YAML
    clip = FAMILY / "clip"
    model, picture = f"--config.model={clip}", f"--config.image={root / '0.png'}"
    members = f"--config.members={(str(clip), str(FAMILY / 'dino'))}"
    align = f"--config.stages.align.data={(f'{root}/rows.json={root}',)}"
    base, output = f"--config.base={FAMILY / 'base'}", "--config.output={out}/fused"
    fuse = ["fuse", members, base, output]
    recipe = ["fuse", f"--config.recipe={root / 'union.yml'}", "--config.export=llm", output]
    train = ["train", model, align, align.replace("align", "tune")]
    for stage in ("align", "tune"):
        for key, value in (("batch", 4), ("steps", 40), ("length", 64), ("template", "plain")):
            train.append(f"--config.stages.{stage}.{key}={value}")
    train += ["--config.save_every=5"]
    pope = [f"--config.data={root}", "--config.max_new_tokens=4", f"--config.images={root}"]
    evaluate = ["evaluate:pope", *pope, "--config.batch=2"]
    prompt = "--config.prompt=what is it?"
    less = ["--config.int8=True", "--config.int8_cache=True", "--config.prune.keep=(0.5,)"]
    plan = ["plan", "--config.model=llava@vicuna-7b", "--config.topology=h100:1"]
    small = [
        *("scenes.encoders=64", "scenes.train=64", "scenes.validation=8", "scenes.test=8"),
        *("encoders.clip=4", "encoders.dino=4", "align=8", "first=4", "tune=4"),
        *("members=('clip','dino')", "pairs=('clip+dino',)", "sweep=()", "seeds=(0,)"),
    ]
    family = ["family", *(f"--config.{each}" for each in small)]
    weights, answers = ("fused/*.safetensors",), ("predictions.jsonl",)
    found = {
        "fuse": Task(fuse, same=weights),
        "fuse, resumed": Task([*fuse, "--config.resume=True"], same=weights),
        "fuse, a recipe": Task(recipe, same=weights),
        "fuse, dry": Task([*fuse, "--config.dry_run=True"]),
        "train": Task(train, saves=True, same=("*/model/*.safetensors",)),
        "evaluate": Task([*evaluate, model], same=answers),
        "evaluate, fused": Task(evaluate, same=answers),
        "generate": Task(["generate", model, picture, prompt]),
        "generate, int8": Task(["generate", model, picture, prompt, *less]),
        "serve": Task(["serve", model, "--config.port=0"], serves=True),
        "serve, warm": Task(
            ["serve", model, "--config.port=0", "--config.warm_up=True"], serves=True
        ),
        "chat": Task(["chat", "--config.port=0"], serves=True),
        "analyze": Task(["analyze", model, f"--config.data={root}"]),
        "analyze, family": Task(["analyze", "--config.pictures=4", "--config.probe_scenes=40"]),
        "search": Task(["search", "--config.scenes=8", "--config.grid=(0.3,0.5)"]),
        "demo": Task(["demo", "--config.scenes=8"]),
        "ablate": Task(["ablate", "--config.scenes=8", "--config.subsets=False"]),
        "plan": Task([*plan, "--config.depths=(1,2)", "--config.model_axis=1"]),
        "family": Task(family, {"base": FAMILY / "base"}, saves=True),
        "family, base": Task(family, saves=True),
        "inspect": Task(["inspect", str(clip)]),
    }
    if find_spec("gradio") is None:
        found.pop("chat")
    return found


@contextlib.contextmanager
def started(task: Task, out: Path) -> Iterator[tuple[subprocess.Popen[str], threading.Event]]:
    """The process, in a folder and with temporary files of its own; it ends with the block.

    And what is set once it has served something.
    """
    served = threading.Event()
    for name, source in task.made.items():
        if not (out / name).exists():
            shutil.copytree(source, out / name)
    (out.parent / "tmp").mkdir(exist_ok=True)
    name, *flags = (flag.replace("{out}", str(out)) for flag in task.flags)
    command = [sys.executable, "-m", "converters", name, *flags]
    if name != "inspect":
        file, colon, rest = name.partition(":")
        config = f"--config={ROOT}/experiments/configs/{file}.py{colon}{rest}"
        run = str(ROOT / "experiments" / "run.py")
        command = [sys.executable, run, config, *flags, f"--workdir={out}"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path, "TMPDIR": str(out.parent / "tmp")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env={**os.environ, **env}, **pipes) as process:
        reader = threading.Thread(target=read, args=(task, process, served), daemon=True)
        reader.start()
        try:
            yield process, served
        finally:
            process.kill()
            reader.join(MOST)


def read(task: Task, process: subprocess.Popen[str], served: threading.Event) -> None:
    """Takes what a task prints; asks one that serves for as long as it answers."""
    assert process.stdout is not None
    for line in process.stdout:
        address = line.split()[-1] if line.split() else ""
        if not task.serves or not address.startswith("http"):
            continue
        if not address.endswith("/v1"):
            served.set()
        else:
            body = {"model": "clip", "messages": [{"role": "user", "content": "what is it ?"}]}
            body |= {"max_tokens": 400, "temperature": 2}
            header = {"Content-Type": "application/json"}
            request = urllib.request.Request(
                f"{address}/chat/completions", json.dumps(body).encode(), header
            )
            with contextlib.suppress(OSError, HTTPException):
                while process.poll() is None:
                    urllib.request.urlopen(request, timeout=60).close()
                    served.set()


def whole(task: Task, out: Path, most: float = 1e9) -> float | None:
    """Runs a task to its end, which must be a good one: the seconds; None if it takes more."""
    begun, before = time.monotonic(), set((out.parent / "tmp").glob("*"))  # of killed runs
    with started(task, out) as (process, served):
        if not task.serves:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(most)
            if process.poll() is None:
                return None
        while task.serves and process.poll() is None and not served.wait(0.2):
            pass
        if task.serves:
            process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        said = process.stderr.read()
        code = process.wait()
    early = task.serves and code == 128 + signal.SIGTERM  # it has its address, but did not serve
    assert code == 0 or early, f"{code}: {said}"
    check(out)
    left = set(leftovers(out)) - before
    assert not left, f"{left} are left after a good end"
    return time.monotonic() - begun


def strike(
    task: Task, out: Path, number: int, moment: float, *, twice: bool = False, slow: float = 1
) -> tuple[str, float]:
    """Sends a signal at a moment: how the task ended, and how many seconds after it.

    Raises:
        AssertionError: it does not end in time, or without its line, or leaves what it does not
            name, or what would be read wrong.
    """
    before = set(leftovers(out))
    with started(task, out) as (process, _):
        assert process.stderr is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moment)
        running = process.poll() is None
        process.send_signal(number)
        sent = time.monotonic()
        if twice:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.3)
            process.send_signal(number)
            sent = time.monotonic()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(6 * MOST * slow)
        late = process.poll() is None
        process.kill()
        took, code, said = time.monotonic() - sent, process.wait(), process.stderr.read()
    check(out)
    assert not late, f"it did not end: {said}"
    if not running:
        assert code == 0, f"{code}: {said}"
        return "done before", 0.0
    if number == signal.SIGKILL:
        return "killed", took
    assert took < (TWICE if twice else MOST) * slow, f"it took {took:.1f} s: {said}"
    left = [path for path in leftovers(out) if path not in before and str(path) not in said]
    assert not left, f"{left} are left unnamed: {said}"
    if code == 0 and (task.serves or task.saves):
        return "saved" if task.saves else "answered", took
    if code == 0:
        return "done meanwhile", took
    if code == -number or "init_import_site" in said:  # before its first line, or a verb
        return "ended by the system", took
    assert "Traceback" not in said, said
    what = "interrupted" if number == signal.SIGINT else f"ended by {signal.strsignal(number)}"
    assert code == 128 + number and what in said, f"{code}: {said}"
    return "ended", took


def leftovers(out: Path) -> list[Path]:
    """What has a hidden or a temporary name."""
    hidden = (path for path in out.rglob(".*") if path.name != MARK)
    made = (path for path in (out.parent / "tmp").glob("*") if path.name != "gradio")  # its cache
    return [*hidden, *made] if out.exists() else []


def check(out: Path) -> None:
    """Raises an error for what a later command would read wrong."""
    for path in out.rglob("*"):
        parts = path.relative_to(out).parts
        if path.is_dir() or "states" in parts or any(part.startswith(".") for part in parts):
            continue
        match path.suffix:
            case ".safetensors":
                load_file(path)
                assert (path.parent / "config.json").is_file(), f"{path}: no config.json"
            case ".json":
                found = json.loads(path.read_text())
                if path.name == "config.json" and "ForCausalLM" in str(found.get("architectures")):
                    for tensors in converters.open_source(path.parent).parts.values():
                        for tensor in tensors.values():
                            np.asarray(tensor[...])
            case ".jsonl":
                for line in path.read_text().split("\n")[:-1]:  # the last may be cut off
                    json.loads(line)
            case ".png":
                Image.open(path).load()
            case ".npz":
                dict(np.load(path))


def digests(task: Task, out: Path) -> dict[str, str]:
    """SHA-256 of the files that must always be the same."""
    files = (path for pattern in task.same for path in out.glob(pattern))
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(files)
    }


def series(
    name: str, task: Task, word: str, count: int, seconds: float, draw: random.Random,
    root: Path, slow: float,
) -> tuple[int, Path]:  # fmt: skip
    """Some strikes by one signal, each on what those before have left: failures, the folder."""
    number = signal.SIGTERM if word == "twice" else getattr(signal, word)
    ends, longest, failed, folders = Counter[str](), 0.0, 0, 0
    out = root / "0" / "out"
    for _ in range(count):
        out.mkdir(parents=True, exist_ok=True)
        moment = draw.uniform(0, seconds)
        try:
            end, took = strike(task, out, number, moment, twice=word == "twice", slow=slow)
        except Exception as error:
            failed += 1
            end, took = "FAILED", 0.0
            print(f"{name}, {word} after {moment:.2f} s: {error}", flush=True)
        ends[end] += 1
        longest = max(longest, took)
        if end.startswith(("done", "FAILED")) or (out / "fused").exists():
            folders += 1
            out = root / str(folders) / "out"
    load = os.getloadavg()[0]
    print(
        f"{name}, {word}: {count} sent, {dict(ends)}, {longest:.1f} s at most, load {load:.1f}",
        flush=True,
    )
    return failed, out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tasks", nargs="*")
    parser.add_argument("--signals", nargs="*", default=[*SIGNALS, "SIGKILL"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--kills", type=float, default=1.0, help="share of `KILLS`")
    parser.add_argument("--slow", type=float, default=1.0, help="how much slower the machine is")
    parser.add_argument("--most", type=float, default=120.0, help="seconds that a task is run")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # children ignore what nohup, and a shell's &,
    signal.signal(signal.SIGINT, signal.default_int_handler)  # have this process ignore
    failed = sent = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, task in tasks(Path(folder)).items():
            if args.tasks and name not in args.tasks:
                continue
            draw, root = random.Random(f"{args.seed} {name}"), Path(folder, name)
            (root / "whole" / "out").mkdir(parents=True)
            try:
                seconds = whole(task, root / "whole" / "out", args.most)
            except Exception as error:
                failed += 1
                print(f"{name}, whole: {error}", flush=True)
                continue
            took = f"more than {args.most:.0f}" if seconds is None else f"{seconds:.1f}"
            print(f"{name}: {took} s", flush=True)
            good = None if seconds is None else digests(task, root / "whole" / "out")
            seconds = args.most if seconds is None else seconds
            for word in args.signals:
                count = args.runs
                if word == "SIGKILL":
                    count = round(args.kills * KILLS.get(name, 0))
                if not count:
                    continue
                bad, out = series(name, task, word, count, seconds, draw, root / word, args.slow)
                failed, sent = failed + bad, sent + count
                if word == "SIGKILL":
                    try:
                        out.mkdir(parents=True, exist_ok=True)
                        whole(task, out)
                        assert good in (None, digests(task, out)), (
                            "other files than an unbroken run's"
                        )
                    except Exception as error:
                        failed += 1
                        print(f"{name}, after {word}: {error}", flush=True)
            shutil.rmtree(root)
    print(f"{sent} sent, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
