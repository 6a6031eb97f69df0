"""Cambrian-1 in torch: its samplers before the LLM and within it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import converters
from converters.hf import VisionFuseForConditionalGeneration, VisionFuseProcessor
from converters.hf.processor import tensors
from tests import cambrian as toy
from tests.converters.hf.recorded import assert_connectors_learn
from tests.torch_fused import greedy, logits_of, open_in_torch
from vfjax import Batch
from vfjax.model import forward

DATA = Path(__file__).resolve().parents[2] / "data" / "cambrian.npz"
PICTURES = [toy.picture(k, toy.SIZES[k]) for k in (1, 3)]
ROWS = [toy.row(k, 9 + 2 * k).tolist() for k in (1, 3)]


def read(folder: Path) -> Batch:
    """Two rows with a picture each."""
    processor = VisionFuseProcessor.from_pretrained(folder).vfjax
    return processor(PICTURES, input_ids=ROWS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder a case, as the authors have it."""
    out = tmp_path_factory.mktemp("cambrian")
    with np.load(DATA) as data:
        shapes = json.loads(str(data["shapes"]))
    for case, own in shapes.items():
        toy.write_folder(out / case, own, {**toy.CONFIG, **toy.CASES[case]})
    return out


def test_authors_folder(folders: Path) -> None:
    """What was recorded of the authors' code, of rows of unequal length."""
    model = VisionFuseForConditionalGeneration.from_pretrained(folders / "samplers").eval()
    batch = read(folders / "samplers")
    with np.load(DATA) as data:
        expected, mask = (data[f"samplers/batch.{x}"] for x in ("logits", "attention_mask"))
    expected = expected[mask.astype(bool)]
    found = logits_of(model, batch)
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    assert_connectors_learn(model, batch)


@torch.no_grad()
def test_groups_of_queries(folders: Path) -> None:
    """The connector alone, one of two groups resized."""
    model = VisionFuseForConditionalGeneration.from_pretrained(folders / "connector").eval()
    (memory,) = model.memories(tensors(read(folders / "connector"))["pictures"])
    assert memory.seen is None
    with np.load(DATA) as data:
        expected = data["connector/batch.image_features"].reshape(-1, 32)
    found = memory.values[: len(expected)].numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_two_that_ask(folders: Path, tmp_path: Path) -> None:
    """Each of its own tokens, behind the same layers: vfjax's logits, its likeliest new tokens."""
    members = dict.fromkeys("ab", folders / "samplers")
    quick = {"family": False, "account": False, "checksums": False}
    converters.fuse(members, tmp_path / "out", method="linear", **quick)
    how = {"positions": "parallel", "mask": "block"}
    model, processor = converters.load(tmp_path / "out", dtype="float32", **how)
    theirs = open_in_torch(tmp_path / "out", **how)
    made = greedy(theirs, processor(PICTURES, input_ids=ROWS), 30)
    whole = [row + new for row, new in zip(ROWS, made, strict=True)]
    batch = processor(PICTURES, input_ids=whole, padding="left")
    expected = np.asarray(forward(model, batch))
    found, mask = logits_of(theirs, batch), np.asarray(batch.mask)
    assert np.abs(found - expected[mask]).max() <= 1e-4 * np.abs(expected[mask]).max()
    assert expected[:, -31:-1].argmax(-1).tolist() == made
