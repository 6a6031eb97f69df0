"""Benchmarks run and write well-formed rows; what they measure is not judged here."""

import argparse
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from experiments.bench import basic, merge
from vfjax import InputError


def test_basic_writes_a_row_for_each_measurement(tmp_path: Path, capsys, monkeypatch) -> None:
    """Of loading, of pictures, and of one kind of prompt; the others take the same way."""
    monkeypatch.setattr(basic, "BENCHES", basic.BENCHES[:2])
    out, threads = tmp_path / "results" / "basic.json", torch.get_num_threads()
    try:
        basic.main(argparse.Namespace(quick=True, out=out))
    finally:
        torch.set_num_threads(threads)
    record = json.loads(out.read_text())
    table = capsys.readouterr().out
    assert len(record["rows"]) == 5
    for row in record["rows"]:
        assert set(row) == {"name", "unit", "ours", "peer", "peer_name", "ratio"}
        assert all(math.isfinite(row[key]) for key in ("ours", "peer", "ratio"))
        assert row["unit"] in ("s", "ms")
        assert f"\n{row['name']} " in table
    assert set(record["versions"]) == set(basic.PACKAGES)
    assert record["machine"]["cores"] > 0
    assert [path.name for path in out.parent.iterdir()] == ["basic.json"]


def test_merge_writes_rows_and_removes_its_models(tmp_path: Path, capsys, monkeypatch) -> None:
    """One method beside a copy; the peer is another program, and the other methods take its way."""
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "results" / "merge.json"
    merge.main(merge.arguments(["--quick", "--methods=linear", f"--out={out}"]))
    record, table = json.loads(out.read_text()), capsys.readouterr().out
    (row,) = record["rows"]
    assert row["name"] == "linear: wall beside a copy" and f"\n{row['name']} " in table
    assert math.isfinite(row["ours"]) and math.isfinite(row["ratio"])
    notes = record["notes"]
    assert "not run" in notes["mergekit"] and "not run" in table
    for run in (*notes["runs"]["linear"]["linear"], notes["first run"]["runs"]["linear"]):
        assert run["wall"] > 0 and run["cpu"] > 0
        assert run["resident"] >= run["anonymous"] > 1
    assert not any((tmp_path / "outputs").iterdir())


def test_merge_tells_of_another_model_in_its_folder(tmp_path: Path) -> None:
    with merge.models(tmp_path, merge.QUICK, keep=True):
        pass
    with (
        pytest.raises(InputError, match="hidden_size 64, expected 2048"),
        merge.models(tmp_path, merge.TINY, keep=True),
    ):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "base"]


def test_merge_tells_what_a_failed_run_said() -> None:
    with pytest.raises(InputError, match="exit code 3: the last line, expected 0"):
        merge.run(
            [
                sys.executable,
                "-c",
                "import sys; print('the last line', file=sys.stderr); sys.exit(3)",
            ]
        )
