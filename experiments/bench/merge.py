"""Two fine-tunes merged by vfjax and by mergekit: same files, one process a merge, from the shell.

    python experiments/bench/merge.py [--quick] [--peer=PATH/TO/mergekit-yaml] --out=FILE.json

Weights are random, shapes those of published models. mergekit is slow, so its slower methods are
run once by default. A copy of the same bytes, written past the page cache as ours are, says how
far from the disk's speed a merge is.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from converters.files.direct import BUFFER, new_file
from experiments.bench.common import Row, report, row
from experiments.bench.llamas import LLAMA3, MODELS, QUICK, SMALL, TINY, models
from vfjax import InputError

Notes = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2]

PACKAGES = ("jax", "jaxlib", "numpy", "vfjax")

COUNTED = ", counted"
"""After the name of ours with MERGE.md's counts: the default, of which mergekit has none."""

BEFORE = ", before"
"""After the name of that of another checkout."""

MIB = 1 << 20
CHUNK = 16 * MIB
PERIOD = 0.02
"""Seconds between two looks at a process's memory."""

LARGE = 70.55e9
"""Parameters of Llama-3-70B, which the times at the largest shape are extrapolated to."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A method as both programs are asked for it.

    Attributes:
        method: its name, the same in both.
        params: numbers, by names that are the same in both.
        weighted: it takes weights.
        reads_base: it reads the base.
        slow: mergekit takes a minute or more at the shape of TinyLlama.
        peer_rescale: mergekit's default for `rescale` by our name, where ours is another.
    """

    method: str
    params: dict[str, float]
    weighted: bool = True
    reads_base: bool = True
    slow: bool = False
    peer_rescale: str | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        """The folders that it reads."""
        return MODELS if self.reads_base else MODELS[1:]


CASES = {
    "linear": Case("linear", {}, reads_base=False),
    "task_arithmetic": Case("task_arithmetic", {}),
    "slerp": Case("slerp", {"t": 0.5}, weighted=False, reads_base=False),
    "dare": Case("dare_ties", {"density": 0.5}, slow=True, peer_rescale="norm"),
    "ties": Case("ties", {"density": 0.5}, slow=True),
    "breadcrumbs": Case("breadcrumbs", {"density": 0.5, "gamma": 0.01}, slow=True),
    "della": Case("della", {"density": 0.5, "epsilon": 0.15}, slow=True, peer_rescale="norm"),
}


SHAPES = {"small": SMALL, "tinyllama": TINY, "llama-3-8b": LLAMA3}


