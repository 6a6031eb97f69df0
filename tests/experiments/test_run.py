"""The command line, end to end."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import checkpoints

ROOT = Path(__file__).resolve().parents[2]


def command(config: str, *args: str) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "experiments/run.py", f"--config=experiments/configs/{config}.py"]
    return subprocess.run([*start, *args], cwd=ROOT, capture_output=True, text=True, check=False)


def test_demo(tmp_path: Path):
    out = tmp_path / "demo"
    done = command("demo", f"--workdir={out}", "--config.scenes=40")
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "results.json").read_text())
    assert set(results["members"]) == {"clip", "dino"}
    assert results["fused"] > max(results["members"].values()) + 5
    kinds = {"locdig", "loccol", "ocr", "colour", "count", "exist", "compare"}
    assert all(set(row) == kinds for row in results["by_task"].values())
    assert results["controls"].keys() < results["by_task"].keys()
    assert (out / "results.png").read_bytes()[:4] == b"\x89PNG"

    asked = command(
        "generate",
        f"--config.model={out / 'fused'}",
        f"--config.image={out / 'scenes' / 'images' / '00000.png'}",
        "--config.prompt=how many digits ?",
        "--config.max_new_tokens=4",
    )
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.strip() in ("two", "three", "four", "five")


def test_fuse(tmp_path: Path):
    llm = checkpoints.llama_folder(tmp_path / "base", 1)
    for seed, name in enumerate(("one", "two"), 2):
        tuned = checkpoints.tuned(llm, seed)
        checkpoints.upstream_llava_folder(tmp_path / name, seed, llm=tuned, weights="safetensors")
    done = command(
        "fuse",
        f"--config.members=('{tmp_path / 'one'}', 'other={tmp_path / 'two'}')",
        f"--config.base={tmp_path / 'base'}",
        "--config.weights=(0.75, 0.25)",
        f"--workdir={tmp_path}",
    )
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "fused" / "config.json").read_text())
    assert [branch["name"] for branch in config["branches"]] == ["one", "other"]
    assert config["recipe"]["params"] == {"weights": [0.75, 0.25]}


@pytest.mark.parametrize(
    ("config", "args", "words"),
    [
        ("generate", ["--config.prompt=a"], "config.model: found nothing"),
        ("nowhere", [], "nowhere.py"),
        ("generate", ["--config.task=dance"], "config.task: found no module experiments.tasks.d"),
        ("generate", ["--config.modle=a"], "unknown key 'modle'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(config: str, args: list[str], words: str):
    done = command(config, *args)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert words in line


def test_a_bad_picture(tmp_path: Path):
    checkpoints.upstream_llava_folder(tmp_path / "model", 1, weights="safetensors")
    Image.fromarray(np.zeros((2, 20_000), np.uint8)).save(tmp_path / "long.png")
    done = command(
        "generate",
        f"--config.model={tmp_path / 'model'}",
        f"--config.image={tmp_path / 'long.png'}",
        "--config.prompt=a",
    )
    assert done.returncode == 2
    assert "long.png" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
