"""Processes that disagree end with a line each; see disagreeing.py."""

import json
import re
import sys
from pathlib import Path

import pytest

from converters import fingerprint
from tests import disagreeing
from tests.checkpoints import make_llama, upstream_llava_folder
from tests.test_distributed import PATIENT, ROOT, SMALL, run_workers, started, two_hosts

TAIL = "; start the same command, with the same files, on all hosts"

LINES = [
    r"4 rows",
    r"process 1: prompt's ids: found \S+, expected \S+, as on process 0" + TAIL,
    r'process 1: max_new_tokens: found "5", expected "4", as on process 0' + TAIL,
    r"process 1: config.json: rms_norm_eps: found 0.002, expected \S+, as on process 0" + TAIL,
    r"process 1: weights model.safetensors: found \S+, expected \S+, as on process 0" + TAIL,
    None,
    r'process 1: working folder \S+: found "another folder than process 0\'s", expected none.*',
    r'process 1: task: found "generate", expected "load", as on process 0' + TAIL,
    r"4 rows",
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("processes")
    upstream_llava_folder(
        path / "llava", llm=make_llama(0, **SMALL), weights="safetensors", vision=SMALL
    )
    return path


def test_each_disagreement(root: Path) -> None:
    """Is one line, the same on both processes, which then go on."""
    run_workers("disagreeing.py", 2, root)
    said = [json.loads((root / f"said-{i}.json").read_text()) for i in range(2)]
    absent = f"{root / 'none'}: found no folder, expected a checkpoint; check the path"
    for first, second, line in zip(*said, LINES, strict=True):
        if line is None:  # a process has its own, the other one hears of it
            assert second == absent
            assert first.startswith(f"process 1: found an end ({absent}), expected all processes")
        else:
            assert first == second and re.fullmatch(line, first), first
    assert not list(root.glob("runs*"))


def command(task: str, **config: object) -> list[str]:
    """`experiments/run.py` with a task and its config."""
    flags = [f"--config.{key}={value}" for key, value in config.items()]
    run = str(ROOT / "experiments" / "run.py")
    return [sys.executable, run, f"--config={ROOT}/experiments/configs/{task}.py", *flags]


@pytest.mark.parametrize(
    ("task", "what"), [("generate", "prompt"), ("fuse", "weights"), ("generate", "Ctrl-C last")]
)
def test_commands_that_differ(tmp_path: Path, task: str, what: str) -> None:
    """A part of what `python -m tests.disagreeing` tries."""
    (trial,) = (x for x in disagreeing.TRIALS if (x.task, x.what) == (task, what))
    seconds, line = disagreeing.attempt(trial, 2, tmp_path, 3 * disagreeing.MOST)
    print(f"{seconds:.1f} s: {line}")


def test_a_process_that_does_not_come(root: Path) -> None:
    """Is named in time."""
    env = {**two_hosts()[0], "VFJAX_INITIALIZATION_TIMEOUT": "2"}
    with started([command("generate", prompt="What?", model=root / "llava")], [env]) as (process,):
        out, said = process.communicate(timeout=PATIENT)
    line = "process 1: found no start in time, expected all processes to start; start the same "
    assert not out and said.startswith(line) and said.count("\n") == 1
    assert process.returncode


def test_a_large_file_is_sampled(tmp_path: Path) -> None:
    """At its beginning and end, and at even distances between."""
    file = tmp_path / "weights"
    file.write_bytes(bytes(40 << 20))
    plain = fingerprint.sampled(file)
    step = (40 << 20) // fingerprint.BLOCKS + fingerprint.BLOCK
    for place in (0, fingerprint.HEAD - 1, 20 << 20, (40 << 20) - 1):
        with file.open("r+b") as opened:
            opened.seek(min(place, (40 << 20) - step))
            opened.write(b"\x01" * step)
        assert fingerprint.sampled(file) != plain
        file.write_bytes(bytes(40 << 20))
    assert fingerprint.sampled(file) == plain
