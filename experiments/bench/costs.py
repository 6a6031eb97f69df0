"""What members, visual tokens and rows cost: measured on this machine, planned for a pod.

    python experiments/bench/costs.py [--quick] --out=FILE.json

Measured: a small model with random weights, float32. Planned: Llama-3-8B with published branches in
bfloat16 on 16 TPU v5e, eight sharing each product, compiled by their compiler (the extra `tpu`) and
bounded by the data sheet; without that compiler the plan is left out, and said to be. Draws
FILE.png: tokens a second of decoding, first answers a second and memory, each beside the first
point's.
"""

import argparse
import collections
import dataclasses
import functools
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.bench.basic import FULL, QUICK, Sizes, copies, load_ours, write_folder
from experiments.bench.common import arguments, cores, interleaved, save
from experiments.configs.plan import get_config
from experiments.tasks import plan
from experiments.tasks.chips import Chip, make_mesh
from experiments.tasks.programs import Programs
from experiments.tasks.shapes import model_config
from vfjax import Batch, InputError, Model, Processor, generate_ids

STEPS = 96
"""Tokens that a decode is timed over, after the first: enough to stand out of its noise."""
BRANCHES = ("llava", "dense-clip", "mgm", "slime")
LLM = "llama-3-8b"
TOPOLOGY = "v5e:4x4"
PACKAGES = ("jax", "jaxlib", "flax", "vfjax")


@dataclasses.dataclass(frozen=True)
class Point:
    """What is asked for.

    Attributes:
        members: branches that see the picture.
        words: tokens of text; beyond the prompt's they stand for visual tokens, which cost the LLM
            as much and no encoder.
        rows: of a batch.
    """

    members: int = 1
    words: int = 60
    rows: int = 1


def curves(rows: Sequence[int], most: int) -> dict[str, dict[int, Point]]:
    """Name of a curve -> where -> the point."""
    tokens = {n: Point(words=60 + n - 576) for n in (576, 1440, 2880, 5760)}
    return {
        "members": {k: Point(members=k) for k in (1, 2, 3, 4)},
        "visual tokens": {n: point for n, point in tokens.items() if n <= most},
        "rows": {b: Point(members=2, rows=b) for b in rows},
    }


def main(args: argparse.Namespace) -> None:
    small = dataclasses.replace(
        FULL,
        vision=FULL.vision | {"num_hidden_layers": 12},
        text=FULL.text | {"num_hidden_layers": 4, "max_position_embeddings": 8192},
        repeats=1,
    )
    sizes = QUICK if args.quick else small
    here = curves((1, 2), 576) if args.quick else curves((1, 2, 4, 8), 5760)
    with tempfile.TemporaryDirectory() as name:
        write_folder(Path(name), sizes)
        model, processor = load_ours(Path(name))
        found = {"measured": each(here, functools.partial(measured, model, processor, sizes))}
    notes = {"sizes": dataclasses.asdict(sizes), "threads": cores()}
    notes |= {"load average": os.getloadavg()[0], "planned": f"{LLM} on {TOPOLOGY}"}
    save(found, notes, PACKAGES, args.out)  # the plan takes as long again
    there = curves((2,), 576) if args.quick else curves((2, 4, 8, 16, 32, 64), 5760)
    try:
        mesh, chip = make_mesh(TOPOLOGY, 8, 1)
        towers: dict[tuple[int, int], Programs] = collections.defaultdict(dict)
        found["planned"] = each(there, functools.partial(planned, mesh, chip, towers))
        save(found, notes, PACKAGES, args.out)
    except InputError as error:
        print(f"nothing is planned: {error}")
    draw(args.out.with_suffix(".png"), found)


def each(
    points: dict[str, dict[int, Point]], cost: Callable[[Point], dict[str, float]]
) -> dict[str, dict[int, dict[str, float]]]:
    """Curve -> where -> its figures, printed as they come; equal points are taken once."""
    known: dict[Point, dict[str, float]] = {}
    for name, curve in points.items():
        for at, point in curve.items():
            known[point] = known.get(point) or cost(point)
            told = ", ".join(f"{key} {value:.4g}" for key, value in known[point].items())
            print(f"{name} {at}: {told}", flush=True)
    return {name: {at: known[p] for at, p in curve.items()} for name, curve in points.items()}


