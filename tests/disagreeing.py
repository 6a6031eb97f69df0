"""Processes that disagree; see test_processes.py.

`python -m tests.disagreeing` has two, then four of them disagree in each way at each task, or loses
or interrupts one of them, and prints what they say. With arguments of its own this file is one of
several processes that disagree in one thing after another, in Python.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from PIL import Image

import converters
from tests.distributed_worker import make_batch
from vfjax import InputError, generate_ids, processes
from vfjax.processes import agreeing
from vfjax.sharding import make_mesh

ROOT = Path(__file__).resolve().parents[1]
FAMILY = ROOT / "experiments" / "family" / "models"
MOST = 60.0
"""Seconds in which all processes end."""


def disagree(address: str, count: int, index: int, root: Path) -> None:
    """Writes `root`/said-INDEX.json: what each of the trials below says."""
    jax.distributed.initialize(address, count, index)
    processes.SHARING = 2
    mesh, last = make_mesh(4, 2), index == count - 1
    own = root / f"own-{index}"
    shutil.copytree(root / "llava", own)
    model, processor = converters.load(own, mesh=mesh)
    batch = make_batch(processor)
    odd = make_batch(processor)
    if last:
        tokens = np.array(odd.tokens)
        tokens[0, 1] += 1
        odd = dataclasses.replace(odd, tokens=tokens)
    said = [f"{len(generate_ids(model, batch, max_new_tokens=2))} rows"]
    trials = {
        "prompt": lambda: generate_ids(model, odd),
        "argument": lambda: generate_ids(model, batch, max_new_tokens=4 + last),
        "config": lambda: converters.load(configured(own, last), mesh=mesh),
        "weights": lambda: converters.load(changed(own, last), mesh=mesh),
        "absent": lambda: converters.load(root / "none" if last else own, mesh=mesh),
        "folder": lambda: share(root / f"runs-{index}"),
        "task": lambda: generate_ids(model, batch) if last else converters.load(own, mesh=mesh),
    }
    for trial in trials.values():
        try:
            trial()
            said.append("nothing")
        except InputError as error:
            said.append(str(error))
    said.append(f"{len(generate_ids(model, batch, max_new_tokens=2))} rows")
    (root / f"said-{index}.json").write_text(json.dumps(said))


def configured(own: Path, last: bool) -> Path:
    """The folder, with another key of config.json in the last process."""
    if last:
        config = json.loads((own / "config.json").read_text())
        (own / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 2e-3}))
    return own


def changed(own: Path, last: bool) -> Path:
    """The folder, with one byte of its weights changed in the last process, its config mended."""
    if last:
        shutil.copyfile(own.parent / "llava" / "config.json", own / "config.json")
        with (own / "model.safetensors").open("r+b") as file:
            file.seek(-8, os.SEEK_END)
            file.write(b"\x01")
    return own


def share(folder: Path) -> None:
    """A working folder that each process has by itself."""
    with agreeing("train", folder=folder):
        pass


@dataclasses.dataclass(frozen=True)
class Trial:
    """A command on several hosts, each with files of its own, of which the last differs in one way.

    Attributes:
        task: of experiments/configs.
        what: differs.
        line: a regular expression of what all say.
        change: what is done to the last one's files.
        flags: of the last one's command, behind the others.
        call: a function, as MODULE:NAME:CALLS, where a signal comes, behind so many calls.
        number: that signal.
        first: the first host is the one that differs.
    """

    task: str
    what: str
    line: str
    change: Callable[[Path], object] = lambda host: None
    flags: tuple[str, ...] = ()
    call: str = ""
    number: str = ""
    first: bool = False


def edit(file: str, **values: object) -> Callable[[Path], object]:
    """Sets keys of a JSON file."""

    def change(host: Path) -> None:
        config = json.loads((host / file).read_text())
        (host / file).write_text(json.dumps(config | values))

    return change


def flip(file: str) -> Callable[[Path], object]:
    """Changes a byte of the last tensor but one."""

    def change(host: Path) -> None:
        with (host / file).open("r+b") as opened:
            opened.seek(-8, os.SEEK_END)
            byte = opened.read(1)[0] ^ 1
            opened.seek(-8, os.SEEK_END)
            opened.write(bytes([byte]))

    return change


def turned(host: Path) -> None:
    """Another picture."""
    Image.open(host / "0.png").rotate(90, expand=True).save(host / "0.png")


def shorter(host: Path) -> None:
    """One row less."""
    rows = json.loads((host / "rows.json").read_text())
    (host / "rows.json").write_text(json.dumps(rows[:-1]))


DIFFERS = "{where}: found .+, expected .+, as on process 0; start the same command, with the same "
LOST = "process {who}: found no sign of life, expected all processes to run; see what it said"
ENDED = r"process {who}: found an end \(interrupted\), expected all processes to go on"


def differs(where: str) -> str:
    return DIFFERS.format(where=f"process {{who}}: {where}")


TRIALS = [
    Trial("generate", "config", differs("config.seed"), flags=("--config.seed=1",)),
    Trial("generate", "prompt", differs("config.prompt"), flags=("--config.prompt=where?",)),
    Trial("generate", "picture", differs("pictures"), turned),
    Trial("load", "weights", differs("weights model.safetensors"), flip("clip/model.safetensors")),
    Trial(
        *("load", "a tower's weights", differs("weights branches.*")),
        flip("clip/vision_tower/model.safetensors"),
    ),
    Trial(
        *("load", "config.json", differs("config.json: rms_norm_eps")),
        edit("clip/config.json", rms_norm_eps=1e-3),
    ),
    Trial("load", "tokenizer", differs("tokenizer.json"), edit("clip/tokenizer.json", version="2")),
    Trial(
        *("load", "no folder", "(process {who}: found an end .)?clip: found no folder.*"),
        lambda host: shutil.rmtree(host / "clip"),
    ),
    Trial("fuse", "config", differs("config.method"), flags=("--config.method=ties",)),
    Trial("fuse", "weights", differs("clip: weights.*"), flip("clip/model.safetensors")),
    Trial("fuse", "base", differs("base: weights.*"), flip("base/model.safetensors")),
    Trial(
        # the process alone sees that its member is of another base, and says so to all
        *(
            "fuse",
            "config.json",
            "(process {who}: found an end .)?dino: rms_norm_eps: found 0.001.*",
        ),
        edit("dino/config.json", rms_norm_eps=1e-3),
    ),
    Trial("fuse", "working folder", DIFFERS.format(where="process 1: working folder .*")),
    Trial(
        "train",
        "config",
        differs("config.stages.tune.steps"),
        flags=("--config.stages.tune.steps=4",),
    ),
    Trial("train", "weights", differs("weights model.safetensors"), flip("clip/model.safetensors")),
    Trial(
        *("train", "config.json", differs("config.json: rms_norm_eps")),
        edit("clip/config.json", rms_norm_eps=1e-3),
    ),
    Trial("train", "rows", differs("stages.align: rows of rows.json"), shorter),
    Trial("train", "working folder", DIFFERS.format(where="process 1: working folder .*")),
    *(
        Trial(
            task,
            f"{what} {'first' if first else 'last'}",
            line,
            call=call,
            number=number,
            first=first,
        )
        for what, number, line in (("lost", "SIGKILL", LOST), ("Ctrl-C", "SIGINT", ENDED))
        for first in (False, True)
        for task, call in (
            ("load", "converters.load:read_model:0"),
            ("generate", "vfjax.generate:first_tokens:0"),
            ("fuse", "converters.fusion:write_folder:0" if first else "vfjax.processes:together:0"),
            ("train", "vfjax.train.loop:put:2"),
        )
    ),
    Trial("start", "never comes", "process {who}: found no start in time, expected all processes"),
]

SIGNALLED = """
import importlib, os, runpy, signal, sys
sys.path.insert(0, {root!r})
module, name, calls = {call!r}.split(":")
module, left = importlib.import_module(module), [int(calls)]
kept = getattr(module, name)
def call(*args, **kwargs):
    left[0] -= 1
    if left[0] == -1:
        os.kill(os.getpid(), signal.{number})
    return kept(*args, **kwargs)
