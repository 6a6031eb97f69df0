"""A model loaded by vfjax beside a plain read of its bytes, and a second start beside the first.

    python experiments/bench/load.py [--quick] [--layers=N] [--work=DIR] --out=FILE.json

Weights are random, shapes those of Llama-3-8B, of which N layers are written. Each load is a
process of its own; nothing of the files is in the page cache before a load or a read.
"""

import argparse
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import numpy as np
from flax import nnx

import converters
from converters import open_source
from experiments.bench.common import Row, forget, report, row
from experiments.bench.llamas import LLAMA3, QUICK, Shape, llama, write_model
from experiments.bench.merge import read
from vfjax import InputError, generate_ids
from vfjax.sharding import make_mesh, nbytes

PACKAGES = ("jax", "jaxlib", "numpy", "vfjax")
MIB = 1 << 20
DEVICES = (1, 8)

START = Shape(llama(256, 704, 22, (8, 4), 32000, 1e4), 1e9)
"""What is started twice: as deep as TinyLlama, but narrow, as compiling is what is measured."""

TOKENS = 8


def main(args: argparse.Namespace) -> None:
    """Measures everything, prints the table, writes the file."""
    shape, notes = asked(args)
    args.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="load-", dir=args.work) as name:
        folder = Path(name)
        room(folder, 2 * shape.size)
        write_model(folder / "model", shape, 0)
        rows = bench_load(folder / "model", shape, args.repeats, notes)
        shutil.rmtree(folder / "model")
        write_model(folder / "start", QUICK if args.quick else START, 0)
        rows += bench_start(folder, args.repeats, notes)
    report(rows, notes, PACKAGES, args.out)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="loading beside a plain read")
    parser.add_argument("--quick", action="store_true", help="toy sizes, to see that it runs")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--layers", type=int, default=32, help="of 32, for less memory")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each")
    parser.add_argument("--work", type=Path, default=Path("outputs"), help="for the models")
    return parser.parse_args()


def asked(args: argparse.Namespace) -> tuple[Shape, dict[str, object]]:
    """The shape of the model that is loaded, and notes on the run."""
    config = {**LLAMA3.config, "num_hidden_layers": args.layers}
    shape = QUICK if args.quick else dataclasses.replace(LLAMA3, config=config)
    notes = {**dataclasses.asdict(shape), "bytes": 2 * shape.size, "repeats": args.repeats}
    notes["load average before"] = os.getloadavg()[0]
    return shape, notes


def room(folder: Path, need: int) -> None:
    """Raises InputError if the disk or the memory is too small for a model."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    for what, found in (("disk", shutil.disk_usage(folder).free), ("memory", memory)):
        if found < need:
            raise InputError(
                what,
                found=f"{found:,} bytes free",
                expected=f"{need:,}",
                fix="pass --layers with fewer of them",
            )


def bench_load(folder: Path, shape: Shape, repeats: int, notes: dict[str, object]) -> list[Row]:
    """Files to arrays, on one device and sharded over eight, and the memory that it takes."""
    loads: dict[int, list[dict[str, float]]] = {devices: [] for devices in DEVICES}
    reads: list[float] = []
    kept: list[float] = []
    for _ in range(repeats):
        forget(folder)
        begin = time.perf_counter()
        read(folder)
        reads.append(time.perf_counter() - begin)
        forget(folder)
        kept.append(float(child("keep", folder)))
        for devices, found in loads.items():
            forget(folder)
            flags = f"--xla_force_host_platform_device_count={devices}"
            found.append(json.loads(child("load", folder, XLA_FLAGS=flags)))
    notes |= {"loads": loads, "seconds of a read": reads, "seconds of one that is kept": kept}
    limit = 2 * 2 * max(map(math.prod, shape.tensors().values())) / MIB
    rows = []
    for devices, found in loads.items():
        name = f"load, {devices} device{'s' * (devices > 1)}"
        seconds = [x["seconds"] for x in found]
        rows.append(row(f"{name}: wall", seconds, reads, "read"))
        rows.append(row(f"{name}: wall", seconds, kept, "read, kept"))
        beyond = [max(x["beyond"] / MIB, 1) for x in found]
        what = f"{name}: memory beyond the arrays"
        rows.append(row(what, beyond, [limit], "2 x largest", "MiB"))
    return rows


def bench_start(folder: Path, repeats: int, notes: dict[str, object]) -> list[Row]:
    """A process from its start to the end of an answer, with an empty compilation cache and then
    with what the first left there.
    """
    first: list[float] = []
    second: list[float] = []
    for i in range(repeats):
        cache = folder / f"cache-{i}"
        for seconds in (first, second):
            begin = time.perf_counter()
            child(
                "start",
                folder / "start",
                JAX_COMPILATION_CACHE_DIR=str(cache),
                JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
            )
            seconds.append(time.perf_counter() - begin)
    notes["starts"] = {"first": first, "second": second}
    return [row("second start, to an answer", second, first, "first")]


def child(what: str, folder: Path | str, **environment: str) -> str:
    """The last line of what a process of this file prints.

    Raises:
        InputError: it fails.
    """
    command = [sys.executable, __file__, "--child", what, str(folder)]
    done = subprocess.run(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise InputError(
            " ".join(command), found=f"exit code {done.returncode}", expected="0", fix="see above"
        )
    return done.stdout.splitlines()[-1]


def load_once(folder: str) -> None:
    """Prints the seconds and CPU seconds of a load, and its peak of memory beyond the arrays."""
    print(json.dumps(loaded(folder)))


def load_again(folder: str) -> None:
    """Prints the same of a load, of what is imported and compiled before, and the next one's."""
    open_source(folder)
    first = loaded(folder)
    print(json.dumps({**first, "again": loaded(folder)["seconds"]}))


def loaded(folder: str) -> dict[str, float]:
    """Seconds and CPU seconds of a load, and its peak of memory beyond the arrays."""
    mesh = make_mesh(model=jax.device_count()) if jax.device_count() > 1 else None
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, busy, begin = status("VmRSS"), time.process_time(), time.perf_counter()
    model, _ = jax.block_until_ready(converters.load(folder, mesh=mesh))
    seconds, cpu = time.perf_counter() - begin, time.process_time() - busy
    beyond = status("VmHWM") - before - nbytes(nnx.state(model))
    return {"seconds": seconds, "cpu": cpu, "beyond": beyond}


def keep_once(folder: str) -> None:
    """Prints the seconds of a read of all bytes into memory, as far as a load can be it alone."""
    begin = time.perf_counter()
    kept = [np.fromfile(path, np.uint8) for path in sorted(Path(folder).glob("*.safetensors"))]
    print(time.perf_counter() - begin)
    del kept


def start_once(folder: str) -> None:
    """Prints an answer."""
    model, processor = converters.load(folder)
    batch = processor(None, input_ids=[list(range(3, 40))])
    print(generate_ids(model, batch, max_new_tokens=TOKENS))


def status(key: str) -> int:
    """Bytes, by the kernel's account of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


CHILDREN = {"load": load_once, "again": load_again, "keep": keep_once, "start": start_once}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        CHILDREN[sys.argv[2]](sys.argv[3])
    else:
        main(arguments())