@dataclasses.dataclass(frozen=True)
class Run:
    """What a process took: seconds, seconds of CPU, and its peaks of memory in MiB."""

    wall: float
    cpu: float
    resident: float
    anonymous: float


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; that of the process by default."""
    parser = argparse.ArgumentParser(description="merges by vfjax against mergekit")
    parser.add_argument("--quick", action="store_true", help="toy sizes, to see that it runs")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--peer", type=Path, help="mergekit-yaml; without it a copy is the peer")
    parser.add_argument("--before", type=Path, help="checkout of another vfjax, run in turn")
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama")
    parser.add_argument("--methods", help=f"some of {','.join(CASES)}; default: the shape's")
    parser.add_argument("--repeats", type=int, help="timed runs of each; default: 3, quick 1")
    parser.add_argument("--peer-repeats", type=int, default=1, help="of mergekit's slow methods")
    parser.add_argument("--work", type=Path, help="folder of models and outputs; reused")
    parser.add_argument("--keep", action="store_true", help="keep the models that are made")
    args = parser.parse_args(argv)
    shape = QUICK if args.quick else SHAPES[args.shape]
    some = ["task_arithmetic", "ties"] if shape is LLAMA3 else list(CASES)
    args.methods = args.methods.split(",") if args.methods else some
    if unknown := sorted(set(args.methods) - set(CASES)):
        parser.error(f"--methods: found {unknown[0]}, expected some of {', '.join(CASES)}")
    if args.peer and shape is LLAMA3:
        parser.error("--peer: found with --shape=llama-3-8b, where vfjax alone is run; drop one")
    if args.repeats is None:
        args.repeats = 1 if args.quick else 3
    if min(args.repeats, args.peer_repeats) < 1:
        parser.error("--repeats and --peer-repeats: found less than 1, expected 1 or more")
    return args


def main(args: argparse.Namespace) -> None:
    """Measures everything, prints the table, writes the file."""
    shape = QUICK if args.quick else SHAPES[args.shape]
    notes: Notes = {
        **dataclasses.asdict(shape),
        "methods": args.methods,
        "parameters": shape.size,
        "bytes of a model": 2 * shape.size,
        "repeats": args.repeats,
        "mergekit's repeats of slow methods": args.peer_repeats,
        "load average before": os.getloadavg()[0],
        "first run": {
            "why": "in no median: vfjax takes the sources' SHA-256 in it, and keeps them; "
            "at the largest shape none is taken, but the sources are read once for NaN",
            "runs": {},
        },
        "fsync": "by ours and by the copy; mergekit leaves its output to the page cache",
        "runs": {},
        "times a copy": {},
        "seconds a billion parameters": {},
    }
    if args.peer:
        notes["mergekit"] = peer_versions(args.peer)
    else:
        notes["mergekit"] = "not run, as --peer was not given: rows compare with a copy only"
        print(f"mergekit: {notes['mergekit']}")
    rows: list[Row] = []
    with models(args.work, shape, args.keep) as folder, tempfile.TemporaryDirectory() as caches:
        # What is known of the sources is kept in a form of each checkout's own.
        args.caches = Path(caches)
        warm = len(MODELS) * 2 * shape.size < memory() / 2
        notes["sources"] = "in the page cache" if warm else "from disk, larger than half the memory"
        for name in args.methods:
            rows += bench(name, folder, args, warm, notes)
    if shape is LLAMA3:
        each = notes["seconds a billion parameters"]
        notes["70B, extrapolated seconds"] = {k: v * LARGE / 1e9 for k, v in each.items()}
    report(rows, notes, PACKAGES, args.out)


def bench(name: str, folder: Path, args: argparse.Namespace, warm: bool, notes: Notes) -> list[Row]:
    """One method: ours, mergekit and a copy in turn; rows of seconds and of memory."""
    case = CASES[name]
    ours: dict[str, Callable[[Path], Run]] = {
        f"{label}{COUNTED if account else ''}": functools.partial(
            run_ours, ROOT, args.caches / "now", case, params, folder, warm, account
        )
        for label, params in our_params(name, case).items()
        for account in (False, True)
    }
    runs = dict(ours)
    if args.before:
        runs |= {
            f"{label}{BEFORE}": functools.partial(
                run_ours,
                args.before.resolve(),
                args.caches / "before",
                case,
                params,
                folder,
                warm,
                False,
            )
            for label, params in our_params(name, case).items()
        }
    runs["copy"] = functools.partial(copy, [folder / source for source in case.sources])
    repeats = dict.fromkeys(runs, args.repeats)
    if args.peer:
        runs["mergekit"] = functools.partial(run_peer, args.peer, case, folder)
        repeats["mergekit"] = args.peer_repeats if case.slow else args.repeats

    def measure(label: str) -> Run:
        for source in case.sources if warm else ():
            read(folder / source)
        os.sync()  # what is left to be written of other work
        with tempfile.TemporaryDirectory(prefix="run-", dir=folder) as temporary:
            result = runs[label](Path(temporary) / "merged")
        who = f"ours as {label}" if label in ours else label
        print(f"{name}: {who}: {result.wall:.2f} s, of CPU {result.cpu:.2f} s", flush=True)
        return result

    first = {label: measure(label) for label in ours} if warm else {}
    for label in runs if warm else ():
        if label.endswith(BEFORE):
            measure(label)
    results: dict[str, list[Run]] = {label: [] for label in runs}
    for i in range(max(repeats.values())):
        for label in runs:
            if i < repeats[label]:
                results[label].append(measure(label))
    notes["first run"]["runs"] |= {key: dataclasses.asdict(value) for key, value in first.items()}
    notes["runs"][name] = {
        label: [dataclasses.asdict(each) for each in found] for label, found in results.items()
    }
    return [each for label in ours for each in compare(label, results, notes)]


def our_params(name: str, case: Case) -> dict[str, dict[str, Any]]:
    """Label -> our parameters: those that mean what mergekit's do, then our default if another."""
    if case.peer_rescale is None:
        return {name: case.params}
    same = {**case.params, "rescale": case.peer_rescale}
    return {name: same, f"{name}, default rescale": case.params}


def compare(label: str, results: Mapping[str, Sequence[Run]], notes: Notes) -> list[Row]:
    """Rows of one of ours; its ratios to a copy and to the size go to the notes."""
    ours = results[label]
    wall = [each.wall for each in ours]
    rows = []
    if "mergekit" in results:
        peer = results["mergekit"]
        rows = [
            row(f"{label}: wall", wall, [each.wall for each in peer], "mergekit"),
            row(
                f"{label}: anonymous memory",
                [each.anonymous for each in ours],
                [each.anonymous for each in peer],
                "mergekit",
                "MiB",
            ),
        ]
    if f"{label}{BEFORE}" in results:
        before = results[f"{label}{BEFORE}"]
        rows.append(row(f"{label}: wall", wall, [each.wall for each in before], "before"))
        cpu = [each.cpu for each in ours], [each.cpu for each in before]
        rows.append(row(f"{label}: CPU", *cpu, "before"))
    copies = [each.wall for each in results["copy"]]
    rows.append(row(f"{label}: wall beside a copy", wall, copies, "copy"))
    notes["times a copy"][label] = 1 / rows[-1]["ratio"]
    notes["seconds a billion parameters"][label] = rows[-1]["ours"] / notes["parameters"] * 1e9
    return rows


