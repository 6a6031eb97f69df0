"""`kill -9` at random moments: never a folder that loads and is wrong, and resuming is exact.

VFJAX_KILLS sets how many runs are killed; the default is for every day.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import converters
from tests import checkpoints
from vfjax import InputError

KILLS = int(os.environ.get("VFJAX_KILLS", "4"))
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


SERVER = """
import os, pathlib, sys
sys.path.insert(0, {repo!r})
import jax
jax.config.update("jax_compilation_cache_dir", {cache!r})
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
import converters
from tests.converters.test_kill import options
root = pathlib.Path({root!r})
print("ready", flush=True)
for line in sys.stdin:
    resume, out = line.split()
    if pid := os.fork():  # before JAX has any thread
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    else:
        members = {{name: root / name for name in "ab"}}
        converters.fuse(members, out, resume=resume == "resume", **options(root))
        os._exit(0)
"""


def test_killed_at_random_moments(family: Path, tmp_path: Path):
    members, out = {name: family / name for name in "ab"}, tmp_path / "out"
    converters.fuse(members, tmp_path / "whole", **options(family))
    whole = contents(tmp_path / "whole")
    assert len(whole) > 10
    code = SERVER.format(repo=str(REPO), root=str(family), cache=str(tmp_path / "cache"))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    server = subprocess.Popen([sys.executable, "-c", code], **pipes)
    assert server.stdout.readline() == "ready\n"
    rng, longest, killed, finished, kept = random.Random(0), 8.0, 0, 0, 0
    while killed < KILLS:
        start = time.monotonic()
        server.stdin.write(f"{'resume' if rng.random() < 0.7 else 'anew'} {out}\n")
        server.stdin.flush()
        pid = int(server.stdout.readline())
        end = start + rng.random() * longest
        while time.monotonic() < end and not out.exists():
            time.sleep(0.005)
        if out.exists() and rng.random() < 0.5:  # else it is killed at its very end
            assert int(server.stdout.readline()) == 0
            longest = time.monotonic() - start
            finished += 1
        else:
            os.kill(pid, signal.SIGKILL)
            killed += int(server.stdout.readline()) == -signal.SIGKILL
        kept += bool(list(tmp_path.glob(".out.part/out/*.safetensors")))
        for folder in (tmp_path / ".out.part", tmp_path / ".out.part" / "out"):
            if (folder / "MERGE.md").exists() and not list(folder.glob("*.part")):
                assert contents(folder).items() <= whole.items()
            elif folder.exists() and not (folder / "config.json").exists():
                with pytest.raises(InputError):
                    converters.open_source(folder)
        if out.exists():
            assert contents(out) == whole
            shutil.rmtree(out)
    server.stdin.close()
    server.wait()
    server.stdout.close()
    converters.fuse(members, out, resume=True, **options(family))
    assert contents(out) == whole
    print(f"killed {killed}, {kept} of them with whole files, finished {finished}")
