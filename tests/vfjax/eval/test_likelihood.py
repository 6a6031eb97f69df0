"""Log-likelihoods of texts beside transformers'."""

import numpy as np
import pytest
import torch

from vfjax import InputError
from vfjax.eval.likelihood import log_likelihoods

ROWS = [[1, 40, 50, 60, 61], [1, 70], [5, 80, 81, 82, 83, 84, 85, 86, 87, 90, 91], [1, 9, 8]]


def test_as_transformers(llm) -> None:
    """Rows of any length and batches with a row too few change nothing."""
    theirs, model, processor = llm
    expected = []
    for row in ROWS:
        with torch.no_grad():
            logs = theirs(torch.tensor([row])).logits[0].log_softmax(-1)
        expected.append(logs[:-1].gather(1, torch.tensor(row)[1:, None])[:, 0].numpy())
    for batch in (1, 3):
        found = log_likelihoods(model, processor, ROWS, batch=batch)
        assert [len(x) for x in found] == [len(row) - 1 for row in ROWS]
        for ours, their in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, their, rtol=1e-5, atol=1e-5)


def test_a_row_without_a_token_to_predict(llm) -> None:
    _, model, processor = llm
    with pytest.raises(InputError, match="row 1: found 1 tokens, expected at least 2"):
        log_likelihoods(model, processor, [[1, 2], [3]])
