"""What the tests of single encoders share: comparison with PyTorch, full-size tensor lists."""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx

from converters.load import abstract
from converters.params.table import rename
from converters.registry import find

LIMIT = 2e-5
"""Largest difference, as a share of the activation's largest value."""


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(*shape, 3)).astype(np.float32)


def channels_first(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


@functools.partial(jax.jit, static_argnames="taps")
def run(model: nnx.Module, x: jax.Array, taps: Sequence[int]) -> list:
    return model(x, taps)


def assert_close(found: jax.Array, expected: np.ndarray, what: object) -> None:
    assert found.shape == expected.shape, what
    error = np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()
    assert error <= LIMIT, (what, error)


@torch.no_grad()
def assert_all_taps(theirs: torch.nn.Module, ours: nnx.Module, x: np.ndarray, **options) -> None:
    """Every hidden state, and the last one after the final norm, of a transformers model.

    Args:
        theirs: the reference.
        ours: the encoder with its weights.
        x: float32[n, h, w, 3] pixels.
        options: more arguments of the reference's forward.
    """
    out = theirs(channels_first(x), output_hidden_states=True, **options)
    count = len(ours.blocks) + 1
    found = run(ours, x, tuple(range(count)))
    for k, state, expected in zip(range(count), found, out.hidden_states, strict=True):
        assert_close(state, expected.numpy(), k)
    assert_close(ours.norm(found[-1]), out.last_hidden_state.numpy(), "norm")


def products(model: nnx.Module, x: np.ndarray, *taps: int) -> int:
    """Matrix products and convolutions that the taps cost."""
    text = jax.jit(lambda x: model(x, taps)).lower(x).as_text()
    return text.count("stablehlo.dot_general") + text.count("stablehlo.convolution")


def spec(shared: Path, name: str) -> dict[str, Any]:
    """Config and tensors of a published model, without weights."""
    return json.loads((shared / "specs" / "tensors" / f"{name}.json").read_text())


@functools.cache
def shapes_of(config: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of an encoder's parameters; building one takes seconds even without values."""
    return {name: p.shape for name, p in abstract(config.build)[1].items()}


def published(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> tuple[Any, list[str], int]:
    """A tower in its full size against the names and shapes of its published file.

    Args:
        config: its config, `model_type` included.
        tensors: name in the file -> (dtype, shape).

    Returns:
        The encoder's config, the tensors that are not read, and the number of parameters.

    Raises:
        InputError: a parameter without tensor, a tensor unknown, or a shape that differs.
    """
    table = find(config, "spec")
    ours = table.config(config)
    shapes = shapes_of(ours)
    names = rename(tensors, table.prefixes)
    assert len(names) == len(tensors)
    stored = {
        new: jax.ShapeDtypeStruct(tuple(tensors[old][1]), np.float32)
        for old, (new, _) in names.items()
    }
    read = {rule.source for rule in table.check(shapes, stored, "spec").values()}
    count = sum(map(math.prod, shapes.values()))
    assert count == sum(stored[name].size for name in read)
    return ours, sorted(old for old, (new, _) in names.items() if new not in read), count
