"""Merges by every method, as `fuse` writes them, under a watchdog; see test_merge_threads.py.

`python -m tests.merge_threads` runs all: each method, trim, scope and number of threads, 20 times.
"""

import argparse
import functools
import os
import shutil
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import converters
from converters.files import writer
from tests import checkpoints
from vfjax.merge import METHODS, merge
from vfjax.merge.engine import reductions

PARAMS: dict[str, Any] = {"density": 0.5, "select_topk": 0.5, "t": 0.3, "gamma": 0.05}
SCOPES = {"all": (), "blocks": (("embed_tokens|lm_head|model.norm", {"take": "base"}),)}


def recipes() -> Iterator[tuple[str, dict[str, Any], str]]:
    """Every method with the parameters that it must have, and each way of its trimming.

    What rules leave out matters where tensors are ranked as one: each scope there.
    """
    for name, method in METHODS.items():
        params = {k: v for k, v in PARAMS.items() if k in method.params}
        for trim in ("tensor", "model") if "trim" in method.params else (None,):
            for scope in SCOPES if trim == "model" else ("all",):
                yield name, params | ({} if trim is None else {"trim": trim}), scope


def make_family(root: Path) -> None:
    """A base and two members, of so many tensors that threads meet."""
    sizes = {"intermediate_size": 32, "num_key_value_heads": 4}  # few shapes to compile for
    llm = checkpoints.make_llama(0, num_hidden_layers=3, **sizes)
    checkpoints.llama_folder(root / "base", llm=llm)
    for i, name in enumerate(("a", "b"), 1):
        checkpoints.llama_folder(root / name, llm=checkpoints.tuned(llm, i))


def use(threads: int) -> None:
    """So many threads read ahead of the writing, and so many answer for tensors' blocks."""
    writer.THREADS = threads
    reductions.pool.cache_clear()
    reductions.pool = functools.cache(lambda: ThreadPoolExecutor(threads, "vfjax-merge"))


def open_once() -> None:
    """Has fuses keep what they found in a folder: opening takes six times as long as merging."""
    module, known = sys.modules["converters.fusion"], {}
    mapped = module.mapped

    def keep(source: converters.Source, export: str) -> Any:
        if source.path not in known:
            known[source.path] = mapped(source, export)
        return known[source.path]

    module.mapped = keep
    module.find_spec = lambda _: None  # matplotlib's pictures take most of the rest


def run(root: Path, method: str, params: dict[str, Any], scope: str) -> None:
    """One fuse."""
    members = {name: root / name for name in "ab"[: METHODS[method].takes[1] or 2]}
    options = {"base": root / "base", "export": "llm", "checksums": False}
    options |= {"method": method, "params": params, "rules": SCOPES[scope]}
    converters.fuse(members, root / "out", **options)
    shutil.rmtree(root / "out")


def nested(threads: int) -> None:
    """Merges whose sources are merges, and one source of two, read by several threads."""
    rng = np.random.default_rng(0)
    names = [f"w{i}" for i in range(12)]
    base, *others = (
        {n: rng.normal(size=(9, 64)).astype(np.float32) for n in names} for _ in "1234"
    )
    params = {"weights": (1.0, 1.0), "density": 0.5, "trim": "model"}
    one = merge(base, {"a": others[0], "b": others[1]}, "ties", params)
    two = merge(base, {"a": one, "b": others[2]}, "ties", params)
    top = merge(base, {"a": two, "b": one}, "ties", {**params, "trim": "tensor"})
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda tensor: tensor[...], [x[n] for n in names for x in (top, one, two)]))


def watch(seconds: float, what: str) -> threading.Timer:
    """Ends the process, with all threads by name, unless it is cancelled in time."""

    def end() -> None:
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        for ident, frame in sys._current_frames().items():
            stack = "".join(traceback.format_stack(frame))
            print(f"thread {names.get(ident, ident)}:\n{stack}", file=sys.stderr)
        print(f"{what}: not done in {seconds:.0f} s", file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    return timer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--methods", nargs="*", default=[*METHODS, "nested"])
    parser.add_argument("--threads", nargs="*", type=int, default=(1, 2, 8))
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60, help="that a merge may take")
    parser.add_argument(
        "--folder", help="to work in, such as /dev/shm, where no disk is waited for"
    )
    args = parser.parse_args()
    count, begun = 0, time.monotonic()
    open_once()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        make_family(Path(folder))
        for threads in args.threads:
            use(threads)
            for method, params, scope in recipes():
                if method not in args.methods:
                    continue
                what = f"{method} {params}, {scope}, {threads} threads"
                for _ in range(args.runs):
                    timer = watch(args.seconds, what)
                    run(Path(folder), method, params, scope)
                    timer.cancel()
                    count += 1
                took = time.monotonic() - begun
                print(f"{what}: {count} merges in {took:.0f} s", file=sys.stderr, flush=True)
            for _ in range(args.runs if "nested" in args.methods else 0):
                timer = watch(args.seconds, f"merges of merges, {threads} threads")
                nested(threads)
                timer.cancel()
                count += 1
    print(f"{count} merges")


if __name__ == "__main__":
    main()
