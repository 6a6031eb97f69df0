"""`python -m converters verify` on the outputs recorded from upstream's code, and on wrong copies.

One folder is changed and put back by every test: another path would be compiled anew.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from converters.__main__ import main

STAGES = [
    "attention_mask",
    "pixel_values",
    "vision_features",
    "connector_features",
    "image_features",
    "inputs_embeds",
    "logits",
    "generated",
]
ABSENT = {"connector_features"}  # LLaVA's recordings leave it out
Arrays = dict[str, np.ndarray]
Verify = Callable[..., tuple[int, list[str]]]


@pytest.fixture(scope="module")
def golden(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden") / "llava15_mlp2x"
    shutil.copytree(shared / "golden" / "llava15_mlp2x", folder)
    return folder


@pytest.fixture
def case(golden: Path) -> Iterator[Path]:
    before = {file: file.read_bytes() for file in golden.iterdir()}
    yield golden
    for file, content in before.items():
        file.write_bytes(content)


@pytest.fixture
def verify(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Verify:
    """Runs the verb on folders; its exit code and the lines that it printed."""

    def run(*cases: Path) -> tuple[int, list[str]]:
        monkeypatch.setattr("sys.argv", ["converters", "verify", *map(str, cases)])
        code = main()
        out, err = capsys.readouterr()
        return code, (out + err).splitlines()

    return run


def hold(lines: list[str], absent: set[str] = ABSENT) -> bool:
    """Whether all lines say ok, but those of stages that are said to be absent."""
    ends = {True: "absent  not recorded in this case", False: "  ok"}
    return all(line.endswith(ends[line.split()[1] in absent]) for line in lines)


def change(file: Path, edit: Callable[[Arrays], object]) -> None:
    arrays = load_file(file)
    edit(arrays)
    save_file(arrays, file)


def test_recorded_cases_hold(shared: Path, case: Path, verify: Verify):
    code, lines = verify(case, shared / "golden" / "llava15_gqa")
    assert code == 0
    cases = ("llava15_mlp2x", "llava15_gqa")
    assert [line.split()[:2] for line in lines] == [[c, s] for c in cases for s in STAGES]
    assert hold(lines)


@pytest.mark.parametrize(
    ("file", "name", "stage"),
    [
        ("vision_tower", "vision_model.encoder.layers.3.mlp.fc2.bias", "vision_features"),
        ("model", "model.mm_projector.2.bias", "image_features"),
        ("model", "model.embed_tokens.weight", "inputs_embeds"),
        ("model", "model.layers.1.mlp.down_proj.weight", "logits"),
    ],
)
def test_one_wrong_weight_fails_from_its_stage_on(
    case: Path, verify: Verify, file: str, name: str, stage: str
):
    def edit(arrays: Arrays) -> None:
        arrays[name][1] += 0.05  # the row of <s>, where it is the embedding

    change(case / f"{file}.safetensors", edit)
    code, lines = verify(case)
    assert code == 1
    wrong = [line.split()[1] for line in lines if "FAILED at " in line]
    assert wrong[0] == stage
    assert hold(lines[: STAGES.index(stage)])


def test_layers_after_the_tap_do_not_matter(case: Path, verify: Verify):
    def edit(arrays: Arrays) -> None:
        arrays["vision_model.encoder.layers.4.mlp.fc2.bias"] += 1

    change(case / "vision_tower.safetensors", edit)
    assert verify(case)[0] == 0


def test_a_stage_that_is_not_recorded_is_said_to_be_absent(case: Path, verify: Verify):
    def edit(arrays: Arrays) -> None:
        for name in [n for n in arrays if n.endswith(".image_features")]:
            del arrays[name]

    change(case / "outputs.safetensors", edit)
    code, lines = verify(case)
    assert code == 0
    assert [line.split()[1] for line in lines] == STAGES
    assert hold(lines, ABSENT | {"image_features"})


def test_each_stage_recorded_otherwise_fails_at_its_sample(case: Path, verify: Verify):
    def edit(arrays: Arrays) -> None:
        arrays["s2.pixel_values"] = arrays["s2.pixel_values"][..., 1:].copy()
        arrays["s1.image_features"][0, 0, 0] += 2e-4
        arrays["s0.logits"][0, 0] = np.nan
        arrays["s3.generated"][7] += 1
        arrays["s1.router_scores"] = np.zeros(2, np.float32)  # no such stage here

    change(case / "outputs.safetensors", edit)
    code, lines = verify(case)
    assert code == 1
    assert {line.split()[1]: line.split()[-1] for line in lines if "FAILED at" in line} == {
        "pixel_values": "s2",
        "image_features": "s1",
        "logits": "s0",
        "generated": "s3",
        "router_scores": "s1",
    }
    assert [line.split()[1] for line in lines] == [*STAGES, "router_scores"]


@pytest.mark.parametrize("name", ["case.json", "inputs.safetensors", "outputs.safetensors"])
def test_a_folder_that_is_no_case(case: Path, verify: Verify, name: str):
    (case / name).unlink()
    code, lines = verify(case)
    assert code == 2
    assert lines == [f"{case / name}: found no file, expected a recorded case; check the path"]


def test_folders_beside_cases_are_said_and_skipped(case: Path, tmp_path: Path, verify: Verify):
    """As the tokenizers among recorded cases; alone, or with a config.json, they are errors."""
    other = tmp_path / "tokenizers"
    other.mkdir()
    code, lines = verify(other, case)
    assert code == 0
    assert lines[0].split(maxsplit=1) == [
        "tokenizers",
        "no case.json, no config.json: not a case, skipped",
    ]
    assert hold(lines[1:])
    assert verify(other)[0] == 2
    (other / "config.json").write_text("{}")
    code, lines = verify(case, other)
    assert code == 2
    assert lines[-1].startswith(f"{other / 'case.json'}: found no file")
