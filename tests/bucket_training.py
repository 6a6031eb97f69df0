"""By hand: two processes train with a bucket as --workdir, though one is killed, each in turn.

    python -m tests.bucket_training [s3] [gs]

The trained folders and the losses must have the bytes of an undisturbed run in a local folder.
"""

import os
import re
import sys
import tempfile
import time
from pathlib import Path

from converters.files import buckets
from tests import checkpoints, test_distributed
from tests.buckets import BUCKET, read, serving
from tests.test_distributed import ROOT, run_together, started, two_hosts, write_rows

TIMEOUT = 1500
"""Seconds that a run may take."""

STAGES = {"align": 2, "tune": 24}
"""Steps of each."""


def main(schemes: list[str]) -> None:
    """Runs all, and says what was seen."""
    os.environ.setdefault("XLA_FLAGS", "")
    test_distributed.TIMEOUT = TIMEOUT
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoints.llama_folder(folder / "llm", 1, num_hidden_layers=1)
        checkpoints.tower_folder(folder / "clip", "clip", 2, num_hidden_layers=2)
        write_rows(folder)
        run_together([command(folder, str(folder / "local"))] * 2, two_hosts())
        expected = {
            str(path.relative_to(folder / "local")): path.read_bytes()
            for path in (folder / "local").rglob("*")
            if path.is_file()
        }
        for scheme in schemes:
            with serving(scheme):
                train(folder, f"{scheme}://{BUCKET}/run")
                same(expected, read(f"{scheme}://{BUCKET}/run"), scheme)


def command(folder: Path, workdir: str) -> list[str]:
    """Of one process."""
    changes: dict[str, object] = {
        "llm": folder / "llm",
        "encoder": folder / "clip",
        "dtype": "float32",
        "mesh": (4, 2),
        "save_every": 2,
        "report": False,
    }
    for name, steps in STAGES.items():
        stage = {"data": (f"{folder / 'rows.json'}={folder}",), "batch": 4, "steps": steps}
        stage |= {"length": 400, "template": "vicuna_v1"}
        changes |= {f"stages.{name}.{key}": value for key, value in stage.items()}
    run = [sys.executable, str(ROOT / "experiments" / "run.py"), f"--workdir={workdir}"]
    run += [f"--config={ROOT}/experiments/configs/train.py"]
    return run + [f"--config.{key}={value}" for key, value in changes.items()]


def train(folder: Path, url: str) -> None:
    """Kills process 1, then process 0, each while a state is written or after; then ends it."""
    for lost in (1, 0):
        with started([command(folder, url)] * 2, two_hosts()) as processes:
            before, end = states(url), time.monotonic() + TIMEOUT
            while not states(url) - before:
                assert time.monotonic() < end and processes[0].poll() is None, processes[0].stderr
                time.sleep(0.02)
            processes[lost].kill()
            print(f"{url}: process {lost} killed, states begun: {sorted(states(url), key=int)}")
            processes[1 - lost].communicate(timeout=TIMEOUT)
        assert processes[1 - lost].returncode
    run_together([command(folder, url)] * 2, two_hosts())


def states(url: str) -> set[str]:
    """Steps of which something is there."""
    scheme, _, name = url.partition("://")
    found = buckets.file_system(scheme, url).find(f"{name}/tune/states")
    return {x[1] for x in (re.search(r"/states/(\d+)", path) for path in found) if x}


def same(expected: dict[str, bytes], found: dict[str, bytes], scheme: str) -> None:
    """Fails if a file of a model differs, or the losses do."""
    models = {name: data for name, data in expected.items() if "/model/" in name}
    odd = [name for name, data in models.items() if found.get(name) != data]
    assert models and not odd, odd
    for stage in STAGES:
        lines = [
            re.findall(r'"loss": [^,]+', x[f"{stage}/metrics.jsonl"].decode())
            for x in (expected, found)
        ]
        assert len(lines[0]) == STAGES[stage] and lines[0] == lines[1], stage
    print(f"{scheme}: {len(models)} files of models and the losses have the bytes of the local run")


if __name__ == "__main__":
    main(sys.argv[1:] or ["s3", "gs"])
