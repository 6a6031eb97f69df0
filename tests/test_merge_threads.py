"""No merge waits for itself, whatever the threads do."""

import os
import subprocess
import sys
from pathlib import Path

from tests.merge_threads import recipes

ROOT = Path(__file__).resolve().parents[1]


def test_merges_by_threads_end():
    """One that ranks a model as one, and merges of merges; `tests.merge_threads` runs them all."""
    joint = {name for name, params, _ in recipes() if params.get("trim") == "model"}
    assert joint == {"ties", "breadcrumbs", "breadcrumbs_ties"}
    command = [sys.executable, "-m", "tests.merge_threads", "--methods", "ties", "nested"]
    done = subprocess.run(
        [*command, "--threads", "8", "--runs", "3", "--seconds", "120"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "12 merges\n"
