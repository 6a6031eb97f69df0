"""Compiles a model for a topology from shapes alone, and says what it needs there."""

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from converters.export import to_bytes
from experiments.tasks.chips import COLLECTIVES, GPUS, Chip, make_mesh
from experiments.tasks.floor import costliest
from experiments.tasks.programs import (
    JOBS,
    Programs,
    batch_of,
    measured,
    model_of,
    plan_encode,
    resident,
)
from experiments.tasks.shapes import model_config
from vfjax import InputError
from vfjax.atomic import replacing
from vfjax.errors import counted
from vfjax.model import ModelConfig
from vfjax.sharding import row_shards

GIB = 2**30

Needs = dict[int, dict[str, dict[str, float]]]
"""Depth of the LLM -> name of a program -> what it needs."""
Lines = dict[str, list[tuple[str, int]]]
"""Name of a program -> its costliest lines of source, and their cycles."""


SUSTAINED = 0.85
"""Share of a chip's bandwidth in its compiler's estimates."""


def run(config: ConfigDict, workdir: Path) -> None:
    if config.job not in JOBS:
        raise InputError(
            "config.job", found=repr(config.job), expected=" or ".join(JOBS), fix="choose one"
        )
    mesh, chip = make_mesh(config.topology, config.model_axis, config.fsdp)
    start, whole = time.perf_counter(), model_config(config.model)
    if config.mask:
        whole = dataclasses.replace(whole, mask=config.mask)
    depths = config.depths or (whole.llm.layers,)
    lines: Lines | None = {} if config.explain else None
    found = compiled(config, whole, mesh, config.batch, depths, lines=lines)
    programs = {
        name: at_depth(found, name, whole.llm.layers) for name in next(iter(found.values()))
    }
    record = {**config.to_dict(), "devices": mesh.size, "memory": chip.memory}
    for program in programs.values():
        seconds = chip.seconds(program)
        program |= {f"{key} seconds": value for key, value in seconds.items()}
        if program["compiler seconds"] > 0:
            program["compiler seconds"] -= program["counted again"] / (SUSTAINED * chip.bytes)
        program["bound"], program["floor"] = max(seconds.values()), chip.floor(program)
        program["share"] = program["floor"] / (program["compiler seconds"] or program["bound"])
        program["rows a second, at most"] = config.batch / program["bound"]
    if config.job != "train":
        needed = {"encode": 1, "prefill": 1, "token": config.new_tokens - 1}
        whole_time = sum(times * programs[name]["bound"] for name, times in needed.items())
        record["answers a second, at most"] = config.batch / whole_time
    need = max(program["bytes"] for program in programs.values()) / GIB
    record |= {"programs": programs, "fits": need <= chip.memory}
    if lines is not None:
        record["costliest"] = lines
    if config.largest:
        twice = compiled(config, whole, mesh, 2 * config.batch, depths)
        record["largest batch"] = largest(config.batch, found, twice, whole, chip, mesh)
    record["compiled in"] = round(time.perf_counter() - start, 1)
    report(record, dict(mesh.shape), chip, need)
    out = Path(config.out or workdir / "plan.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as part:
        part.write_bytes(to_bytes(record))
    draw(out.with_suffix(".png"), record, chip)


def compiled(
    config: ConfigDict,
    whole: ModelConfig,
    mesh: Mesh,
    batch: int,
    depths: Sequence[int],
    known: "Programs | None" = None,
    lines: "Lines | None" = None,
) -> Needs:
    """What a program needs, by the LLM's depth and its name; says what it compiles.

    `known` has, or gets, the program of the pictures, which branches and batch alone tell apart.
    `lines` gets the costliest lines of each, at the last depth.
    """
    out: Needs = {}
    known = {} if known is None else known
    inputs = batch_of(config, whole, mesh, batch)
    jobs = [] if config.job == "train" or known else ["the pictures' program"]
    jobs += [f"the LLM's of {counted(depth, 'layer')}" for depth in depths]
    steps = (f"compiles {each}, {i} of {len(jobs)}" for i, each in enumerate(jobs, 1))
    for depth in depths:
        llm = dataclasses.replace(whole.llm, layers=depth)
        made = dataclasses.replace(whole, llm=llm)
        model = model_of(config, made, mesh, lora=config.job == "train" and config.trains == "lora")
        if config.job != "train" and not known:  # once: no depth of the LLM changes it
            print(next(steps), flush=True)
            known |= plan_encode(model, mesh, inputs)
        print(next(steps), flush=True)
        programs = known | JOBS[config.job](config, model, mesh, inputs)
        held = resident(model)
        out[depth] = {name: measured(program, held) for name, program in programs.items()}
        if lines is not None:
            lines |= {name: costliest(program.text) for name, program in programs.items()}
    return out


def largest(
    batch: int, found: Needs, twice: Needs, whole: ModelConfig, chip: Chip, mesh: Mesh
) -> int:
    """Rows that fit, on the line through two batches, a multiple of those that share them."""
    fit = []
    for name in next(iter(found.values())):
        one, two = (at_depth(each, name, whole.llm.layers)["bytes"] for each in (found, twice))
        each = max((two - one) / batch, 1.0)
        fit.append(batch + (chip.memory * GIB - one) / each)
    return max(int(min(fit)) // row_shards(mesh) * row_shards(mesh), 0)


def report(record: Mapping[str, Any], mesh: Mapping[str, int], chip: Chip, need: float) -> None:
    """The figures as text."""
    print(f"{record['model']}, {record['job']} on {record['topology']}, mesh {mesh}")
    for name, program in record["programs"].items():
        print(f"  {name}: " + ", ".join(said(program, record["batch"])))
        if lines := record.get("costliest", {}).get(name):
            print("    cycles by line, at the last depth compiled:")
            print("\n".join(f"    {cycles:>12,} {line}" for line, cycles in lines))
        elif "costliest" in record:
            print("    its compiler gives no cycles of lines")
    if "answers a second, at most" in record:
        of = f"of {record['new_tokens']} tokens"
        print(f"  {record['answers a second, at most']:.1f} answers {of} a second at most")
    if record["topology"].partition(":")[0] in GPUS:
        print(
            "  temporaries and times of memory are XLA's for CPUs, attention written out: too high"
        )
    print(f"  {'fits' if record['fits'] else 'does NOT fit'}: {need:.1f} of {chip.memory} GiB")
    if not record["fits"]:
        print(f"  {remedy(record, mesh, chip)}")
    if "largest batch" in record:
        print(f"  largest batch that fits, by two compiled ones: {record['largest batch']}")


def remedy(record: Mapping[str, Any], mesh: Mapping[str, int], chip: Chip) -> str:
    """What would fit."""
    fixed = max(program["arguments"] for program in record["programs"].values()) / GIB
    if record.get("largest batch"):
        return f"--config.batch={record['largest batch']} would"
    wanted = 2 ** math.ceil(math.log2(mesh["model"] * max(fixed / (0.8 * chip.memory), 1.01)))
    return (
        f"parameters and state alone are {fixed:.1f} GiB a device: --config.model_axis={wanted} or "
        "more, on a topology that has as many devices, would"
    )


def at_depth(
    found: Mapping[int, Mapping[str, Mapping[str, float]]], name: str, layers: int
) -> dict[str, float]:
    """Figures of a program at full depth, on the line through the two deepest compiled ones."""
    *_, (few, less), (many, more) = sorted((d, p[name]) for d, p in found.items()) * 2
    if many == layers:
        return dict(more)
    if few == many:
        raise InputError(
            "config.depths",
            found=f"{many} alone, of {counted(layers, 'layer')}",
            expected=f"two depths, or {layers}",
            fix="add another",
        )
    return {
        key: more[key] + (layers - many) * (more[key] - less[key]) / (many - few) for key in more
    }


def said(program: Mapping[str, float], batch: int) -> list[str]:
    """A line of what was measured."""
    kinds = [
        f"{program[kind]:.0f} {kind} ({program[f'{kind} bytes'] / 2**20:.0f} MiB)"
        for kind in COLLECTIVES
        if program[kind] >= 0.5
    ]
    by = max(("operations", "memory", "network"), key=lambda key: program[f"{key} seconds"])
    times = f"at best {1e3 * program['bound']:.2f} ms ({by})"
    if program["compiler seconds"] > 0:
        times += f", {1e3 * program['compiler seconds']:.2f} ms by the compiler"
    times += (
        f"; a perfect program's {1e3 * program['floor']:.2f} ms are {program['share']:.0%} of it"
    )
    return [
        f"{program['bytes'] / GIB:.1f} GiB a device ({program['arguments'] / GIB:.1f} arguments)",
        f"{program['flops'] / 1e12:.2f} TFLOP a device",
        times,
        f"{batch / program['bound']:.0f} rows/s at most",
        *kinds,
    ]


def draw(file: Path, record: Mapping[str, Any], chip: Chip) -> None:
    """Memory beside the chip's, and the least times, a bar a program."""
    names = list(record["programs"])
    figure = Figure(figsize=(8, 1.2 + 0.5 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, program in record["programs"].items():
        fixed, used = program["arguments"] / GIB, program["bytes"] / GIB
        left.barh(name, fixed, color="tab:blue", label="arguments")
        left.barh(name, used - fixed, left=fixed, color="tab:orange", label="temporaries")
        keys = ("operations", "memory", "network")
        right.barh([f"{name}: {k}" for k in keys], [1e3 * program[f"{k} seconds"] for k in keys])
    left.axvline(chip.memory, color="black", linestyle="--")
    left.set(xlabel="GiB a device", title=f"{record['model']} on {record['topology']}")
    handles, labels = left.get_legend_handles_labels()
    left.legend(handles[:2], labels[:2], frameon=False, fontsize=7)
    right.set(xlabel="ms at best", xscale="log")
    right.tick_params(axis="y", labelsize=7)
    with replacing(file) as part:
        figure.savefig(part, dpi=120, format="png")
