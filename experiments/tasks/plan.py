"""Compiles a model for a topology from shapes alone, and says what it needs there."""

import contextlib
import dataclasses
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.stages import Wrapped
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from converters.export import to_bytes
from converters.load import abstract, join
from experiments.tasks.shapes import model_config
from vfjax import Batch, InputError, Model, Processor
from vfjax.architectures import Pictures
from vfjax.atomic import replacing
from vfjax.errors import counted
from vfjax.model import ModelConfig
from vfjax.nn.flash import kernel_flops
from vfjax.sharding import AXES, by_token, param_sharding, row_shards, rows_over
from vfjax.train import Group, LoRAConfig, Optim, State, add_lora, make_step, split
from vfjax.train.optim import name_of, named
from vfjax.train.step import cast


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device, by its maker's data sheet: memory in GiB, the rest in units a second."""

    memory: float
    flops: float  # of bfloat16 products
    bytes: float  # of its memory
    network: float  # bytes to the devices beside it, all links

    def seconds(self, program: Mapping[str, float]) -> dict[str, float]:
        """The least time of a program's operations, memory traffic and collectives."""
        moved = sum(program[f"{kind} bytes"] for kind in COLLECTIVES)
        return {
            "operations": program["flops"] / self.flops,
            "memory": program["traffic"] / self.bytes,
            "network": moved / self.network,
        }


CHIPS = {
    "v4": Chip(32, 275e12, 1228e9, 300e9),
    "v5e": Chip(16, 197e12, 819e9, 200e9),
    "v5p": Chip(95, 459e12, 2765e9, 600e9),
    "v6e": Chip(32, 918e12, 1640e9, 448e9),
    "tpu7x": Chip(96, 1153.5e12, 3690e9, 600e9),  # a chip is two devices
    "a100": Chip(80, 312e12, 2039e9, 300e9),
    "h100": Chip(80, 989e12, 3350e9, 450e9),
    "h200": Chip(141, 989e12, 4800e9, 450e9),
}
"""TPUs by the names of their topologies, GPUs (80 and 141 GB, SXM) by ours."""
GPUS = ("a100", "h100", "h200")

GIB = 2**30
Shape = jax.ShapeDtypeStruct

Needs = dict[int, dict[str, dict[str, float]]]
"""Depth of the LLM -> name of a program -> what it needs."""


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
    found = compiled(config, whole, mesh, config.batch, depths)
    programs = {
        name: at_depth(found, name, whole.llm.layers) for name in next(iter(found.values()))
    }
    record = {**config.to_dict(), "devices": mesh.size, "memory": chip.memory}
    for program in programs.values():
        seconds = chip.seconds(program)
        program |= {f"{key} seconds": value for key, value in seconds.items()}
        program["bound"] = max(seconds.values())
        program["rows a second, at most"] = config.batch / program["bound"]
    if config.job != "train":
        needed = {"encode": 1, "prefill": 1, "token": config.new_tokens - 1}
        whole_time = sum(times * programs[name]["bound"] for name, times in needed.items())
        record["answers a second, at most"] = config.batch / whole_time
    need = max(program["bytes"] for program in programs.values()) / GIB
    record |= {"programs": programs, "fits": need <= chip.memory}
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
) -> Needs:
    """What a program needs, by the LLM's depth and its name.

    `known` has, or gets, the program of the pictures, which branches and batch alone tell apart.
    """
    out: Needs = {}
    known = {} if known is None else known
    inputs = batch_of(config, whole, mesh, batch)
    for depth in depths:
        llm = dataclasses.replace(whole.llm, layers=depth)
        made = dataclasses.replace(whole, llm=llm)
        model = model_of(config, made, mesh, lora=config.job == "train" and config.trains == "lora")
        if config.job != "train" and not known:  # once: no depth of the LLM changes it
            known |= plan_encode(model, mesh, inputs)
        programs = known | JOBS[config.job](config, model, mesh, inputs)
        held = resident(model)
        out[depth] = {name: measured(program, held) for name, program in programs.items()}
    return out


