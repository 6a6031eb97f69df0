"""Positions and masks in torch against `vfjax.fusion.segments`."""

import numpy as np
import torch

from converters.hf import segments as own
from vfjax.fusion import segments as twin


def test_random_rows() -> None:
    """Pictures of one to three branches one after another or apart, padding, left-out tokens."""
    rng = np.random.default_rng(0)
    rows = []
    while len(rows) < 12:
        row: list[int] = []
        while len(row) < 40:
            row += [0] * rng.integers(0, 3)
            row += [k for k in (1, 2, 3) for _ in range(rng.integers(1, 5))]
        rows.append(row[:40])
    order, mask = np.array(rows), rng.random((12, 40)) > 0.2
    place, steps = rng.integers(0, 5, (12, 40, 3)), rng.integers(0, 3, (12, 40))
    t = torch.from_numpy
    for more in ((), (place, steps)):
        expected = twin.parallel(order, mask, 3, *more)
        assert (own.parallel(t(order), t(mask), 3, *map(t, more)).numpy() == expected).all()
    expected = twin.running(mask, place, steps)
    assert (own.running(t(mask), t(place), t(steps)).numpy() == expected).all()
    see, at = own.block(t(order)), torch.arange(45)  # slots of a cache beyond the prompt, too
    found = see(torch.arange(12)[:, None, None], None, at[None, :, None], at[None, None])
    assert (found[:, :40, :40].numpy() == twin.block(order)).all()
