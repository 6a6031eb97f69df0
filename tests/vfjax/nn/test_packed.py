"""Packed attention: block by block as in one piece."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfjax.architectures.qwen_vl import back, reached
from vfjax.nn.layers import attention
from vfjax.nn.packed import packed


@pytest.mark.parametrize("sizes", [[700], [3, 250, 9, 300, 100], [64] * 9])
def test_segments_see_themselves_alone(sizes: list[int]):
    """Padding, too, a token each, behind them."""
    n = 768
    starts = np.arange(n) + back(sizes, n)
    q, k, v = jax.random.normal(jax.random.key(0), (3, n, 2, 4))
    see = starts[:, None] == starts[None]
    expected = attention(q[None], k[None], v[None], jnp.asarray(see)[None])[0]
    found = packed(q, k, v, jnp.asarray(starts), reached(sizes))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_reach_is_the_least_that_serves():
    for sizes in ([700], [3, 250, 9, 300, 100], [64] * 9, [5] * 140, [256, 256, 1]):
        starts = np.arange(768) + back(sizes, 768)
        ends = [int(np.flatnonzero(starts == first).max()) + 1 for first in starts]
        spans = [max(ends[at : at + 256]) - starts[at] for at in range(0, sum(sizes), 256)]
        assert reached(sizes) == max(*spans, 256)
