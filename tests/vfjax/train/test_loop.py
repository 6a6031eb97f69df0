"""The loop: what it leaves on disk, where it goes on, when it refuses to."""

import itertools
import json
import os
import signal
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

import converters
from tests.checkpoints import make_llama, upstream_llava_folder
from tests.vfjax.train.test_step import GROUPS, batch_of
from vfjax import Batch, InputError
from vfjax.sharding import AXES
from vfjax.train import Optim, Options, Stopped, fit
from vfjax.train import record as records

STEPS = 6
OPTIONS = Options(dtype=jnp.float32, save_every=3, log_every=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("loop") / "llava"
    vision = {"num_hidden_layers": 2}
    upstream_llava_folder(path, llm=make_llama(1), weights="safetensors", vision=vision)
    return path


def mesh_of(data: int, fsdp: int, model: int):
    devices = jax.devices()[: data * fsdp * model]
    types = (AxisType.Auto,) * 3
    return jax.make_mesh((data, fsdp, model), AXES, axis_types=types, devices=devices)


class Data:
    """Batches by step; `at` a step something happens before it is handed out."""

    def __init__(self, processor, at: int = -1, happens=lambda: None, change=lambda batch: batch):
        self.processor, self.at, self.happens, self.change = processor, at, happens, change

    def __call__(self, start: int) -> Iterator[Batch]:
        for step in itertools.count(start):
            if step == self.at:
                self.happens()
            yield self.change(batch_of(self.processor, step))


def run(folder, workdir, mesh=None, *, steps=STEPS, options=OPTIONS, config=None, **data):
    model, processor = converters.load(folder, mesh=mesh, dtype="float32")
    return fit(
        model, Data(processor, **data), GROUPS["projector"], Optim(steps), workdir,
        options=options, config=config,
    )  # fmt: skip


def losses(workdir) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in records.read(workdir / "metrics.jsonl")]


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, run(folder, workdir)


def same(a, b) -> bool:
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, nnx.state(a), nnx.state(b))))


class Killed(Exception):
    """As by kill -9: nothing of the loop's own runs any more."""


def kill() -> None:
    raise Killed


def test_goes_on_from_the_last_state(folder, whole, tmp_path) -> None:
    with pytest.raises(Killed):
        run(folder, tmp_path, at=4, happens=kill)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # cut off by a kill
    model = run(folder, tmp_path)
    assert losses(tmp_path) == losses(whole[0])
    assert same(model, whole[1])
    assert same(run(folder, tmp_path), whole[1])  # all is done; nothing moves


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves(folder, whole, tmp_path, number) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match="1"):
        run(folder, tmp_path, at=1, happens=lambda: os.kill(os.getpid(), number))
    assert signal.getsignal(number) == before
    model = run(folder, tmp_path, at=0, happens=kill)  # which would be asked for at a new start
    assert losses(tmp_path) == losses(whole[0])
    assert same(model, whole[1])


def test_eight_devices_then_four(folder, whole, tmp_path) -> None:
    with pytest.raises(Killed):
        run(folder, tmp_path, mesh_of(2, 2, 2), at=4, happens=kill)
    model = run(folder, tmp_path, mesh_of(2, 1, 2))
    found, expected = (np.array([x for _, x in losses(d)]) for d in (tmp_path, whole[0]))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for a, b in zip(*(jax.tree.leaves(nnx.state(m)) for m in (model, whole[1])), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_another_config_is_refused(folder, whole) -> None:
    with pytest.raises(InputError) as error:
        run(folder, whole[0], config={"seed": 1})
    assert "config.json: seed: found null, expected 1, as in this run" in str(error.value)
    assert "the folder is of a version of vfjax without this key" in str(error.value)


def test_states_of_other_parameters_are_refused(folder, whole) -> None:
    model, processor = converters.load(folder, dtype="float32")
    with pytest.raises(InputError, match="found a state that does not fit"):
        fit(model, Data(processor), GROUPS["full"], Optim(STEPS + 1), whole[0], options=OPTIONS)


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(folder, tmp_path) -> None:
    def broken(batch: Batch) -> Batch:
        batch.images["clip"].given.pixels[:] = np.nan
        return batch

    with pytest.raises(InputError, match=r"step 1: found loss nan.*expected finite numbers"):
        run(folder, tmp_path, change=broken)
    assert json.loads((tmp_path / "states" / "config.json").read_text()) == {}
    assert not [p for p in (tmp_path / "states").iterdir() if p.is_dir()]


def test_batches_without_an_answer_are_refused(folder, tmp_path) -> None:
    def silent(batch: Batch) -> Batch:
        batch.labels[:] = -100
        return batch

    with pytest.raises(InputError, match="step 1: found no token to learn"):
        run(folder, tmp_path, change=silent)


def test_data_that_end_early_are_said(folder, tmp_path) -> None:
    model, processor = converters.load(folder, dtype="float32")
    with pytest.raises(InputError, match="data: found an end after step 2"):
        fit(
            model, lambda start: itertools.islice(Data(processor)(start), 2), GROUPS["projector"],
            Optim(STEPS), tmp_path, options=OPTIONS,
        )  # fmt: skip


def test_report(folder, whole, tmp_path) -> None:
    records.report(tmp_path / "curves.png", {"align": whole[0], "tune": whole[0]})
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
