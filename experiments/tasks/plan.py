"""Compiles a model for a topology from shapes alone, and says what it needs there."""

import dataclasses
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from converters.export import to_bytes
from converters.load import abstract, join
from experiments.tasks.shapes import model_config
from vfjax import Batch, InputError, Model, Processor
from vfjax.model import ModelConfig
from vfjax.sharding import param_sharding
from vfjax.train import Group, LoRAConfig, Optim, State, add_lora, make_step, split
from vfjax.train.optim import name_of, named

MEMORY = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32, "tpu7x": 192}
"""GiB of a chip (of half a chip, which is a device, for tpu7x: 96)."""

Shape = jax.ShapeDtypeStruct


def run(config: ConfigDict, workdir: Path) -> None:
    mesh, memory = make_mesh(config.topology, config.model_axis)
    programs_of = {"generate": plan_generate, "train": plan_train}.get(config.job)
    if programs_of is None:
        raise InputError(
            "config.job", found=repr(config.job), expected="'generate' or 'train'", fix="choose one"
        )
    start, whole = time.perf_counter(), model_config(config.model)
    found = {}
    for depth in config.depths or (whole.llm.layers,):
        llm = dataclasses.replace(whole.llm, layers=depth)
        compiled = programs_of(config, dataclasses.replace(whole, llm=llm), mesh)
        found[depth] = {name: measured(program) for name, program in compiled.items()}
    programs = {name: at_depth(found, name, whole.llm.layers) for name in compiled}
    seconds = time.perf_counter() - start
    need = max(program["bytes"] for program in programs.values())
    out = Path(config.out or workdir / "plan.json")
    print(f"{config.model}, {config.job} on {config.topology}, mesh {dict(mesh.shape)}")
    for name, program in programs.items():
        print(f"  {name}: " + ", ".join(said(program)))
    fits = need <= memory * 2**30
    print(f"  {'fits' if fits else 'does NOT fit'}: {need / 2**30:.1f} of {memory} GiB a device")
    if not fits:
        print("  a larger --config.model_axis, or a smaller --config.batch, needs less a device")
    record = {**config.to_dict(), "programs": programs, "fits": fits, "memory": memory}
    record |= {"compiled in": round(seconds, 1), "devices": mesh.size}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(to_bytes(record))


