"""`python -m converters verify` on the outputs recorded from upstream's code, and on wrong copies.

One folder is changed and put back by every test: another path would be compiled anew.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import converters
from converters.__main__ import main
from converters.files.reader import read_weights
from vfjax import Model
from vfjax.atomic import read_json

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


@pytest.fixture(scope="module")
def two_branches(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A case of LLaVA-1.5 and Mini-Gemini fused; the branches' stages are their authors' own.

    s0 is LLaVA's first sample and s1 Mini-Gemini's: of each the stages of its branch, and what
    transformers' Llama makes of our embeddings.
    """
    members = {n: shared / "golden" / f for n, f in (("a", "llava15_mlp2x"), ("b", "mgm_plain"))}
    out = tmp_path_factory.mktemp("golden") / "two"
    converters.fuse(members, out, method="linear", family=False, params={"weights": [1.0, 1.0]})
    inputs, outputs = {}, {}
    for k, (name, folder) in enumerate(members.items()):
        given, recorded = (load_file(folder / f"{x}.safetensors") for x in ("inputs", "outputs"))
        inputs |= {n.replace("s0.", f"s{k}."): x for n, x in given.items() if n.startswith("s0.")}
        for stage in ("pixel_values", "vision_features", "image_features"):
            for end in ("", ".rows"):
                if f"s0.{stage}{end}" in recorded:
                    outputs[f"s{k}.{name}.{stage}{end}"] = recorded[f"s0.{stage}{end}"]
    model, processor = converters.load(out, dtype="float32")
    llm = read_json(out / "config.json")["text_config"]
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**llm)).eval()
    weights = {n: torch.tensor(x[...]) for n, x in read_weights(out).items()}
    theirs.load_state_dict({n: weights[n] for n in theirs.state_dict()})
    for k in range(2):
        ids, pixels = inputs[f"s{k}.input_ids"], inputs[f"s{k}.image0"]
        batch = processor([pixels], input_ids=np.atleast_2d(ids))
        x, mask = jax.jit(Model.embed)(model, batch)
        embeds = np.asarray(x)[np.asarray(mask)][None]
        with torch.no_grad():
            logits = theirs(inputs_embeds=torch.tensor(embeds)).logits.numpy()
        outputs |= {f"s{k}.inputs_embeds": embeds, f"s{k}.logits": logits}
        outputs[f"s{k}.attention_mask"] = np.ones(embeds.shape[:2], np.int64)
    save_file(inputs, out / "inputs.safetensors")
    save_file(outputs, out / "outputs.safetensors")
    (out / "case.json").write_text("{}")
    return out


def test_several_branches_are_verified_each_under_its_name(two_branches: Path, verify: Verify):
    code, lines = verify(two_branches)
    assert [line for line in lines if "FAILED" in line] == []
    shown = [line.split()[1] for line in lines if not line.endswith("not recorded in this case")]
    each = ("pixel_values", "vision_features", "image_features")
    names = [f"{branch}.{stage}" for branch in "ab" for stage in each]
    assert (code, shown) == (0, ["attention_mask", *names, "inputs_embeds", "logits"])


def test_a_wrong_branch_among_several_is_named(two_branches: Path, verify: Verify):
    def edit(arrays: Arrays) -> None:
        arrays["s1.b.vision_features"] = arrays["s1.b.vision_features"] + 1e-3
        arrays["s0.c.image_features"] = np.zeros(1, np.float32)  # no such branch

    change(two_branches / "outputs.safetensors", edit)
    code, lines = verify(two_branches)
    wrong = [(line.split()[1], line.split()[-1]) for line in lines if "FAILED at " in line]
    assert (code, wrong) == (1, [("b.vision_features", "s1"), ("c.image_features", "s0")])
