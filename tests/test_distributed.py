"""Two processes of four devices each, joined by jax.distributed, against one device."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import converters
import experiments.configs.train as configs_train
import experiments.tasks.train as task
import vfjax
from tests import checkpoints
from tests.checkpoints import make_llama, upstream_llava_folder
from tests.distributed_worker import make_batch

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"num_hidden_layers": 2}
TIMEOUT = 300
"""Seconds after which a process that still waits for the other is ended."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("distributed") / "llava"
    upstream_llava_folder(path, llm=make_llama(0, **SMALL), weights="safetensors", vision=SMALL)
    return path


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def run_together(commands: Sequence[Sequence[str]], envs: Sequence[Mapping[str, str]]) -> list[str]:
    """Stdout of each process; fails with the output of all of them if one fails or hangs."""
    common = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }

    def run(command: Sequence[str], env: Mapping[str, str]) -> tuple[object, str, str]:
        try:
            done = subprocess.run(
                command, env={**common, **env}, capture_output=True, text=True, timeout=TIMEOUT
            )
            return done.returncode, done.stdout, done.stderr
        except subprocess.TimeoutExpired as error:
            return error, str(error.stdout), str(error.stderr)

    with ThreadPoolExecutor(len(commands)) as pool:
        done = list(pool.map(run, commands, envs))
    for code, *_ in done:
        assert code == 0, "\n".join(str(x) for process in done for x in process)
    return [out for _, out, _ in done]


def test_two_processes_equal_one(folder, tmp_path) -> None:
    """The same tokens, and the same bytes of an export that process 0 writes."""
    worker = [sys.executable, str(ROOT / "tests" / "distributed_worker.py")]
    address = f"localhost:{free_port()}"
    commands = [[*worker, address, "2", str(i), str(folder), str(tmp_path)] for i in range(2)]
    run_together(commands, [{}, {}])

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
    shared = {
        "VFJAX_DISTRIBUTED": "1",
        "JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}",
        "JAX_NUM_PROCESSES": "2",
    }
    printed = run_together([command] * 2, [{**shared, "JAX_PROCESS_ID": str(i)} for i in range(2)])
    model, processor = converters.load(folder)
    batch = processor(None, [processor.chat("What?", images=0)])
    (answer,) = vfjax.generate(model, processor, batch, max_new_tokens=8)
    assert printed == [f"{answer}\n", ""]


def test_training_in_two_processes_equals_one(tmp_path) -> None:
    """The same losses and the same trained folder within 1e-5, of which process 0 writes all."""
    checkpoints.llama_folder(tmp_path / "llm", 1, num_hidden_layers=1)
    checkpoints.tower_folder(tmp_path / "clip", "clip", 2, num_hidden_layers=2)
    pictures, rows = np.random.default_rng(0).integers(0, 256, (8, 30, 40, 3), np.uint8), []
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
        turns = [("human", f"<image>\nWhat is {i}?"), ("gpt", "a " * (i + 1))]
        turns = [{"from": name, "value": value} for name, value in turns]
        rows.append({"id": str(i), "image": f"{i}.png", "conversations": turns})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    changes = {
        "llm": str(tmp_path / "llm"),
        "encoder": str(tmp_path / "clip"),
        "dtype": "float32",
        "mesh": (4, 2),
        "report": False,
    }
    for name, steps in (("align", 1), ("tune", 2)):
        stage = {"data": (f"{tmp_path / 'rows.json'}={tmp_path}",), "batch": 4, "steps": steps}
        stage |= {"length": 400, "template": "vicuna_v1"}
        changes |= {f"stages.{name}.{key}": value for key, value in stage.items()}
    config = configs_train.get_config()
    config.update_from_flattened_dict(changes)
    task.run(config, tmp_path / "one")

    command = [sys.executable, str(ROOT / "experiments" / "run.py")]
    command += [f"--config={ROOT}/experiments/configs/train.py", f"--workdir={tmp_path / 'two'}"]
    command += [f"--config.{key}={value}" for key, value in changes.items()]
    shared = {
        "VFJAX_DISTRIBUTED": "1",
        "JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}",
        "JAX_NUM_PROCESSES": "2",
    }
    printed = run_together([command] * 2, [{**shared, "JAX_PROCESS_ID": str(i)} for i in range(2)])
    assert "trained" in printed[0] and not printed[1]
    rows = [
        [json.loads(line) for line in (tmp_path / run / "tune" / "metrics.jsonl").open()]
        for run in ("one", "two")
    ]
    losses = [[row["loss"] for row in run] for run in rows]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    models = [converters.load(tmp_path / run / "tune" / "model")[0] for run in ("one", "two")]
    for a, b in zip(*(jax.tree.leaves(nnx.state(model)) for model in models), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
