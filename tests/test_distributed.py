"""Two processes of four devices each, joined by jax.distributed, against one device."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import converters
import vfjax
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
