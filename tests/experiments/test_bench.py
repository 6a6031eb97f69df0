"""Benchmarks run and write well-formed rows; what they measure is not judged here."""

import argparse
import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from experiments.bench import basic, costs, gpu, merge
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


def test_gpu_runs_without_one(tmp_path: Path) -> None:
    """In the order of its lines; none is begun after the time."""
    out = tmp_path / "gpu.json"
    gpu.main(argparse.Namespace(quick=True, seconds=-1.0, out=out, only=gpu.LINES))
    assert json.loads(out.read_text())["notes"]["not begun"][0] == "pair"
    gpu.main(argparse.Namespace(quick=True, seconds=1e9, out=out, only=("first member", "merges")))
    found = json.loads(out.read_text())
    assert [(row["name"].split()[-1], row["peer_name"]) for row in found["rows"]] == [
        *itertools.product(("encode", "prefill", "token"), ("roofline", "transformers")),
        *(("B", "roofline") for _ in gpu.METHODS),
    ]
    rows = found["rows"]
    assert all(math.isfinite(row[key]) for row in rows for key in ("ours", "peer", "ratio"))


def test_costs_are_drawn_without_a_plan(tmp_path: Path, capsys, monkeypatch) -> None:
    """Where there is no TPU compiler; each point is measured once."""
    points = {"members": {1: costs.Point(), 2: costs.Point(members=2)}, "rows": {1: costs.Point()}}
    monkeypatch.setattr(costs, "curves", lambda rows, most: points)

    def no_compiler(*args: object) -> None:
        raise InputError("config.topology", found="none", expected="its compiler", fix="install")

    monkeypatch.setattr(costs.plan, "make_mesh", no_compiler)
    out = tmp_path / "costs.json"
    costs.main(argparse.Namespace(quick=True, out=out))
    record = json.loads(out.read_text())
    assert "planned" not in record and "nothing is planned" in capsys.readouterr().out
    measured = record["measured"]
    assert measured["rows"]["1"] == measured["members"]["1"]
    assert measured["members"]["2"]["GiB"] > measured["members"]["1"]["GiB"]
    assert (tmp_path / "costs.png").stat().st_size > 1000


def test_merge_writes_rows_and_removes_its_models(tmp_path: Path, capsys, monkeypatch) -> None:
    """One method beside a copy; the peer is another program, and the other methods take its way."""
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "results" / "merge.json"
    merge.main(merge.arguments(["--quick", "--methods=linear", f"--out={out}"]))
    record, table = json.loads(out.read_text()), capsys.readouterr().out
    row, counted = record["rows"]
    assert counted["name"] == "linear, counted: wall beside a copy"
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
