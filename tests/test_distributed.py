"""Several processes joined by jax.distributed, on CPU devices, against one process."""

import contextlib
import json
import math
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import converters
import experiments.configs.train as configs_train
import experiments.tasks.train as task
import vfjax
from converters.load import abstract, check, model_config
from tests import checkpoints
from tests.checkpoints import llama_folder, make_llama, tuned, upstream_llava_folder
from tests.distributed_chain import chain
from tests.distributed_worker import make_batch
from vfjax.sharding import make_mesh, param_sharding

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"num_hidden_layers": 2}
TIMEOUT = 300
"""Seconds after which a process that still waits for another is ended."""

PATIENT = 120
"""The same for processes that have next to nothing to do; JAX alone would let them wait for 300."""

DEVICES = 8
"""Of all processes together."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("distributed") / "llava"
    upstream_llava_folder(path, llm=make_llama(0, **SMALL), weights="safetensors", vision=SMALL)
    return path


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


@contextlib.contextmanager
def started(
    commands: Sequence[Sequence[str]],
    envs: Sequence[Mapping[str, str]],
    cwd: Sequence[Path] = (),
) -> Iterator[list[subprocess.Popen[str]]]:
    """The processes, which are ended with the block."""
    devices = f"--xla_force_host_platform_device_count={DEVICES // len(commands)}"
    common = {
        **os.environ,
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {devices}",  # the last of each counts
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with contextlib.ExitStack() as stack:
        processes = []
        for i, (command, env) in enumerate(zip(commands, envs, strict=True)):
            own = {"env": {**common, **env}, "cwd": cwd[i] if cwd else None}
            process = stack.enter_context(subprocess.Popen(command, **own, **pipes))
            stack.callback(process.kill)
            processes.append(process)
        yield processes


def run_together(commands: Sequence[Sequence[str]], envs: Sequence[Mapping[str, str]]) -> list[str]:
    """Stdout of each process; fails with the output of all of them if one fails or hangs."""
    with started(commands, envs) as processes:
        try:
            said = [process.communicate(timeout=TIMEOUT) for process in processes]
        except subprocess.TimeoutExpired:
            for process in processes:
                process.kill()
            said = [process.communicate() for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(map("".join, said))
    return [out for out, _ in said]


def run_workers(name: str, count: int, *args: Path) -> None:
    """Runs a script of this folder as `count` processes."""
    worker, address = [sys.executable, str(ROOT / "tests" / name)], f"localhost:{free_port()}"
    commands = [[*worker, address, str(count), str(i), *map(str, args)] for i in range(count)]
    run_together(commands, [{}] * count)


def two_hosts() -> list[dict[str, str]]:
    """The environments in which `experiments/run.py` is started as two processes."""
    shared = {
        "VFJAX_DISTRIBUTED": "1",
        "JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}",
        "JAX_NUM_PROCESSES": "2",
    }
    return [{**shared, "JAX_PROCESS_ID": str(i)} for i in range(2)]


def test_two_processes_equal_one(folder, tmp_path) -> None:
    """The same tokens, and the same bytes of an export that process 0 writes."""
    run_workers("distributed_worker.py", 2, folder, tmp_path)
    model, processor = converters.load(folder)
    expected = vfjax.generate_ids(model, make_batch(processor), max_new_tokens=8)
    for i in range(2):
        assert json.loads((tmp_path / f"tokens-{i}.json").read_text()) == expected
    converters.export(model, tmp_path / "single")
    files = [
        {p.relative_to(tmp_path / out): p.read_bytes() for p in (tmp_path / out).rglob("*.*")}
        for out in ("single", "export")
    ]
    assert Path("model.safetensors") in files[0]
    assert files[0] == files[1]


def test_four_processes_equal_one(tmp_path) -> None:
    """They fuse, load, generate and train a step: the same tokens, the same loss within 1e-5.

    And a process that has a quarter of a tensor's rows reads no others.
    """
    base = make_llama(0, num_hidden_layers=1)
    llama_folder(tmp_path / "base", llm=base)
    for i, name in enumerate("ab"):
        member: dict[str, Any] = {"llm": tuned(base, i), "weights": "safetensors", "vision": SMALL}
        upstream_llava_folder(tmp_path / name, 10 * i, **member)
    write_rows(tmp_path)
    for name in ("one", "four"):
        (tmp_path / name).mkdir()
    run_workers("distributed_chain.py", 4, tmp_path, tmp_path / "four")
    expected = chain(tmp_path, tmp_path / "one")
    for i in range(4):
        assert json.loads((tmp_path / "four" / f"tokens-{i}.json").read_text()) == expected
        read = json.loads((tmp_path / "four" / f"read-{i}.json").read_text())
        assert read == quarter_of_rows(tmp_path / "four" / "fused")
    (one,), (four,) = (losses(tmp_path / name / "align") for name in ("one", "four"))
    assert four == pytest.approx(one, rel=1e-5)


def quarter_of_rows(folder: Path) -> int:
    """Bytes of a model's tensors: a quarter of those whose rows a mesh's `model` axis shares."""
    source = converters.open_source(folder)
    _, params = abstract(model_config(source).build)
    total, mesh = 0, make_mesh(model=DEVICES)
    for part, rules in check(source, params).items():
        for name, rule in rules.items():
            tensor = source.parts[part][rule.source]
            axis = rule.perm.index(0) if rule.perm else 0
            shared = param_sharding(name, params[name], mesh).spec[axis] == "model"
            total += math.prod(tensor.shape) * tensor.dtype.itemsize // (4 if shared else 1)
    return total


def test_the_command_line_runs_as_two_processes(folder) -> None:
    """Process 0 alone prints the answer."""
    command = [
        sys.executable,
        str(ROOT / "experiments" / "run.py"),
        f"--config={ROOT}/experiments/configs/generate.py",
        f"--config.model={folder}",
        "--config.prompt=What?",
        "--config.max_new_tokens=8",
        "--config.mesh=(4, 2)",
    ]
    printed = run_together([command] * 2, two_hosts())
    model, processor = converters.load(folder)
    batch = processor(None, [processor.chat("What?", images=0)])
    (answer,) = vfjax.generate(model, processor, batch, max_new_tokens=8)
    assert printed == [f"{answer}\n", ""]


def test_a_process_that_fails_alone_ends_all(folder, tmp_path) -> None:
    """With its own line; the other one says it, too."""
    command = [sys.executable, str(ROOT / "experiments" / "run.py")]
    command += [f"--config={ROOT}/experiments/configs/generate.py", "--config.prompt=What?"]
    command += ["--config.mesh=(1, 8)", "--config.model=llava"]
    (tmp_path / "llava").symlink_to(folder)
    with started([command] * 2, two_hosts(), cwd=[tmp_path, ROOT]) as processes:
        _, own = processes[1].communicate(timeout=PATIENT)
        _, other = processes[0].communicate(timeout=PATIENT)
    assert [process.returncode for process in processes] == [2, 2]
    assert own == "llava: found no folder, expected a checkpoint; check the path\n"
    assert other.startswith(f"process 1: found an end ({own.strip()}), expected ")


def write_rows(folder: Path) -> None:
    """`rows.json`, eight conversations, and their pictures."""
    pictures, rows = np.random.default_rng(0).integers(0, 256, (8, 30, 40, 3), np.uint8), []
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{i}.png")
        turns = [("human", f"<image>\nWhat is {i}?"), ("gpt", "a " * (i + 1))]
        turns = [{"from": name, "value": value} for name, value in turns]
        rows.append({"id": str(i), "image": f"{i}.png", "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows))


def losses(stage: Path) -> list[float]:
    """Of each step."""
    return [json.loads(line)["loss"] for line in (stage / "metrics.jsonl").open()]


def wait_for_state(states: Path) -> None:
    """Returns when a folder has a state of a step that it does not have yet."""

    def found() -> set[str]:
        return {path.name for path in states.glob("*") if path.name.isdigit()}

    before, end = found(), time.monotonic() + TIMEOUT
    while not found() - before:
        assert time.monotonic() < end, "no state was saved"
        time.sleep(0.02)


NOISE = "W0101 slow.cc:1] Compiling takes long\n"
UNKNOWN = "E0101 coordination_service.cc:1] No sense\nat all\n"
LOST = (
    "E0101 coordination_service_agent.cc:1] Polled an error\n"
    "F0101 client.h:80] The following tasks are unhealthy (stopped sending heartbeats):\n"
    "12\n*** Check failure stack trace: ***\n"
)
LINE = (
    "process 12: found no sign of life, expected all processes to run; see what it said, "
    "then start the same command on all hosts again\n"
)
LATE = (
    "W0101 coordination_service.cc:388] [24] ConnectAfterBarrierPasses: DEADLINE_EXCEEDED: Barrier "
    "timed out. Id: [Init]Wait_for_all_tasks_to_register::0. This usually happens because a task\n"
    "# of tasks that reached the barrier: 2/4.\n"
    "The first task at the barrier: 0. Some timed out task names:\n12\n3\n [type.googleapis.com/\n"
)
ALONE = (
    "F0101 client.h:80] Terminating process because the JAX distributed service detected fatal "
    "errors. absl::Status: DEADLINE_EXCEEDED: Deadline Exceeded\n\n"
    "RPC: /xla.coordination.CoordinationService/RegisterTask\n*** Check failure stack trace: ***\n"
)
PORT = (
    "E0101 add_port.cc:83] Failed to add port to server: No address added out of total 1 resolved "
    "for '[::]:9933'\nFatal Python error: Segmentation fault\n"
)
AGAIN = "start the same command on all hosts, or have VFJAX_INITIALIZATION_TIMEOUT wait longer\n"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("[Gloo] Rank 0 is connected to 1 peer ranks.\n" + NOISE, NOISE),
        (NOISE + UNKNOWN, NOISE + UNKNOWN),
        (NOISE + LOST, NOISE + LINE),
        (LATE, "process 3, 12: found no start in time, expected all processes to start; " + AGAIN),
        (
            ALONE,
            "process 0: found no word from it that all have started, expected it in time; " + AGAIN,
        ),
        (
            PORT,
            "JAX_COORDINATOR_ADDRESS: found [::]:9933, which process 0 cannot listen at, "
            "expected a free port; choose another\n",
        ),
    ],
)
def test_what_native_code_says(said: str, expected: str) -> None:
    """Is passed on, but for pages on processes that are lost or do not come, each one line."""
    stderr_filter = [sys.executable, str(ROOT / "experiments" / "stderr_filter.py")]
    done = subprocess.run(stderr_filter, input=said, stderr=subprocess.PIPE, text=True, check=True)
    assert done.stderr == expected


def test_training_in_two_processes_equals_one(tmp_path) -> None:
    """Though one is killed, then the other: the rest ends, names it, and the same command goes on.

    The same losses and the same trained folder within 1e-5, of which process 0 writes all.
    """
    llama_folder(tmp_path / "llm", 1, num_hidden_layers=1)
    checkpoints.tower_folder(tmp_path / "clip", "clip", 2, num_hidden_layers=2)
    write_rows(tmp_path)
    changes = {
        "llm": str(tmp_path / "llm"),
        "encoder": str(tmp_path / "clip"),
        "dtype": "float32",
        "mesh": (4, 2),
        "save_every": 4,
        "report": False,
    }
    for name, steps in (("align", 1), ("tune", 30)):
        stage = {"data": (f"{tmp_path / 'rows.json'}={tmp_path}",), "batch": 4, "steps": steps}
        stage |= {"length": 400, "template": "vicuna_v1"}
        changes |= {f"stages.{name}.{key}": value for key, value in stage.items()}
    config = configs_train.get_config()
    config.update_from_flattened_dict(changes)
    task.run(config, tmp_path / "one")

    two = tmp_path / "two"
    command = [sys.executable, str(ROOT / "experiments" / "run.py")]
    command += [f"--config={ROOT}/experiments/configs/train.py", f"--workdir={two}"]
    command += [f"--config.{key}={value}" for key, value in changes.items()]
    for lost in (1, 0):
        with started([command] * 2, two_hosts()) as processes:
            wait_for_state(two / "tune" / "states")
            processes[lost].kill()
            _, said = processes[1 - lost].communicate(timeout=TIMEOUT)
        assert processes[1 - lost].returncode
        assert re.search(rf"^process {lost}: found no sign of life, expected ", said, re.M), said
        assert not (two / "tune" / "model").exists()
    printed = run_together([command] * 2, two_hosts())
    assert "trained" in printed[0] and not printed[1]
    np.testing.assert_allclose(losses(two / "tune"), losses(tmp_path / "one" / "tune"), rtol=1e-5)
    models = [converters.load(tmp_path / run / "tune" / "model")[0] for run in ("one", "two")]
    for a, b in zip(*(jax.tree.leaves(nnx.state(model)) for model in models), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
