"""Dense Connector in transformers, against recordings of its authors' code and its twin."""

from pathlib import Path

import numpy as np
import pytest
import torch

from converters.hf import VisionFuseForConditionalGeneration, VisionFuseProcessor
from converters.hf.dense_connector import combine
from tests.converters.hf.recorded import assert_as_recorded
from vfjax.architectures import Combine
from vfjax.architectures.dense_connector import dense


@pytest.mark.parametrize("case", ["dc_sti", "dc_dci"])
def test_authors_folder(case: str, shared: Path) -> None:
    """As its authors publish it, read in torch without a fusion between."""
    folder = shared / "golden" / case
    model = VisionFuseForConditionalGeneration.from_pretrained(folder).eval()
    assert_as_recorded(model, VisionFuseProcessor.from_pretrained(folder).vfjax, folder)


@pytest.mark.parametrize(
    "config",
    [
        Combine(),
        dense("sti", 6, -2),
        dense("sci", 6, -1, drop=5),
        dense("dci", 6, 3, side=2),
        dense("sci", 3, -1, side=6),
    ],
    ids=str,
)
def test_combine(config: Combine) -> None:
    """The efficient variants too, whose maps grow or shrink."""
    rng = np.random.default_rng(0)
    states = rng.normal(size=(len(config.taps), 2, 16 + config.drop, 4)).astype(np.float32)
    _, expected = config(list(states))
    found = combine(config, [torch.from_numpy(x) for x in states])
    np.testing.assert_allclose(found, expected, atol=1e-6)
