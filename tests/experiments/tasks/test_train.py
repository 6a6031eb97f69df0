"""Training by the command line: stages, the exported folder, kills."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import converters
from tests import checkpoints

ROOT = Path(__file__).resolve().parents[3]
KILLS = int(os.environ.get("VFJAX_KILLS", "1"))
STEPS = 12


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """An LLM, a CLIP tower, twelve conversations about as many pictures, all in one bucket."""
    root = tmp_path_factory.mktemp("train")
    checkpoints.llama_folder(root / "llm", 1)
    checkpoints.tower_folder(root / "clip", "clip", 2)
    (root / "pictures").mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for i in range(12):
        turns = [
            {"from": "human", "value": f"<image>\nWhat is number {i}?"},
            {"from": "gpt", "value": ("red", "blue", "none")[i % 3]},
        ]
        rows.append({"id": str(i), "image": f"{i}.png", "conversations": turns})
        picture = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(picture).save(root / "pictures" / f"{i}.png")
    (root / "rows.json").write_text(json.dumps(rows))
    return root


def command(project: Path, workdir: Path, *more: str) -> list[str]:
    stages = [
        flag
        for name in ("align", "tune")
        for flag in (
            f"--config.stages.{name}.data=('{project / 'rows.json'}={project / 'pictures'}',)",
            f"--config.stages.{name}.batch=4",
            f"--config.stages.{name}.template=vicuna_v1",
            f"--config.stages.{name}.length=400",
            f"--config.stages.{name}.steps={STEPS if name == 'tune' else 2}",
        )
    ]
    return [
        sys.executable,
        "experiments/run.py",
        "--config=experiments/configs/train.py",
        f"--config.llm={project / 'llm'}",
        f"--config.encoder={project / 'clip'}",
        "--config.dtype=float32",
        "--config.log_every=1",
        "--config.save_every=3",
        f"--workdir={workdir}",
        *stages,
        *more,
    ]


def environment(tmp_path: Path) -> dict[str, str]:
    return {
        **os.environ,
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def losses(workdir: Path, stage: str = "tune") -> list[tuple[int, float]]:
    lines = (workdir / stage / "metrics.jsonl").read_text().splitlines()
    return [(row["step"], row["loss"]) for row in map(json.loads, lines)]


@pytest.fixture(scope="module")
def whole(project: Path, tmp_path_factory) -> Path:
    """An unbroken run."""
    workdir = tmp_path_factory.mktemp("whole")
    done = subprocess.run(
        command(project, workdir), cwd=ROOT, capture_output=True, text=True,
        env=environment(project),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "trained" in done.stdout
    return workdir


def test_stages_train_and_export(project: Path, whole: Path) -> None:
    steps, values = zip(*losses(whole), strict=True)
    assert steps == tuple(range(1, STEPS + 1))
    assert np.mean(values[-3:]) < np.mean(values[:3]), values  # the last and the first epoch
    assert (whole / "train_report.png").read_bytes()[:4] == b"\x89PNG"

    model, processor = converters.load(whole / "tune" / "model")
    aligned, _ = converters.load(whole / "align" / "model")
    start, _ = converters.create(project / "llm", project / "clip", {"kind": "mlp"})
    batch = processor([project / "pictures" / "0.png"], [processor.chat("What is number 0?")])
    logits = [np.asarray(m(batch))[batch.mask] for m in (start, aligned, model)]
    assert np.abs(logits[0] - logits[1]).max() > 1e-3 < np.abs(logits[1] - logits[2]).max()
    same = jax.tree.map(np.array_equal, *(m.branches["clip"].encoder for m in (start, model)))
    assert all(jax.tree.leaves(same))  # it was frozen
    llms = jax.tree.map(np.array_equal, start.llm, aligned.llm)
    assert all(jax.tree.leaves(llms))  # the first stage trains the connector alone


def test_killed_at_random_moments(project: Path, whole: Path, tmp_path: Path) -> None:
    """`kill -9`, then the same command: the unbroken run's losses, every one."""
    rng = random.Random(0)
    workdir, killed, longest = tmp_path / "out", 0, 12.0
    while True:
        start = time.monotonic()
        process = subprocess.Popen(
            command(project, workdir), cwd=ROOT, env=environment(project),
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            _, error = process.communicate(
                timeout=None if killed >= KILLS else rng.random() * longest
            )
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            killed += 1
            continue
        assert process.returncode == 0, error.decode()
        longest = time.monotonic() - start
        assert losses(workdir) == losses(whole)
        if killed >= KILLS:
            return
        workdir = tmp_path / f"out{killed}"
