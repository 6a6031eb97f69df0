"""The loop of one stage: read, step, record, save; goes on where it was stopped."""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from vfjax.atomic import publish
from vfjax.errors import InputError, counted, require
from vfjax.model import Batch, Model
from vfjax.processes import agreeing
from vfjax.sharding import by_token, mesh_of, row_axes, row_shards
from vfjax.train.checkpoint import Checkpoints
from vfjax.train.flops import step_flops
from vfjax.train.optim import Group, Optim
from vfjax.train.record import Record, Tracker
from vfjax.train.step import init, make_step, split
from vfjax.train.stop import Programs, Stopped, StopSignals, resumes

Data = Callable[[int], Iterator[Batch]]
"""Step -> this process's batches from there on, those of several accumulated parts with a leading
axis of them (`vfjax.data.Batches.to_iter`). The step alone decides what they are."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How a stage runs.

    Attributes:
        dtype: of the computation; masters are float32, and what is frozen keeps its stored dtype.
        remat: computes each LLM block again in the backward pass instead of keeping it.
        sequence: keeps what is between the blocks divided by tokens over the mesh's model axis
            (`vfjax.sharding.by_token`); for long rows.
        save_every: steps between two states.
        keep: states that are kept.
        log_every: steps between two looks at the metrics.
        profile: (first, last) step of a profiler's trace; None takes none.
        seed: of the noise that connectors add in training (SliME's); None: they add none.

    Raises:
        InputError: a number out of range, or another dtype than a floating one.
    """

    dtype: DTypeLike = jnp.bfloat16
    remat: bool = True
    sequence: bool = False
    save_every: int = 500
    keep: int = 2
    log_every: int = 10
    profile: tuple[int, int] | None = None
    seed: int | None = 0

    def __post_init__(self) -> None:
        for key in ("save_every", "keep", "log_every"):
            value = getattr(self, key)
            require(1 <= value < 1 << 31, key, value, "at least 1")
        first, last = self.profile or (1, 1)
        require(1 <= first <= last, "profile", self.profile, "a first step from 1, and a last")
        try:
            floating = jnp.issubdtype(jnp.dtype(self.dtype), jnp.floating)
        except (TypeError, ValueError):
            floating = False
        require(floating, "dtype", self.dtype, "bfloat16, float16 or float32")


def fit(
    model: Model,
    data: Data,
    groups: Sequence[Group],
    optim: Optim,
    folder: Path,
    *,
    config: Mapping[str, object] | None = None,
    options: Options = Options(),
    trackers: Sequence[Tracker] = (),
) -> Model:
    """Trains a model for `optim.steps` steps; a folder with states goes on from the newest.

    Args:
        model: any; trained in place.
        data: its batches.
        groups: what trains.
        optim: steps, rates, clipping and the rest of the optimizer.
        folder: of this stage: states, metrics.jsonl, profile.
        config: JSON values; a folder of a run with others is refused.
        options: how it runs.
        trackers: more that take the metrics, on process 0.

    Returns:
        The model itself, trained; parameters in the dtypes that they had.

    Raises:
        InputError: the folder's states are of another config, a group names nothing, a loss is not
            finite, a step has nothing to learn, the data end, or processes disagree or have
            folders of their own.
        Stopped: on SIGTERM, SIGHUP or Ctrl-C, once the state is on disk; see
            `vfjax.train.stop.StopSignals` for when there is none.
    """
    with agreeing("fit", folder=folder) as facts:
        same = {"groups": groups, "optim": optim, "options": options, **(config or {})}
        facts |= {key: str(value) for key, value in same.items()}
    mesh = mesh_of(nnx.state(model))
    dtypes = jax.tree.map(lambda x: x.dtype, nnx.state(model))
    model.llm.remat = options.remat
    model.llm.stream = by_token(mesh) if options.sequence and mesh is not None else None
    graph, params, frozen = split(model, groups)
    tx = optim.build(groups)
    state = init(params, tx, mesh)
    del params  # the state has its arrays
    step = make_step(graph, tx, state, dtype=options.dtype, mesh=mesh, seed=options.seed)
    states = Checkpoints(folder / "states", config or {}, keep=options.keep)
    with (
        resumes(states.saved),
        states,
        StopSignals() as stop,
        contextlib.ExitStack() as stack,
    ):
        done = states.step or 0
        if done:
            state = states.restore(state)
            stop.saves()
        pending = _Pending(folder, done, optim, groups, options.log_every, trackers)
        stack.callback(pending.close)
        profile = _Profile(folder / "profile", options.profile)
        stack.callback(profile.stop)
        programs, stops = Programs(step, stop), False
        for batches in itertools.islice(data(done), max(optim.steps - done, 0)):
            profile.at(done + 1)
            batches = put(batches, mesh)
            program = programs.find(state, frozen, batches)
            if program is not None:
                flops = pending.flops(graph, state.params, frozen, batches)
                state, metrics = program(state, frozen, batches)
                done += 1
                pending.add(done, metrics, flops)
            stops = program is None or stop.asked(done)
            if stops or done == optim.steps or done % options.save_every == 0:
                pending.flush()  # a loss that is not finite is found before it is saved
                pending.publish()
                if done != states.step:
                    states.save(done, state)
            if stops:
                break
        states.wait()
        if stops:
            raise Stopped(done)
        if done < optim.steps:
            raise InputError(
                "data",
                found=f"an end after step {done}",
                expected=f"batches for {counted(optim.steps, 'step')}",
                fix="repeat the data, or train fewer steps",
            )
    nnx.update(model, state.params, frozen)
    model.llm.remat, model.llm.stream = False, None
    nnx.update(model, jax.tree.map(lambda x, to: x.astype(to), nnx.state(model), dtypes))
    return model


