"""Benchmarks run and write well-formed rows; what they measure is not judged here."""

import argparse
import json
import math
from pathlib import Path

import torch

from experiments.bench import basic


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
