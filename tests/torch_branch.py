"""A member's branch in torch, alone, filled from the member's folder, for tests."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import accelerate
import numpy as np
import torch
from torch import Tensor

from converters import open_source
from converters.hf import branch
from converters.hf.branch import Branch
from converters.hf.processor import tensors
from converters.load import model_config
from converters.processor import processor


class Shown(NamedTuple):
    """What a branch makes of pictures.

    Attributes:
        branch: the module.
        given: what it was shown.
        values: [m, d] of its tokens, in the order of reading.
        deep: [k, m, d] of them; None: nothing.
        at: int64[m], where they are in the memory.
    """

    branch: Branch
    given: dict[str, Any]
    values: Tensor
    deep: Tensor | None
    at: Tensor


def show(folder: Path, media: Sequence[Any]) -> Shown:
    """Pictures and videos of one row; all tensors of the folder are the branch's, and all its own.

    Args:
        folder: of one branch.
        media: pictures and videos.
    """
    source = open_source(folder)
    config = model_config(source)
    (own,), (ours,) = source.branches, config.branches
    made = branch.build(ours.architecture, own.name)
    state = {
        f"{part.removeprefix(f'branches.{own.name}.')}.{name}": torch.from_numpy(np.array(x[...]))
        for part in own.parts
        for name, x in source.parts[part].items()
    }
    made.load_state_dict(state)
    batch = processor(source, config)([media], input_ids=[[1, *[-200] * len(media)]])
    given = tensors(batch)["pictures"][ours.name]
    tokens = made.eval().visual_tokens(made.encode(given), torch.zeros(9, 32).__getitem__)
    assert len(tokens.values) == len(tokens.keep) == batch.sizes[0] and tokens.keep.all()
    at = torch.from_numpy(batch.visual[batch.visual >= 0]).long()
    deep = None if tokens.deep is None else tokens.deep[:, at]
    return Shown(made, given, tokens.values[at], deep, at)


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Within 1e-4 of the largest value."""
    assert found.shape == expected.shape
    limit = 1e-4 * float(expected.detach().abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=limit)


def assert_usable(shown: Shown) -> None:
    """Gradients reach every parameter, and weights may be elsewhere until a module is called."""
    total = shown.values.square().sum()
    if shown.deep is not None:
        total = total + shown.deep.square().sum()
    total.backward()
    assert all(p.grad is not None and p.grad.any() for p in shown.branch.parameters())
    accelerate.cpu_offload(shown.branch, torch.device("cpu"))
    assert all(p.is_meta for p in shown.branch.parameters())
    states = shown.branch.encode(shown.given)
    found = shown.branch.visual_tokens(states, torch.zeros(9, 32).__getitem__)
    assert torch.equal(found.values[shown.at], shown.values)