def put(batches: Batch, mesh: Mesh | None) -> Batch:
    """This process's share on the mesh, with an axis of parts, the second over the `row_axes`.

    Raises:
        InputError: several processes, and no mesh, an axis that the mesh's `row_axes` do not
            divide, or a mesh on which a process's rows are not a block.
    """
    if mesh is None and jax.process_count() > 1:
        raise InputError(
            "mesh",
            found=f"none, and {jax.process_count()} processes",
            expected="one of all their devices",
            fix="load the model onto vfjax.sharding.make_mesh(...)",
        )
    if batches.tokens.ndim == 2:
        batches = jax.tree.map(lambda x: x[None], batches)
    if mesh is None:
        return jax.device_put(batches)
    processes, over = jax.process_count(), row_shards(mesh)
    owners = [{device.process_index for device in row} for row in mesh.devices.reshape(over, -1)]
    if processes > 1 and owners != [{i * processes // over} for i in range(over)]:
        raise InputError(
            "mesh",
            found=f"rows of a batch on processes {[sorted(own) for own in owners]}",
            expected=f"a block of them on each of the {processes} processes, in order",
            fix="make it by vfjax.sharding.make_mesh, with data a multiple of the processes, or a "
            "divisor whose product with fsdp is one",
        )

    def one(x: np.ndarray) -> jax.Array:
        shape = (x.shape[0], x.shape[1] * processes, *x.shape[2:])
        divides = shape[1] % over == 0
        if processes > 1 and not divides:
            raise InputError(
                "batch",
                found=f"{shape[1]} rows or pictures for {over} groups of devices",
                expected="a multiple of it",
                fix="choose another batch or mesh, and `multiple` of vfjax.data.Batches as many as "
                "a process has groups",
            )
        spec = PartitionSpec(None, row_axes(mesh)) if divides else PartitionSpec()
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_process_local_data(sharding, np.asarray(x), shape)

    return jax.tree.map(one, batches)


class _Profile:
    """A profiler's trace from one step to another; none if the run starts behind the first."""

    def __init__(self, folder: Path, steps: tuple[int, int] | None):
        self.folder, self.steps, self.tracing = folder, steps, False

    def at(self, step: int) -> None:
        if self.steps and step == self.steps[0]:
            jax.profiler.start_trace(self.folder)
            self.tracing = True
        if self.steps and step == self.steps[1] + 1:
            self.stop()

    def stop(self) -> None:
        if self.tracing:
            jax.profiler.stop_trace()
        self.tracing = False


class _Pending:
    """Metrics on their way from the devices to the record; one step late, so that none waits."""

    def __init__(
        self,
        folder: Path,
        done: int,
        optim: Optim,
        groups: Sequence[Group],
        every: int,
        trackers: Sequence[Tracker],
    ):
        self.rate, self.every = optim.rate(groups[0].learning_rate), every
        self.rows: list[tuple[int, dict[str, jax.Array], float | None]] = []
        self.known: dict[tuple[tuple[int, ...], ...], float] = {}
        self.record = None
        if jax.process_index() == 0:
            self.record = Record(folder, done, optim.steps, trackers=trackers)

    def flops(
        self, graph: nnx.GraphDef, params: nnx.State, frozen: nnx.State, batches: Batch
    ) -> float | None:
        """Of a step, counted once for each shape of its batches; None if nobody asks."""
        if self.record is None or self.record.peak is None:
            return None
        shapes = tuple(x.shape for x in jax.tree.leaves(batches))
        if shapes not in self.known:
            self.known[shapes] = step_flops(graph, params, frozen, batches)
        return self.known[shapes]

    def add(self, step: int, metrics: dict[str, jax.Array], flops: float | None) -> None:
        self.rows.append((step, metrics, flops))
        if len(self.rows) > self.every:
            self.flush(len(self.rows) - 1)

    def flush(self, count: int | None = None) -> None:
        rows = self.rows[:count]
        self.rows = self.rows[len(rows) :]
        if not rows:
            return
        steps = [step for step, *_ in rows]
        rates = np.broadcast_to(self.rate(jnp.asarray(steps) - 1), len(steps))
        values = jax.device_get([metrics for _, metrics, _ in rows])
        for step, row in zip(steps, values, strict=True):
            _check(step, row)
        if self.record is not None:
            known = [flops for *_, flops in rows if flops is not None]
            numbers = [{k: float(x) for k, x in row.items()} for row in values]
            numbers = [
                {"step": step, **row, "learning_rate": float(rate)}
                for step, row, rate in zip(steps, numbers, rates, strict=True)
            ]
            self.record.write(numbers, sum(known) if known else None)

    def publish(self) -> None:
        if self.record is not None:
            publish(self.record.path)

    def close(self) -> None:
        if self.record is not None:
            self.record.close()
            self.publish()


def _check(step: int, row: Mapping[str, float]) -> None:
    """Raises InputError for a step that nothing can be learnt from."""
    if not math.isfinite(row["loss"]) or not math.isfinite(row["grad_norm"]):
        raise InputError(
            f"step {step}",
            found=f"loss {row['loss']}, gradient norm {row['grad_norm']}",
            expected="finite numbers",
            fix="lower the learning rate, or look at the data; earlier states are kept",
        )
    if not row["answers"]:
        raise InputError(
            f"step {step}",
            found="no token to learn",
            expected="an answer in some row",
            fix="raise the length that rows are cut to, or look at the data",
        )
