"""How patches are joined; the connectors are compared with transformers' by tests/converters."""

import jax.numpy as jnp

from vfjax.architectures.pixel_shuffle import joined_patches


def test_patches_are_joined_row_by_row():
    x = jnp.arange(16.0).reshape(1, 16, 1)
    found = joined_patches(x, 2)[0]
    assert found.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
