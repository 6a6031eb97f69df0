"""Metrics on disk."""

from pathlib import Path

import pytest

from vfjax.train.record import read


@pytest.mark.parametrize("end", [b"", b'{"step": 3', b"\xff\n", b"7\n", b"[" * 100_000 + b"\n"])
def test_what_a_kill_left_is_not_read(tmp_path: Path, end: bytes):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2}\n' + end)
    assert read(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}]
