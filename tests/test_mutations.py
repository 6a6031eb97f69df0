"""Files with one value wrong, or that are no files: read, or refused by one line; see `mutate`."""

import os
from pathlib import Path

import pytest

from tests import mutate
from tests.test_bad_input import refused
from vfjax import atomic
from vfjax.vision.images import open_file

COUNTS = {"config": 120, "index": 60, "tokenizer": 42, "yaml": 40, "rows": 100}
"""Kind of file -> mutations tried here, a part of those of `python -m tests.mutate`."""


@pytest.mark.parametrize("kind", COUNTS)
def test_mutations(tmp_path: Path, kind: str):
    """No fault; some mutations of each kind are refused, and some are read."""
    report = mutate.Report()
    found = list(mutate.SUBJECTS[kind](tmp_path))
    for subject in found:
        mutate.run(subject, -(-COUNTS[kind] // len(found)), 7, report)
    assert not report.faults, "\n".join(report.faults)
    assert not report.taken, "\n".join(f"{name}: {each}" for name, each in report.taken)
    assert report.counts[kind, "refused"] > COUNTS[kind] / 5
    assert report.counts[kind, "read"] > 0


@pytest.mark.parametrize("kind", ["index", "rows"])
def test_what_is_no_file(tmp_path: Path, kind: str):
    """Pipes, sockets, devices, folders and broken links in the place of each file."""
    report = mutate.Report()
    mutate.replace(next(mutate.SUBJECTS[kind](tmp_path)), report)
    assert not report.faults, "\n".join(report.faults)
    assert report.counts["file", "refused"] > len(mutate.OTHERS)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "\ud800", "loop/x"])
def test_paths_that_cannot_be_looked_up(tmp_path: Path, name: str):
    (tmp_path / "loop").symlink_to("loop")
    refused(lambda: atomic.findable(tmp_path / name, "here"), "here", "expected a path")


def test_a_pipe_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.png")
    refused(lambda: open_file(tmp_path / "pipe.png"), "pipe.png", "no regular file")