def run_ours(
    root: Path,
    cache: Path,
    case: Case,
    params: Mapping[str, Any],
    folder: Path,
    checksums: bool,
    account: bool,
    out: Path,
) -> Run:
    """The task `fuse` of a checkout."""
    experiments = root / "experiments"
    command = [
        *(sys.executable, str(experiments / "run.py")),
        f"--config={experiments / 'configs' / 'fuse.py'}",
        f"--config.members={tuple(f'{name}={folder / name}' for name in MODELS[1:])!r}",
        f"--config.method={case.method}",
        "--config.export=llm",
        f"--config.account={account}",
        f"--config.checksums={checksums}",
        f"--config.output={out}",
    ]
    if case.reads_base:
        command.append(f"--config.base={folder / MODELS[0]}")
    if case.weighted:
        command.append("--config.weights=(0.5,0.5)")
    command += [f"--config.params.{key}={value}" for key, value in params.items()]
    return run(command, PYTHONPATH=str(root), XDG_CACHE_HOME=str(cache))


def run_peer(peer: Path, case: Case, folder: Path, out: Path) -> Run:
    """mergekit; its YAML, of which JSON is a part, is written beside `out`."""
    each = {"weight": 0.5, **case.params} if case.weighted else {}
    recipe: dict[str, Any] = {
        "merge_method": case.method,
        "dtype": "bfloat16",
        "models": [{"model": str(folder / name), "parameters": each} for name in MODELS[1:]],
        "parameters": {} if case.weighted else case.params,
    }
    if case.reads_base or case.method == "slerp":  # its base is the first of the two
        recipe["base_model"] = str(folder / case.sources[0])
    path = out.with_name("recipe.yaml")
    path.write_text(json.dumps(recipe))
    options = ["--lazy-unpickle", "--no-copy-tokenizer"]  # there is none
    return run([str(peer), str(path), str(out), *options], HF_HUB_OFFLINE="1")


def run(command: Sequence[str], **environment: str) -> Run:
    """Runs a process to its end.

    Its peak resident memory is the kernel's own (VmHWM), as ru_maxrss starts at the size of the
    process that started it; that of anonymous memory is sampled.

    Raises:
        InputError: it fails.
    """
    peaks = {"VmHWM": 0.0, "RssAnon": 0.0}
    done = threading.Event()
    with tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=errors, env={**os.environ, **environment}
        )
        watcher = threading.Thread(target=watch, args=(process.pid, peaks, done))
        watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        done.set()
        watcher.join()
        process.returncode = os.waitstatus_to_exitcode(status)  # it was waited for here
        if process.returncode:
            errors.seek(0)
            text = errors.read().decode(errors="replace").strip()
            print(text, file=sys.stderr)
            last = text.splitlines()[-1] if text else "no message"
            raise InputError(
                " ".join(command),
                found=f"exit code {process.returncode}: {last}",
                expected="0",
                fix="run it by itself",
            )
    return Run(wall, usage.ru_utime + usage.ru_stime, peaks["VmHWM"], peaks["RssAnon"])


def watch(pid: int, peaks: dict[str, float], done: threading.Event) -> None:
    """Keeps the largest values in MiB of a process's memory until it ends."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended while read
        while not done.wait(PERIOD):
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                key, _, value = line.partition(":")
                if key in peaks:
                    peaks[key] = max(peaks[key], int(value.split()[0]) * 1024 / MIB)


def copy(sources: Sequence[Path], out: Path) -> Run:
    """Reads the files of all sources and writes those of the first, past the page cache.

    Its memory is given as that of its buffers.
    """
    size = sum(path.stat().st_size for path in sources[0].glob("*.safetensors"))
    start, busy = time.perf_counter(), time.process_time()
    with new_file(out, size) as write:
        for i, source in enumerate(sources):
            read(source, write if i == 0 else len)
    with out.open("rb") as file:
        os.fsync(file.fileno())  # the name and the size
    wall, cpu = time.perf_counter() - start, time.process_time() - busy
    buffers = (CHUNK + BUFFER) / MIB
    return Run(wall, cpu, buffers, buffers)


def read(folder: Path, use: Callable[[memoryview], object] = len) -> None:
    """Reads a model's weights, a chunk at a time."""
    buffer = memoryview(bytearray(CHUNK))
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                use(buffer[:count])


def memory() -> int:
    """Bytes of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peer_versions(peer: Path) -> dict[str, str]:
    """Versions of mergekit and of what it computes with.

    They are asked of the interpreter beside it, which brings its imports into the page cache too.

    Raises:
        InputError: it is not in an environment that has mergekit.
    """
    code = """if True:
        import importlib.metadata as m, json, mergekit.merge_methods
        print(json.dumps({k: m.version(k) for k in ("mergekit", "torch", "transformers")}))
    """
    python = peer.with_name("python")
    try:
        found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise InputError(
            peer,
            found=f"{error}",
            expected="mergekit-yaml in an environment's folder of programs",
            fix="install mergekit there",
        ) from error
    return json.loads(found.stdout.splitlines()[-1])


if __name__ == "__main__":
    main(arguments())