setattr(module, name, call)
sys.argv = [{run!r}, *sys.argv[1:]]
runpy.run_path({run!r}, run_name="__main__")
"""


def commands(task: str, count: int, root: Path) -> list[str]:
    """Flags of a task; paths are a host's own but for the working folder."""
    asked = ("image=0.png", "prompt=what is it?", f"mesh=(1, {count})", "max_new_tokens=4")
    stage = {"data": "('rows.json=.',)", "batch": 4, "steps": 3, "length": 64, "template": "plain"}
    values: Mapping[str, Sequence[str]] = {
        "generate": ("model=clip", *asked),
        "fuse": ("members=('clip', 'dino')", "base=base"),
        "train": (
            *("model=clip", "report=False", f"mesh=({count}, 1)", "save_every=1"),
            *(f"stages.{n}.{key}={x}" for n in ("align", "tune") for key, x in stage.items()),
        ),
    }
    name = task if task in values else "generate"
    flags = [f"--config={ROOT}/experiments/configs/{name}.py", f"--workdir={root / 'work'}"]
    return flags + [f"--config.{value}" for value in values[name]]


def hosts(root: Path, count: int) -> list[Path]:
    """Folders with the family, rows and pictures."""
    folders = [root / f"host-{i}" for i in range(count)]
    for host in folders:
        shutil.copytree(FAMILY, host)
        rows = []
        for i, picture in enumerate(
            np.random.default_rng(0).integers(0, 256, (8, 30, 40, 3), "u1")
        ):
            Image.fromarray(picture).save(host / f"{i}.png")
            turns = [("human", f"<image>\nwhat is {i}?"), ("gpt", "a " * (i + 1))]
            turns = [{"from": name, "value": value} for name, value in turns]
            rows.append({"id": str(i), "image": f"{i}.png", "conversations": turns})
        (host / "rows.json").write_text(json.dumps(rows))
    return folders


