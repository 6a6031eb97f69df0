"""Fused folders in transformers against vfjax on the same folder."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import converters
from converters import hf
from converters.hf import VisionFuseForConditionalGeneration, branch
from tests.checkpoints import changed, reference_logits, upstream_llava_folder
from tests.torch_fused import assert_same, logits_of, open_in_torch, picture, toy_folder
from vfjax import InputError

ROWS = [[1, 40, -200, 60, 61, -200, 62, 63], [1, -200], [5, 6, 7]]
PICTURES = [picture(40, 30), picture(25, 50, 1), picture(30, 50, 2)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP and DINOv2 on one Llama."""
    return toy_folder(tmp_path_factory.mktemp("pair") / "pair")


def test_fused_pair(pair: Path) -> None:
    """Unequal rows, one without a picture, on both sides of padding; logits and greedy tokens."""
    how = {"positions": "parallel", "mask": "block"}
    assert_same(converters.load(pair, **how), open_in_torch(pair, **how), PICTURES, ROWS)


def test_saved_folder(tmp_path: Path) -> None:
    """Every tensor comes back, by its name; what the LLM renames (Mixtral) is not the towers'."""
    kinds = ("clip", "dinov2", "siglip", "dinov2_with_registers")
    experts = {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1}
    folder, out = toy_folder(tmp_path / "in", kinds, **experts), tmp_path / "out"
    open_in_torch(folder, positions="parallel").save_pretrained(out)
    (out / "tokenizer.json").symlink_to(folder / "tokenizer.json")
    (out / "tokenizer_config.json").symlink_to(folder / "tokenizer_config.json")
    saved, read = (load_file(path / "model.safetensors") for path in (out, folder))
    assert read.keys() - saved.keys() == {name for name in read if ".encoder.head." in name}
    assert {name for name in saved if not torch.equal(saved[name], read[name])} == set()
    model, _ = converters.load(out)
    assert model.config.positions == "parallel"
    assert open_in_torch(out).config.positions == "parallel"


def test_authors_folder(tmp_path: Path) -> None:
    member = upstream_llava_folder(tmp_path / "llava")
    model = VisionFuseForConditionalGeneration.from_pretrained(tmp_path / "llava").eval()
    _, processor = converters.load(tmp_path / "llava")
    batch = processor(PICTURES[:2], input_ids=ROWS[:1])
    pixels = {"clip": batch.images["clip"].given.pixels}
    used = (member.tower, member.connector, {"taps": (-2,), "drop": 1})
    expected = reference_logits(member.llm, {"clip": used}, ROWS[0], pixels)
    np.testing.assert_allclose(logits_of(model, batch), expected, atol=1e-4 * abs(expected).max())


def refused(folder: Path) -> str:
    """The line with which a folder is refused."""
    with pytest.raises(InputError) as error:
        open_in_torch(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_tensors_that_do_not_fit(pair: Path, tmp_path: Path) -> None:
    for file in pair.iterdir():
        (tmp_path / file.name).symlink_to(file)
    weights = tmp_path / "model.safetensors"
    weights.unlink()
    tensors = load_file(pair / "model.safetensors")
    name = "branches.clip.connector.2.bias"
    for other, found in (
        ({name: None}, f"{name}: found 1 tensor missing"),
        ({"more": torch.zeros(2)}, "more: found 1 tensor unknown"),
        ({name: torch.zeros(2)}, f"{name}: found 1 tensor of another shape"),
    ):
        new = {key: x for key, x in (tensors | other).items() if x is not None}
        save_file(new, weights, {"format": "pt"})
        assert found in refused(tmp_path)


def test_keys_that_are_not_known(pair: Path, tmp_path: Path) -> None:
    """As `converters.load` refuses them; what a training leaves there is none of these."""
    for i, (key, found) in enumerate(
        [("prune", "prune: found 1, expected no such key"), ("mask", "mask: found 1, expected")]
    ):
        assert found in refused(changed(pair, tmp_path / str(i), "config.json", {key: 1}))
    folder = changed(pair, tmp_path / "left", "config.json", {"use_cache": False})
    open_in_torch(folder)
    assert converters.load(folder)[0].config.mask == "causal"


def test_architecture_that_torch_lacks(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_in_torch(pair)
    monkeypatch.delitem(branch.BRANCHES, "Llava")
    assert "branch 'clip': found architecture Llava" in refused(pair)


def test_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, of torch and of a transformers that calls its models in another way."""
    monkeypatch.setattr(transformers, "__version__", "5.23.1")
    with pytest.raises(InputError, match="found transformers 5.23.1, .*pip install 'vfjax.hf.'"):
        importlib.reload(hf)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="found transformers 5.23.1 without torch"):
        importlib.reload(hf)
