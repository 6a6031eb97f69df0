"""Timing beside a peer, and the rows that every benchmark writes."""

import argparse
import dataclasses
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vfjax.atomic import replacing

Row = dict[str, Any]


@dataclasses.dataclass
class Timing:
    """Seconds of one run: of its first call, which may compile, and of those after it."""

    first: float
    rest: list[float]


def arguments(what: str) -> argparse.Namespace:
    """The command line of every benchmark: `[--quick] --out=FILE.json`."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--quick", action="store_true", help="toy sizes, to see that it runs")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    return parser.parse_args()


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    prepare: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Times all runs in turn, so that a noisy minute falls on all alike.

    Args:
        runs: name -> a call that returns when its result is there.
        repeats: timed calls of each, after a first one.
        prepare: called before each run, not timed.
    """

    def time_once(run: Callable[[], object]) -> float:
        prepare()
        gc.collect()
        start = time.perf_counter()
        result = run()
        seconds = time.perf_counter() - start
        del result  # what it holds is freed outside of the time
        return seconds

    timings = {name: Timing(time_once(run), []) for name, run in runs.items()}
    for _ in range(repeats):
        for name, run in runs.items():
            timings[name].rest.append(time_once(run))
    return timings


def row(
    name: str, ours: Sequence[float], peer: Sequence[float], peer_name: str, unit: str = "s"
) -> Row:
    """Medians of costs in `unit`; a ratio above 1 says that ours is cheaper."""
    a, b = statistics.median(ours), statistics.median(peer)
    return {
        "name": name,
        "unit": unit,
        "ours": a,
        "peer": b,
        "peer_name": peer_name,
        "ratio": b / a,
    }


def report(
    rows: Sequence[Row], notes: Mapping[str, object], packages: Sequence[str], out: Path
) -> None:
    """Prints the table and writes rows, notes, versions and machine to `out`."""
    print(f"{'':<44} {'ours':>8} {'peer':>8} {'':<9}  ratio")
    for r in rows:
        figures = f"{r['ours']:>8.3f} {r['peer']:>8.3f} {r['unit']:<9} {r['ratio']:>6.2f}"
        print(f"{r['name']:<44} {figures}  {r['peer_name']}")
    save({"rows": list(rows)}, notes, packages, out)


def save(
    found: Mapping[str, object], notes: Mapping[str, object], packages: Sequence[str], out: Path
) -> None:
    """Writes what was found, notes, versions and machine to `out`."""
    record = {
        **found,
        "notes": dict(notes),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "machine": machine(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as part:
        part.write_text(json.dumps(record, indent=2) + "\n")


def forget(folder: Path) -> None:
    """Leaves nothing of a folder's weights in the system's page cache."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def machine() -> dict[str, Any]:
    """What the figures depend on beside the versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": cores(),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def cores() -> int:
    """Cores that this process may use, which is how many threads XLA takes."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