def make_mesh(topology: str, model: int) -> tuple[Mesh, float]:
    """A (data, model) mesh of a topology's devices, and GiB of each.

    Raises:
        InputError: no such topology, no TPU compiler, or an axis that does not divide it.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU here to ask
    kind = topology.partition(":")[0]
    try:
        memory = MEMORY[kind] / (2 if kind == "tpu7x" else 1)
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except (KeyError, RuntimeError, ValueError) as error:
        raise InputError(
            "config.topology",
            found=f"{topology!r} ({str(error).splitlines()[0][:120]})",
            expected=f"one of {', '.join(MEMORY)} with a shape, as v5e:4x4, and the TPU compiler",
            fix="correct it; pip install 'vfjax[tpu]' brings the compiler",
        ) from error
    if len(devices) % model:
        raise InputError(
            "config.model_axis",
            found=f"{model} for {len(devices)} devices",
            expected="a divisor of their number",
            fix="choose another",
        )
    shape = (len(devices) // model, model)
    axes = (AxisType.Auto,) * 2
    return jax.make_mesh(shape, ("data", "model"), axis_types=axes, devices=devices), memory


def model_of(config: ConfigDict, made: ModelConfig, mesh: Mesh, *, lora: bool = False) -> Model:
    """The model as shapes that lie on the mesh."""

    def build(*, rngs: Any) -> Model:
        model = made.build(rngs=rngs)
        return add_lora(model, LoRAConfig(rank=config.rank)) if lora else model

    graph, params = abstract(build)
    for name, p in params.items():
        dtype = config.dtype if jnp.issubdtype(p.dtype, jnp.floating) else p.dtype
        at = param_sharding(name, p, mesh)
        params[name] = p.replace(Shape(p.shape, dtype, sharding=at))
    return join(graph, params)


def batch_of(config: ConfigDict, made: ModelConfig, mesh: Mesh, *, labels: bool) -> Batch:
    """Inputs of the job as shapes: rows of one picture and of text, over the data axis."""
    processor = Processor(made, lengths=tuple(range(128, 65536, 128)))
    ids = [[1, -200, *range(3, 3 + config.text)]]
    picture = np.zeros((800, 1000, 3), np.uint8)
    row = processor([picture], input_ids=ids, labels=ids if labels else None)

    def grown(x: np.ndarray) -> Shape:
        shape = (config.batch * x.shape[0], *x.shape[1:])
        over = "data" if shape[0] % mesh.shape["data"] == 0 else None
        spec, lead = ((None, over), (1,)) if labels else ((over,), ())
        return Shape((*lead, *shape), x.dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree.map(grown, row)


def plan_generate(config: ConfigDict, made: ModelConfig, mesh: Mesh) -> dict[str, Any]:
    """Prefill, and one step of decoding."""
    model, batch = model_of(config, made, mesh), batch_of(config, made, mesh, labels=False)
    size = batch.tokens.shape[1] + config.new_tokens
    prefill = jax.jit(lambda model, batch: model.prefill(batch, size)).lower(model, batch).compile()
    _, cache = jax.eval_shape(lambda model, batch: model.prefill(batch, size), model, batch)
    _, at = prefill.output_shardings
    cache = jax.tree.map(lambda x, s: Shape(x.shape, x.dtype, sharding=s), cache, at)

    def decode(model: Model, cache: Any, ids: jax.Array) -> Any:
        hidden, cache = model.llm(model.llm.embed(ids), jnp.ones(ids.shape, bool), cache)
        return model.llm.logits(hidden), cache

    everywhere = NamedSharding(mesh, PartitionSpec())
    ids = Shape((config.batch, 1), jnp.int32, sharding=everywhere)
    step = jax.jit(decode, donate_argnums=1).lower(model, cache, ids).compile()
    return {"prefill": prefill, "token": step}


def plan_train(config: ConfigDict, made: ModelConfig, mesh: Mesh) -> dict[str, Any]:
    """One step."""
    model = model_of(config, made, mesh, lora=config.trains == "lora")
    model.llm.remat = config.remat
    groups = [Group(pattern, rate) for pattern, rate in config.train[config.trains]]
    graph, params, frozen = split(model, groups)
    tx = Optim(1000).build(groups)
    at = {name: x.sharding for name, x in named(params).items()}
    everywhere = NamedSharding(mesh, PartitionSpec())

    def laid(path: Any, x: Shape) -> Shape:
        found = [sharding for name, sharding in at.items() if name_of(path).endswith(name)]
        return Shape(x.shape, x.dtype, sharding=found[0] if found else everywhere)

    opt = jax.tree_util.tree_map_with_path(laid, jax.eval_shape(tx.init, params))
    count: Any = Shape((), jnp.int32, sharding=everywhere)
    state = State(count, params, opt)
    step: Any = make_step(graph, tx, state, dtype=config.dtype, mesh=mesh)
    batch = batch_of(config, made, mesh, labels=True)
    return {"step": step.lower(state, frozen, batch).compile()}


COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def measured(compiled: Any) -> dict[str, float]:
    """Bytes a device, operations a device, collectives by kind."""
    memory = compiled.memory_analysis()
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:  # this jaxlib cannot read that compiler's text
        print(f"collectives are not counted: {str(error).splitlines()[0][:120]}")
        text = ""
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return {
        "bytes": used + memory.temp_size_in_bytes - memory.alias_size_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "flops": compiled.cost_analysis().get("flops", 0.0),
        **{kind: len(re.findall(rf" {kind}(?:-start)?\(", text)) for kind in COLLECTIVES},
    }


def at_depth(
    found: Mapping[int, Mapping[str, Mapping[str, float]]], name: str, layers: int
) -> dict[str, float]:
    """Figures of a program at full depth, on the line through the two deepest compiled ones."""
    *_, (few, less), (many, more) = sorted((d, p[name]) for d, p in found.items()) * 2
    if many == layers or few == many:
        return dict(more)
    return {
        key: more[key] + (layers - many) * (more[key] - less[key]) / (many - few) for key in more
    }


def said(program: Mapping[str, float]) -> list[str]:
    """A line of what was measured."""
    kinds = [f"{program[kind]:.0f} {kind}" for kind in COLLECTIVES if program[kind]]
    gib = 2**30
    return [
        f"{program['bytes'] / gib:.1f} GiB a device ({program['arguments'] / gib:.1f} arguments)",
        f"{program['flops'] / 1e12:.2f} TFLOP a device",
        *kinds,
    ]
