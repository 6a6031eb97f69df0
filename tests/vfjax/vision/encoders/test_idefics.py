"""Idefics3's positions on grids of other sizes than the table's."""

import numpy as np
import pytest
import torch
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionEmbeddings

from vfjax.vision.encoders.idefics import shares

LANES = torch.backends.cpu.get_cpu_capability() == "AVX2"


@pytest.mark.parametrize("side", [1, 4, 25, 26, 27, 32, 49])
@pytest.mark.parametrize("patches", [1, 3, 25, 26, 32, 49])
@torch.no_grad()
def test_shares_are_transformers(side: int, patches: int):
    if side in (25, 49) and not LANES:
        pytest.skip("torch rounds otherwise here")
    config = Idefics3VisionConfig(hidden_size=2, image_size=2 * side, patch_size=2)
    theirs = Idefics3VisionEmbeddings(config)
    theirs.patch_embedding.weight.zero_()
    theirs.patch_embedding.bias.zero_()
    theirs.position_embedding.weight.copy_(torch.arange(side**2)[:, None].expand(-1, 2))
    mask = torch.ones(1, patches, 2, dtype=torch.bool)
    found = theirs(torch.zeros(1, 3, 2 * patches, 4), mask)[0, ::2, 0].numpy()
    np.testing.assert_array_equal(shares(side, patches), found // side)


def test_some_row_is_left_out():
    """As torch rounds it: of 25 one row stands twice."""
    rows = shares(25, 25)
    assert len(set(rows)) < 25 and (np.abs(rows - np.arange(25)) <= 1).all()
    np.testing.assert_array_equal(shares(26, 26), np.arange(26))
