"""`kill -9` at random moments: never a folder that loads and is wrong, and resuming is exact.

VFJAX_KILLS sets how many runs are killed; the default is for every day.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import converters
from tests import checkpoints
from vfjax import InputError

KILLS = int(os.environ.get("VFJAX_KILLS", "6"))
REPO = Path(__file__).resolve().parents[2]
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6}


def options(root: Path) -> dict:
    return {
        "base": root / "base",
        "method": "ties",
        "params": {"weights": (0.5, 0.5), "density": 0.5},
        "export": "llm",
        "shard_bytes": 1e6,
    }


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("family")
    base = checkpoints.llama_folder(root / "base", 1, **SIZES)
    for seed, name in enumerate("ab", 2):
        checkpoints.llama_folder(root / name, llm=checkpoints.tuned(base, seed), **SIZES)
    return root


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}


def test_killed_at_random_moments(family: Path, tmp_path: Path):
    members = {name: family / name for name in "ab"}
    converters.fuse(members, tmp_path / "whole", **options(family))
    whole = contents(tmp_path / "whole")
    assert len(whole) > 10
    code = f"""
import sys, pathlib
sys.path.insert(0, {str(REPO)!r})
import converters
from tests.converters.test_kill import options
print("ready", flush=True)
root = pathlib.Path({str(family)!r})
while True:
    resume = sys.stdin.readline() == "resume\\n"
    out = pathlib.Path(sys.stdin.readline().strip())
    print("go", flush=True)
    converters.fuse({{n: root / n for n in "ab"}}, out, resume=resume, **options(root))
    print("done", flush=True)
"""
    rng = random.Random(0)
    process, seconds, killed, finished = None, 4.0, 0, 0
    out = tmp_path / "out"
    while killed < KILLS:
        if process is None:
            command = [sys.executable, "-c", code]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            process = subprocess.Popen(command, **pipes)
            assert process.stdout.readline() == "ready\n"
        resume = rng.random() < 0.7
        process.stdin.write(f"{'resume' if resume else 'anew'}\n{out}\n")
        process.stdin.flush()
        assert process.stdout.readline() == "go\n"
        start = time.monotonic()
        time.sleep(rng.random() * seconds)
        if out.exists():  # it was whole before it could be killed
            assert process.stdout.readline() == "done\n"
            seconds = min(seconds, 2 * (time.monotonic() - start))
            finished += 1
        else:
            process.send_signal(signal.SIGKILL)
            process.wait()
            process.stdin.close()
            process.stdout.close()
            process, killed = None, killed + 1
        for folder in (out, *tmp_path.glob(".out.part"), *tmp_path.glob(".out.part/out")):
            if folder != out and not (folder / "config.json").exists():
                with pytest.raises(InputError):
                    converters.open_source(folder)
            elif folder.exists() and (folder / "MERGE.md").exists():
                assert contents(folder) == whole
        if out.exists():
            for path in sorted(out.rglob("*"), reverse=True):
                path.unlink()
            out.rmdir()
    if process is not None:
        process.kill()
        process.wait()
    converters.fuse(members, out, resume=True, **options(family))
    assert contents(out) == whole
    print(f"killed {killed}, finished {finished}")