def measured(one: Model, processor: Processor, sizes: Sizes, point: Point) -> dict[str, float]:
    """Seconds and bytes on this machine, of a model whose members have the same weights."""
    model = copies(one, point.members)
    its = dataclasses.replace(processor, config=model.config, lengths=tuple(range(64, 8192, 64)))
    rng = np.random.default_rng(0)
    side = sizes.vision["image_size"]
    pictures = list(rng.integers(0, 256, (point.rows, side, side, 3), np.uint8))
    words = rng.integers(3, sizes.text["vocab_size"] - 1, (point.rows, point.words)).tolist()
    batch = its(pictures, input_ids=[[1, -200, *row] for row in words])
    runs = {
        str(n): functools.partial(generate_ids, model, batch, max_new_tokens=n)
        for n in (1, 1 + STEPS)
    }
    seconds = interleaved(runs, sizes.repeats)
    first, all_of_it = (min(seconds[name].rest) for name in runs)
    after = (all_of_it - first) / STEPS
    return costs(point, first, after, held(model, batch))


def held(model: Model, batch: Batch) -> int:
    """Bytes that reading a batch takes: what is given, cache and temporaries."""
    prefill = jax.jit(lambda model, batch: model.prefill(batch, batch.read + STEPS))
    memory: Any = prefill.lower(model, batch).compile().memory_analysis()
    made = memory.output_size_in_bytes + memory.temp_size_in_bytes
    return memory.argument_size_in_bytes + made


def planned(
    mesh: Mesh, chip: Chip, towers: dict[tuple[int, int], Programs], point: Point
) -> dict[str, float]:
    """The least seconds by the data sheet, and bytes of a chip by its compiler.

    `towers` keeps the pictures' programs by members and rows: most of what is to be compiled.
    """
    config = get_config()
    config.model = f"{'+'.join(BRANCHES[: point.members])}@{LLM}"
    config.text = point.words
    whole = model_config(config.model)
    rows = max(point.rows, mesh.shape["data"])
    known = towers[point.members, rows]
    found = plan.compiled(config, whole, mesh, rows, (1, 2), known)
    names = ("encode", "prefill", "token")
    programs = [plan.at_depth(found, name, whole.llm.layers) for name in names]
    encode, prefill, token = (max(chip.seconds(program).values()) for program in programs)
    most = max(program["bytes"] for program in programs)
    return costs(dataclasses.replace(point, rows=rows), encode + prefill, token, most)


def costs(point: Point, first: float, after: float, most: float) -> dict[str, float]:
    """The figures of a point."""
    return {
        "first answers a second": point.rows / first,
        "tokens a second": point.rows / after,
        "GiB": most / 2**30,
    }


def draw(file: Path, found: dict[str, dict[str, dict[int, dict[str, float]]]]) -> None:
    """A column a curve, a row a figure, each in shares of the curve's first point."""
    names = list(next(iter(found.values())))
    keys = ("first answers a second", "tokens a second", "GiB")
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    panels = figure.subplots(len(keys), len(names), sharex="col", squeeze=False)
    for j, name in enumerate(names):
        for i, key in enumerate(keys):
            axes = panels[i][j]
            for how, curve in found.items():
                first = next(iter(curve[name].values()))[key]
                axes.plot(
                    list(curve[name]),
                    [p[key] / first for p in curve[name].values()],
                    "o-",
                    label=how,
                )
            axes.set(xscale="log" if name == "rows" else "linear", yscale="log")
            axes.tick_params(which="both", labelsize=7)
            axes.set_ylabel(f"{key}\nof the first" if j == 0 else "", fontsize=8)
        panels[-1][j].set_xlabel(name)
    panels[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main(arguments(__doc__.splitlines()[0]))