def resident(tree: object) -> int:
    """Bytes of a tree on a device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


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


def make_mesh(topology: str, model: int, fsdp: int) -> tuple[Mesh, Chip]:
    """A (data, fsdp, model) mesh of a topology's devices, and one of them.

    TPUs are compiled for by their own compiler. GPUs ("h100:8") stand on as many CPU devices: the
    parameters and collectives are those of any machine, XLA:CPU's temporaries too high, as its
    attention keeps the scores and its caches are copied.

    Raises:
        InputError: no such topology, no TPU compiler, or an axis that does not divide it.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU here to ask
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nor to share between two plans
    kind, _, shape = topology.partition(":")
    try:
        chip = CHIPS[kind]
        devices: Sequence[jax.Device]
        if kind in GPUS:
            with contextlib.suppress(RuntimeError):  # too late: there are as many as there are
                jax.config.update("jax_num_cpu_devices", int(shape))
            devices = jax.devices("cpu")[: int(shape)]
            if len(devices) < int(shape):
                raise ValueError(f"{len(devices)} CPU devices to stand for them")
        else:
            devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except (KeyError, RuntimeError, ValueError) as error:
        raise InputError(
            "config.topology",
            found=f"{topology!r} ({str(error).splitlines()[0][:120]})",
            expected=f"one of {', '.join(CHIPS)} with a shape, as v5e:4x4 or h100:8, and for TPUs "
            "their compiler",
            fix="correct it; pip install 'vfjax[tpu]' brings the compiler",
        ) from error
    if len(devices) % (model * fsdp):
        raise InputError(
            "config.model_axis, config.fsdp",
            found=f"{model} x {fsdp} for {counted(len(devices), 'device')}",
            expected="a divisor of their number",
            fix="choose others",
        )
    sizes = (len(devices) // (model * fsdp), fsdp, model)
    grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES)), chip


def model_of(config: ConfigDict, made: ModelConfig, mesh: Mesh, *, lora: bool = False) -> Model:
    """The model as shapes that lie on the mesh."""

    def build(*, rngs: nnx.Rngs) -> Model:
        model = made.build(rngs=rngs)
        return add_lora(model, LoRAConfig(rank=config.rank)) if lora else model

    graph, params = abstract(build)
    for name, p in params.items():
        dtype = config.dtype if jnp.issubdtype(p.dtype, jnp.floating) else p.dtype
        at = param_sharding(name, p, mesh)
        params[name] = p.replace(Shape(p.shape, dtype, sharding=at))
    return join(graph, params)


