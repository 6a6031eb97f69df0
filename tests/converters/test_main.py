"""The shell's `python -m converters fuse`."""

import json
from pathlib import Path

import pytest

import converters
from converters.__main__ import main
from experiments.tasks.common import FAMILY

CLIP, DINO, BASE = (str(FAMILY / name) for name in ("clip", "dino", "base"))


def ran(monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    monkeypatch.setattr("sys.argv", ["converters", "fuse", *args])
    return main()


def test_fuse_writes_what_python_writes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The folder to make may stand behind options, as in the help."""
    options = ["--method=ties", "--param=density=0.5", "--weights=0.6,0.4", "--positions=parallel"]
    out, same = tmp_path / "out", tmp_path / "same"
    assert ran(monkeypatch, f"a={CLIP}", f"b={DINO}", "--base", BASE, str(out), *options) == 0
    assert f"{out}/MERGE.md" in capsys.readouterr().out
    params = {"density": 0.5, "weights": (0.6, 0.4)}
    members = {"a": CLIP, "b": DINO}
    converters.fuse(members, same, base=BASE, method="ties", params=params, positions="parallel")
    name = "model.safetensors"
    assert (out / name).read_bytes() == (same / name).read_bytes()
    configs = [json.loads((folder / "config.json").read_text()) for folder in (out, same)]
    assert configs[0] == configs[1]


def test_a_dry_run_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert ran(monkeypatch, CLIP, DINO, str(out), "--base", BASE, "--dry_run") == 0
    assert json.loads(capsys.readouterr().out)["methods"]["task_arithmetic"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (
            (CLIP, f"elsewhere/{Path(CLIP).name}", "--base", BASE, "out"),
            2,
            "two items named 'clip'",
        ),
        ((CLIP, DINO, "--base", BASE, "--param=densty=1", "out"), 2, "found 'densty'"),
        ((CLIP, DINO, "--base", BASE), 2, "expected"),  # the last folder is the one to make
        ((CLIP, DINO, "--bsae", BASE, "out"), None, "unrecognized arguments: --bsae"),
        ((CLIP, DINO, "--weights=a", "out"), None, "a: expected numbers"),
        ((CLIP, DINO, "--param=density", "out"), None, "density: found no ="),
        (("--base", BASE), None, "found no folders"),
    ],
)
def test_what_is_wrong_is_said(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    args: tuple[str, ...],
    code: int | None,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if code is None:
        with pytest.raises(SystemExit):
            ran(monkeypatch, *args)
    else:
        assert ran(monkeypatch, *args) == code
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