def attempt(trial: Trial, count: int, root: Path, most: float = MOST) -> tuple[float, str]:
    """Seconds until all have ended, from the start or from the loss of one; what they say.

    Raises:
        AssertionError: not in time, not a line each, or an exit code of 0.
    """
    odd = 0 if trial.first else count - 1
    run, folders = str(ROOT / "experiments" / "run.py"), hosts(root, count)
    trial.change(folders[odd])
    with socket.socket() as server:
        server.bind(("localhost", 0))
        address = f"localhost:{server.getsockname()[1]}"
    started, last = [], 0.0
    with contextlib.ExitStack() as stack:
        for i, host in enumerate(folders):
            if trial.task == "start" and i == odd:
                continue
            own = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
            own |= {"JAX_PROCESS_ID": str(i), "VFJAX_DISTRIBUTED": "1", "JAX_PLATFORMS": "cpu"}
            devices = "--xla_force_host_platform_device_count=1"
            own |= {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {devices}"}
            own |= {"PYTHONPATH": str(ROOT)}
            flags = [*commands(trial.task, count, root), *(trial.flags if i == odd else ())]
            if trial.what == "working folder":
                flags.append("--workdir=work")
            code = SIGNALLED.format(root=str(ROOT), run=run, call=trial.call, number=trial.number)
            program = ["-c", code] if trial.call and i == odd else [run]
            said = stack.enter_context((root / f"said-{i}").open("w"))
            process = subprocess.Popen(
                *([sys.executable, *program, *flags],),
                **{"stdout": subprocess.DEVNULL, "stderr": said, "cwd": host},
                env={**os.environ, **own},
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            started.append((i, process))
        begun, ends = time.monotonic(), dict[int, float]()
        while len(ends) < len(started) and time.monotonic() - begun < 5 * most:
            time.sleep(0.05)
            ends |= {
                i: time.monotonic()
                for i, process in started
                if i not in ends and process.poll() is not None
            }
        since = ends.get(odd, begun) if trial.number else begun
        last = max(ends.values(), default=begun) - since
        left = [i for i, _ in started if i not in ends]
        codes = {i: process.poll() for i, process in started}
    time.sleep(0.5)  # what stands between a process and its stderr outlives it
    texts = {i: (root / f"said-{i}").read_text() for i, _ in started}
    expected = re.compile(trial.line.replace("{who}", str(odd)))
    said = {text for i, text in texts.items() if i != odd or not trial.number}
    assert not left, f"{left} still run; {texts}"
    assert last < most, f"it took {last:.0f} s; {texts}"
    assert all(codes.values()), f"exit codes {codes}; {texts}"
    for text in said:
        line, *notes = text.splitlines() or [""]
        assert expected.match(line), texts
        assert all("is left; nothing loads it" in note for note in notes), texts
    if trial.number == "SIGINT":
        assert texts[odd].splitlines()[0] == "interrupted" and codes[odd] == 130, (texts, codes)
    for path in (root / "work").rglob(".*.part"):
        assert any(str(path) in text for text in texts.values()), f"{path} is left unnamed"
    return last, min(said, default="").splitlines()[0]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--tasks", nargs="*", help="of load, generate, fuse, train, start")
    parser.add_argument("--what", default="", help="a regular expression")
    parser.add_argument("--slow", type=float, default=1.0, help="how much slower the machine is")
    args = parser.parse_args()
    failed = 0
    print("| processes | at | what | seconds | line |\n| --: | --- | --- | --: | --- |")
    for count in args.processes:
        for trial in TRIALS:
            if args.tasks and trial.task not in args.tasks or not re.search(args.what, trial.what):
                continue
            with tempfile.TemporaryDirectory() as folder:
                try:
                    seconds, line = attempt(trial, count, Path(folder).resolve(), MOST * args.slow)
                except AssertionError as error:
                    failed += 1
                    seconds, line = float("nan"), f"FAILED: {error}"
            line = line.replace(str(Path(folder).resolve()), "DIR")
            print(f"| {count} | {trial.task} | {trial.what} | {seconds:.1f} | {line} |", flush=True)
    print(f"{failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    if len(sys.argv) == 5 and not sys.argv[1].startswith("-"):
        disagree(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
    else:
        main()
