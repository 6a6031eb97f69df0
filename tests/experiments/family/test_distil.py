"""The self-distillation example."""

import dataclasses

import jax
import numpy as np
from flax import nnx

from experiments.family import encoders, scenes
from experiments.family.distil import train_distilled


def test_learns_from_pictures_alone() -> None:
    """The same bytes again, with other labels; the tower has moved from where it began."""
    data = scenes.sample("train", 16, 0)
    blind = dataclasses.replace(data, digits=np.zeros_like(data.digits))
    lines: list[str] = []
    one, other = (
        nnx.state(train_distilled(x, steps=2, every=2, batch=4, momentum=0.5, report=lines.append))
        for x in (data, blind)
    )
    jax.tree.map(np.testing.assert_array_equal, one, other)
    start = nnx.state(encoders.new(encoders.DINO, 0))
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), one, start)
    assert max(jax.tree.leaves(moved)) > 1e-5
    assert len(lines) == 2 and "step 2, loss" in lines[0]
