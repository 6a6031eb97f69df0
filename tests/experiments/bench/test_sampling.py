"""The bench of draws."""

import json
from pathlib import Path

import pytest

from experiments.bench import sampling
from experiments.bench.common import arguments


def test_every_setting_has_both_peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "found.json"
    monkeypatch.setattr(sampling, "SETTINGS", {"plain": (sampling.ALL, 1.0), "both": (50, 0.9)})
    monkeypatch.setattr("sys.argv", ["sampling.py", "--quick", f"--out={out}"])
    sampling.main(arguments("draws"))
    rows = json.loads(out.read_text())["rows"]
    assert [row["name"] for row in rows] == [name for name in sampling.SETTINGS for _ in range(2)]
    assert all(row["ours"] > 0 and row["peer"] > 0 for row in rows)