def batch_of(config: ConfigDict, made: ModelConfig, mesh: Mesh, batch: int) -> Batch:
    """Inputs of the job as shapes: rows of one picture and of text, over the mesh's row axes."""
    labels = config.job == "train"
    processor = Processor(made, lengths=tuple(range(128, 65536, 128)))
    if not made.branches:
        raise InputError(
            "config.model",
            found="an LLM without visual branches",
            expected="a model that reads pictures",
            fix="choose another",
        )
    ids = [[1, -200, *[0] * config.text]]
    picture = np.zeros((800, 1000, 3), np.uint8)
    row = processor([picture], input_ids=ids, labels=ids if labels else None)

    def grown(x: np.ndarray) -> Shape:
        shape = (batch * x.shape[0], *x.shape[1:])
        over = rows_over(mesh, shape[0])
        spec, lead = ((None, over), (1,)) if labels else ((over,), ())
        return Shape((*lead, *shape), x.dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree.map(grown, row)


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
        compiled: it.
        given: shapes of what it is given besides the model.
        kernels: operations a device of what the compiler does not look into.
        narrow: bytes of the program that is meant, for each of the compiled one.
    """

    compiled: Any  # jax.stages.Compiled: what it tells of itself depends on the platform
    given: object
    kernels: float
    narrow: float = 1.0

    @classmethod
    def of(cls, function: Wrapped, given: object, mesh: Mesh, *args: object) -> Self:
        """A jitted function, for arguments of these shapes on a mesh.

        For GPUs it is compiled in float32, and its bytes are halved: XLA's CPU compiler would keep
        float32 copies of bfloat16 parameters, as it multiplies nothing narrower.
        """
        if stand_ins(mesh) and any(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(args)):
            wide = cls.of(function, given, mesh, *cast(args, "float32"))
            return dataclasses.replace(wide, narrow=0.5)
        traced = function.trace(*args)
        return cls(traced.lower().compile(), given, kernel_flops(traced.jaxpr))


def stand_ins(mesh: Mesh) -> bool:
    """Whether CPU devices stand for those that are meant."""
    return mesh.devices.flat[0].platform == "cpu"


Programs = dict[str, Program]


def plan_encode(model: Model, mesh: Mesh, batch: Batch) -> Programs:
    """Pictures to visual tokens."""
    return {"encode": Program.of(jax.jit(Model.memories), batch, mesh, model, batch.images)}


def plan_generate(config: ConfigDict, model: Model, mesh: Mesh, batch: Batch) -> Programs:
    """Prefill of encoded pictures, and one step of decoding."""
    names = [branch.name for branch in model.config.branches]
    memories = jax.eval_shape(Model.memories, model, batch.images)

    def laid(x: Shape) -> Shape:
        over = PartitionSpec(rows_over(mesh, x.shape[0]))
        return Shape(x.shape, x.dtype, sharding=NamedSharding(mesh, over))

    images: Any = {
        name: Pictures(jax.tree.map(laid, memory))
        for name, memory in zip(names, memories, strict=True)
    }
    batch = dataclasses.replace(batch, images=images)
    size = batch.read + config.new_tokens
    read = jax.jit(lambda model, batch: model.prefill(batch, size))
    prefill = Program.of(read, batch, mesh, model, batch)
    _, cache = jax.eval_shape(read, model, batch)
    _, at = prefill.compiled.output_shardings
    cache = jax.tree.map(lambda x, s: Shape(x.shape, x.dtype, sharding=s), cache, at)
    tokens = Shape(batch.tokens.shape[:1], jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    decode = jax.jit(lambda model, tokens, cache: model.next(tokens, cache), donate_argnums=2)
    return {
        "prefill": prefill,
        "token": Program.of(decode, (tokens, cache), mesh, model, tokens, cache),
    }


def plan_train(config: ConfigDict, model: Model, mesh: Mesh, batch: Batch) -> Programs:
    """One step."""
    model.llm.remat = config.remat
    model.llm.stream = by_token(mesh) if config.sequence else None
    groups = [Group(pattern, rate) for pattern, rate in config.train[config.trains]]
    graph, params, frozen = split(model, groups)
    tx = Optim(1000).build(groups)
    at = {name: x.sharding for name, x in named(params).items()}
    everywhere = NamedSharding(mesh, PartitionSpec())

    def laid(path: jax.tree_util.KeyPath, x: Shape) -> Shape:
        found = [sharding for name, sharding in at.items() if name_of(path).endswith(name)]
        return Shape(x.shape, x.dtype, sharding=found[0] if found else everywhere)

    opt = jax.tree_util.tree_map_with_path(laid, jax.eval_shape(tx.init, params))
    count: Any = Shape((), jnp.int32, sharding=everywhere)
    state = State(count, params, opt)
    dtype = "float32" if stand_ins(mesh) else config.dtype
    step: Any = make_step(graph, tx, state, dtype=dtype, mesh=mesh)
    return {"step": Program.of(step, (opt, batch), mesh, state, frozen, batch)}


JOBS = {"generate": plan_generate, "evaluate": plan_generate, "train": plan_train}

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
ITEM = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}


def measured(program: Program, held: int) -> dict[str, float]:
    """Bytes a device, operations and memory traffic a device, collectives by kind.

    Args:
        program: it.
        held: bytes a device of the model, all of which stays there, also what the program ignores.
    """
    compiled, arguments = program.compiled, held + resident(program.given)
    memory = compiled.memory_analysis()
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:  # this jaxlib cannot read that compiler's text
        print(f"collectives are not counted: {str(error).splitlines()[0][:120]}")
        text = ""
    made = memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
    cost = compiled.cost_analysis()
    out = {
        "bytes": arguments + program.narrow * made,
        "arguments": arguments,
        "flops": cost.get("flops", 0.0) + program.kernels,
        "traffic": program.narrow * cost.get("bytes accessed", 0.0),
        "compiler seconds": cost.get("optimal_seconds", 0.0),
    }
    for kind in COLLECTIVES:
        sizes = collectives(text, kind)
        out |= {kind: len(sizes), f"{kind} bytes": program.narrow * sum(sizes)}
    return out


def collectives(text: str, kind: str) -> list[int]:
    """Bytes of the results of a kind of collective in a compiled program's text."""
    sizes = []
    for line in re.findall(rf"= (.*?) {kind}(?:-start)?\(", text):
        arrays = re.findall(r"(\w+)\[([\d,]*)\]", line)
        each = [ITEM.get(t, 4) * math.prod(map(int, n.split(","))) if n else 4 for t, n in arrays]
        sizes.append(max(each, default=0))  # a start's tuple holds what it reads, too
    return sizes


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
