"""Where the tokens of several branches stand, and which of them see one another.

Every branch was trained right after the text before its picture. `running` positions, those of
VisionFuse (arXiv 2412.01289), move all but the first branch on; `parallel` ones don't. A `block`
mask keeps a branch's tokens from seeing another branch's, which its member never saw either.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
AnyArray = jax.Array | np.ndarray

POSITIONS = ("running", "parallel")
"""Values of `ModelConfig.positions`."""

MASKS = ("causal", "block")
"""Values of `ModelConfig.mask`."""


def segment_ids(visual: AnyArray, sizes: Sequence[int]) -> Array:
    """The branch that each token is of: int32[b, t], 0 for text and padding, k + 1 for branch k.

    Args:
        visual: `Batch.visual`, int32[b, t].
        sizes: visual tokens in each branch's memory.
    """
    owners = jnp.asarray(np.repeat(np.arange(1, len(sizes) + 1, dtype=np.int32), sizes))
    return jnp.where(visual < 0, 0, owners[jnp.maximum(visual, 0)])


def parallel(segments: Array, mask: Array, count: int) -> Array:
    """Positions int32[b, t]: of a picture, all branches start where the picture stands.

    The text goes on after the longest branch. Undefined at padding.

    Args:
        segments: int32[b, t], see `segment_ids`; a picture's branches stand in order, none without
            a token, so that a lower branch begins the next picture.
        mask: bool[b, t], False at padding and at visual tokens that a connector leaves out.
        count: of the branches.
    """
    edge = ((0, 0), (1, 1))
    before, after = (jnp.pad(segments, edge)[:, at : at + mask.shape[1]] for at in (0, 2))
    first = (segments > 0) & ((before == 0) | (before > segments))
    last = (segments > 0) & ((after == 0) | (after < segments))
    own = jnp.zeros_like(segments)  # tokens of its branch in this picture so far, or in the last
    longest = own
    for k in range(1, count + 1):
        here = (mask & (segments == k)).astype(jnp.int32)
        total = jnp.cumsum(here, axis=1)
        inside = total - jax.lax.cummax(jnp.where(first, total - here, 0), axis=1)
        own = jnp.where(segments == k, inside, own)
        longest = jnp.maximum(longest, inside)
    text = jnp.cumsum(mask & (segments == 0), axis=1)
    passed = jnp.where(last, longest, 0)
    start = text + jnp.cumsum(passed, axis=1) - passed
    return jnp.maximum(start + own - 1, 0).astype(jnp.int32)


def block(segments: Array) -> Array:
    """Who may see whom, bool[b, t, t]: all but tokens of two branches; see `segment_ids`."""
    seer, seen = segments[:, :, None], segments[:, None]
    return (seer == 0) | (seen == 0) | (seer == seen)
