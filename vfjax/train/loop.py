"""The loop of one stage: read, step, record, save; goes on where it was stopped."""

import contextlib
import dataclasses
import itertools
import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vfjax.errors import InputError
from vfjax.model import Batch, Model
from vfjax.sharding import mesh_of
from vfjax.train import flops
from vfjax.train.checkpoint import Checkpoints
from vfjax.train.optim import Group, Optim
from vfjax.train.record import Record, Tracker
from vfjax.train.step import init, make_step, split

Data = Callable[[int], Iterator[Batch]]
"""Step -> this process's batches from there on, those of several accumulated parts with a leading
axis of them (`vfjax.data.Batches.to_iter`). The step alone decides what they are."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How a stage runs.

    Attributes:
        dtype: of the computation of what trains; masters are float32. What is frozen keeps the
            dtype it was loaded in.
        remat: computes each LLM block again in the backward pass instead of keeping it.
        save_every: steps between two states.
        keep: states that are kept.
        log_every: steps between two looks at the metrics.
        profile: (first, last) step of a profiler's trace; None takes none.
    """

    dtype: Any = jnp.bfloat16
    remat: bool = True
    save_every: int = 500
    keep: int = 2
    log_every: int = 10
    profile: tuple[int, int] | None = None


class Stopped(Exception):
    """The run was asked to end (SIGTERM) and has saved its state; the step is its argument."""


def fit(
    model: Model,
    data: Data,
    groups: Sequence[Group],
    optim: Optim,
    folder: Path,
    *,
    config: Mapping[str, Any] | None = None,
    options: Options = Options(),
    trackers: Sequence[Tracker] = (),
) -> Model:
    """Trains a model for `optim.steps` steps; a folder with states goes on from the newest.

    Args:
        model: any; used up.
        data: its batches.
        groups: what trains.
        optim: how.
        folder: of this stage: states, metrics.jsonl, profile.
        config: JSON values; a folder of a run with others is refused.
        options: how it runs.
        trackers: more that take the metrics, on process 0.

    Returns:
        The trained model, parameters in the model's dtypes.

    Raises:
        InputError: the folder's states are of another config, a group names nothing, or the loss
            is not finite.
        Stopped: on SIGTERM, once the state is on disk.
    """
    mesh = mesh_of(nnx.state(model))
    dtypes = jax.tree.map(lambda x: x.dtype, nnx.state(model))
    model.llm.remat = options.remat
    graph, params, frozen = split(model, groups)
    del model
    tx = optim.build(groups)
    state = init(params, tx, mesh)
    step = make_step(graph, tx, state, dtype=options.dtype, mesh=mesh)
    states = Checkpoints(folder / "states", config or {}, keep=options.keep)
    with states, _asked_to_stop() as asked, contextlib.ExitStack() as stack:
        done = states.step or 0
        if done:
            state = states.restore(state)
        rows = _Rows(folder, done, optim, groups, options.log_every, trackers)
        stack.callback(rows.close)
        for batches in itertools.islice(data(done), optim.steps - done):
            if options.profile and done + 1 == options.profile[0]:
                jax.profiler.start_trace(folder / "profile")
            if not rows.flops:
                rows.flops = _flops(params, frozen, batches)
            state, metrics = step(state, frozen, put(batches, mesh))
            done += 1
            rows.add(done, metrics)
            if options.profile and done == options.profile[1]:
                jax.block_until_ready(metrics)
                jax.profiler.stop_trace()
            stop = asked(done)
            if stop or done == optim.steps or done % options.save_every == 0:
                rows.flush()  # a loss that is not finite is found before it is saved
                states.save(done, state)
            if stop and done < optim.steps:
                states.wait()
                raise Stopped(done)
        states.wait()
    trained = nnx.merge(graph, state.params, frozen)
    trained.llm.remat = False
    nnx.update(trained, jax.tree.map(lambda x, to: x.astype(to), nnx.state(trained), dtypes))
    return trained


def put(batches: Batch, mesh: Mesh | None) -> Batch:
    """This process's share on the mesh, with an axis of parts, the second axis over `data`.

    Raises:
        InputError: several processes, and an axis that the mesh's `data` does not divide.
    """
    if batches.tokens.ndim == 2:
        batches = jax.tree.map(lambda x: x[None], batches)
    if mesh is None:
        return jax.device_put(batches)
    processes, over = jax.process_count(), mesh.shape["data"]

    def one(x: np.ndarray) -> jax.Array:
        shape = (x.shape[0], x.shape[1] * processes, *x.shape[2:])
        divides = shape[1] % over == 0
        if processes > 1 and not (divides and over % processes == 0):
            raise InputError(
                "batch",
                found=f"{shape[1]} rows or pictures on a data axis of {over} devices",
                expected=f"multiples of it, and of {processes} processes",
                fix="choose another batch or mesh",
            )
        spec = PartitionSpec(None, "data") if divides else PartitionSpec()
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_process_local_data(sharding, np.asarray(x), shape)

    return jax.tree.map(one, batches)


class _Rows:
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
        self.rate, self.every, self.flops = optim.rate(groups[0].learning_rate), every, 0.0
        self.waiting: list[tuple[int, dict[str, jax.Array]]] = []
        self.record = None
        if jax.process_index() == 0:
            self.record = Record(folder, done, optim.steps, trackers=trackers)

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        self.waiting.append((step, metrics))
        if len(self.waiting) > self.every:
            self.flush(len(self.waiting) - 1)

    def flush(self, count: int | None = None) -> None:
        rows, self.waiting = self.waiting[:count], self.waiting[len(self.waiting[:count]) :]
        if not rows:
            return
        steps = [step for step, _ in rows]
        rates = np.broadcast_to(self.rate(jnp.asarray(steps) - 1), len(steps))
        values = jax.device_get([metrics for _, metrics in rows])
        for step, row in zip(steps, values, strict=True):
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
        if self.record is not None:
            self.record.write(
                [
                    {
                        "step": step,
                        **{key: float(x) for key, x in row.items()},
                        "learning_rate": float(rate),
                    }
                    for step, row, rate in zip(steps, values, rates, strict=True)
                ],
                flops=self.flops,
            )

    def close(self) -> None:
        if self.record is not None:
            self.record.close()


def _flops(params: nnx.State, frozen: nnx.State, batches: Batch) -> float:
    """Of a step of all processes."""
    views = {}
    for name, inputs in batches.images.items():
        sizes = [x.size // 3 for key, x in inputs.items() if key.startswith("pixels")]
        views[name] = max(sizes)
    return jax.process_count() * flops.step_flops(params, frozen, batches.tokens.size, views)


@contextlib.contextmanager
def _asked_to_stop() -> Iterator[Callable[[int], bool]]:
    """Yields step -> whether SIGTERM came; on several processes, at a step that all agree on."""
    if jax.process_count() > 1:  # JAX's coordination service has its own handler
        yield multihost_utils.reached_preemption_sync_point
        return
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        yield lambda step: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)
