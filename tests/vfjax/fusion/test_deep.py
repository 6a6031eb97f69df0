"""What visual tokens are given within the LLM, by hand."""

import jax.numpy as jnp
import numpy as np

from vfjax.architectures import VisualTokens
from vfjax.fusion.deep import deep

MASK = jnp.array([[True, True, True, True, True, False]])
VISUAL = jnp.array([[-1, 0, 3, 5, 4, -1]])
"""Of two memories of three tokens: 0 of the first; the first, the third and the second of the
other."""


class Doubling:
    """Gives a token its hidden state once more, times a number of its own, after layer 1."""

    layers = (1,)

    def within(self, layer, x, seen):
        assert layer == 1 and len(x) == 2
        return x * seen[0][:, None]


def memory(first: float, **more) -> VisualTokens:
    values = first + jnp.arange(3.0)[:, None]
    return VisualTokens(values, jnp.ones(3, bool), **more)


def test_what_is_added_and_what_is_asked():
    """A branch is asked about its first tokens alone, as many as it has seen, where they stand."""
    memories = [
        memory(0, deep=jnp.full((2, 3, 1), 100.0)),
        memory(10, seen=(jnp.array([2.0, 5.0]),)),
    ]
    given = deep(VISUAL, MASK, memories, [None, Doubling()])
    x = jnp.arange(1.0, 7)[None, :, None]
    assert given(0, x)[0, :, 0].tolist() == [1, 102, 3, 4, 5, 6]
    assert given(1, x)[0, :, 0].tolist() == [1, 102, 3 + 2 * 3, 4, 5 + 5 * 5, 6]
    assert given(2, x) is x
    order = jnp.array([[4, 2, 1, 0]])
    moved = given.ordered(order, jnp.array([[True, False, True, True]]))
    found = moved(1, x[:, order[0]])[0, :, 0]
    np.testing.assert_array_equal(found, [5 + 5 * 5, 3, 102, 1])


def test_nothing():
    assert deep(VISUAL, MASK, [memory(0), memory(1)], [None, None]) is None
