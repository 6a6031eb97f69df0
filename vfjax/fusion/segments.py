"""Where the tokens of several branches stand, and which of them see one another.

Every branch was trained right after the text before its picture. `running` positions, those of
VisionFuse (arXiv 2412.01289), move all but the first branch on; `parallel` ones don't. A `block`
mask keeps a branch's tokens from seeing another branch's, which its member never saw either.
"""

import jax
import jax.numpy as jnp
import numpy as np

from vfjax.errors import check, one_of

Array = jax.Array
AnyArray = jax.Array | np.ndarray

POSITIONS = ("running", "parallel")
"""Values of `ModelConfig.positions`."""

MASKS = ("causal", "block")
"""Values of `ModelConfig.mask`."""


def check_arrangement(positions: str, mask: str) -> None:
    """Raises InputError for one that is not among `POSITIONS` or `MASKS`."""
    rules = one_of("positions", positions, POSITIONS), one_of("mask", mask, MASKS)
    check(rules, fix="choose one")


def running(mask: Array, place: Array, steps: Array) -> Array:
    """Positions int32[p, b, t], p = 3: one picture and branch after another.

    A picture's tokens stand at their places from where it starts; the text goes on `span` after
    that. Undefined at padding.

    Args:
        mask: bool[b, t], False at padding and at visual tokens that a connector leaves out.
        place: int32[b, t, 3], see `vfjax.model.Batch`.
        steps: int32[b, t], positions that the text goes on after each token.
    """
    taken = jnp.where(mask, steps, 0)
    start = jnp.cumsum(taken, axis=1) - taken
    return (start[None] + jnp.moveaxis(place, -1, 0)).astype(jnp.int32)


def parallel(
    segments: Array,
    mask: Array,
    count: int,
    place: AnyArray | None = None,
    steps: AnyArray | None = None,
) -> Array:
    """Positions int32[p, b, t]: of a picture, all branches start where the picture stands.

    The text goes on after the longest branch. Undefined at padding.

    Args:
        segments: int32[b, t], 0 for text and padding, k + 1 for branch k; a picture's branches
            stand in order, none without a token, so that a lower branch begins the next picture.
        mask: bool[b, t], False at padding and at visual tokens that a connector leaves out.
        count: of the branches.
        place: int32[b, t, 3], see `vfjax.model.Batch`; then p is 3. None: all zero, p is 1.
        steps: int32[b, t], positions that the text goes on after each token; None: all one.
    """
    edge = ((0, 0), (1, 1))
    before, after = (jnp.pad(segments, edge)[:, at : at + mask.shape[1]] for at in (0, 2))
    first = (segments > 0) & ((before == 0) | (before > segments))
    last = (segments > 0) & ((after == 0) | (after < segments))
    taken = jnp.where(mask, 1 if steps is None else jnp.asarray(steps), 0).astype(jnp.int32)
    own = jnp.zeros_like(segments)  # positions of its branch in this picture before it
    longest = own
    for k in range(1, count + 1):
        here = jnp.where(segments == k, taken, 0)
        total = jnp.cumsum(here, axis=1)
        inside = total - jax.lax.cummax(jnp.where(first, total - here, 0), axis=1)
        own = jnp.where(segments == k, inside - here, own)
        longest = jnp.maximum(longest, inside)
    words = jnp.where(segments == 0, taken, 0)
    passed = jnp.where(last, longest, 0)
    start = jnp.cumsum(words, axis=1) - words + jnp.cumsum(passed, axis=1) - passed + own
    if place is not None:
        return (start[None] + jnp.moveaxis(jnp.asarray(place), -1, 0)).astype(jnp.int32)
    return start[None].astype(jnp.int32)


def block(segments: Array) -> Array:
    """Who may see whom, bool[b, t, t]: all but tokens of two branches; see `parallel`."""
    seer, seen = segments[:, :, None], segments[:, None]
    return (seer == 0) | (seen == 0) | (seer == seen)
