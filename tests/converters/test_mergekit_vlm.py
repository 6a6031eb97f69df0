"""YAMLs of whole multimodal LLMs through `fuse`, beside what mergekit 0.1.5 made of them.

tests/peers/mergekit_vlm.py recorded its results, and makes the folders.
"""

import json
import os
import runpy
from pathlib import Path

import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

import converters
from converters.files.reader import read_weights
from tests.qwen_vl import make, write
from vfjax import InputError
from vfjax.atomic import read_json

TESTS = Path(__file__).resolve().parents[1]
RECORD = np.load(TESTS / "data" / "mergekit_vlm.npz")
CASES = json.loads(str(RECORD["cases"]))
PEER = runpy.run_path(str(TESTS / "peers" / "mergekit_vlm.py"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2.5-VLs with the recorded weights, and their processor."""
    root = tmp_path_factory.mktemp("models")
    write(root / "like", make("qwen2_5_vl", **PEER["TEXT"]))
    PEER["write"](root, root / "like", load_file, lambda x, f: save_file(x, f, {"format": "pt"}))
    return root


def fuse(models: Path, out: Path, text: str, export: str = "whole") -> dict[str, np.ndarray]:
    """Tensors of the folder that a YAML makes."""
    file = out.parent / f"{out.name}.yml"
    file.write_text(text)
    here = Path.cwd()
    os.chdir(models)
    try:
        converters.fuse({}, out, recipe=file, export=export, account=False)
    finally:
        os.chdir(here)
    return {name: tensor[...] for name, tensor in read_weights(out).items()}


@pytest.mark.parametrize("case", [case for case in CASES if case != "half"])
def test_tensors(models: Path, tmp_path: Path, case: str):
    """The same names, and the same values, gradients and filters of each module included."""
    found = fuse(models, tmp_path / "out", CASES[case]["yaml"])
    assert sorted(found) == CASES[case]["names"]
    theirs = {key.split("/")[1]: RECORD[key] for key in RECORD.files if key.startswith(f"{case}/")}
    assert len(theirs) == len(PEER["STORED"]) + (case == "stacked")
    for name, value in theirs.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=2e-6, err_msg=name)
    config = read_json(tmp_path / "out" / "config.json")["text_config"]
    assert config["num_hidden_layers"] == 2 + (case == "stacked")


def test_reopens(models: Path, tmp_path: Path):
    """A whole model, deeper than its members, opens here and in transformers."""
    fuse(models, tmp_path / "out", CASES["stacked"]["yaml"])
    model, _ = converters.load(tmp_path / "out")
    assert model.config.llm.layers == 3
    _, seen = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not seen["missing_keys"] and not seen["unexpected_keys"]


@pytest.mark.parametrize(
    ("case", "export", "message"),
    [
        ("half", "whole", "modules: found no 'multi_modal_projector'"),
        ("modules", "model", "set export to 'whole'"),
        ("modules", "llm", "set export to 'whole'"),
    ],
)
def test_modules_that_would_be_left_out(
    models: Path, tmp_path: Path, case: str, export: str, message: str
):
    """Mergekit writes no tensor of a module that is not listed."""
    assert CASES["half"]["names"] == [x for x in CASES["modules"]["names"] if "visual" not in x]
    with pytest.raises(InputError) as error:
        fuse(models, tmp_path / "out", CASES[case]["yaml"], export)
    assert message in str(error.value) and "\n" not in str(error.value)
