"""Where the tokens of several branches stand, and which of them see one another.

The twin of `vfjax.fusion.segments`.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad


def running(mask: Tensor, place: Tensor, steps: Tensor) -> Tensor:
    """Positions int64[3, b, t]: one picture and branch after another.

    Args:
        mask: bool[b, t], see `vfjax.fusion.segments.running`.
        place: int64[b, t, 3].
        steps: int64[b, t].
    """
    taken = torch.where(mask, steps, 0)
    start = taken.cumsum(1) - taken
    return start[None] + place.movedim(-1, 0)


def parallel(
    segments: Tensor,
    mask: Tensor,
    count: int,
    place: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    """Positions int64[p, b, t]: of a picture, all branches start where the picture stands.

    Args:
        segments: int64[b, t], see `vfjax.fusion.segments.parallel`.
        mask: bool[b, t].
        count: of the branches.
        place: int64[b, t, 3]; then p is 3. None: all zero, p is 1.
        steps: int64[b, t]; None: all one.
    """
    before, after = (pad(segments, (1, 1))[:, at : at + mask.shape[1]] for at in (0, 2))
    first = (segments > 0) & ((before == 0) | (before > segments))
    last = (segments > 0) & ((after == 0) | (after < segments))
    taken = torch.where(mask, 1 if steps is None else steps, 0)
    own = torch.zeros_like(segments)  # positions of its branch in this picture before it
    longest = own
    for k in range(1, count + 1):
        here = torch.where(segments == k, taken, 0)
        total = here.cumsum(1)
        inside = total - torch.where(first, total - here, 0).cummax(1).values
        own = torch.where(segments == k, inside - here, own)
        longest = torch.maximum(longest, inside)
    words = torch.where(segments == 0, taken, 0)
    passed = torch.where(last, longest, 0)
    start = words.cumsum(1) - words + passed.cumsum(1) - passed + own
    return start[None] if place is None else start[None] + place.movedim(-1, 0)


def block(segments: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Who may see whom beside the causal mask: all but tokens of two branches.

    Args:
        segments: int64[b, t].

    Returns:
        (row, head, seer, seen) -> bool, as transformers' mask functions; slots of a cache beyond t
        are no branch's.
    """
    most = segments.shape[1] - 1

    def visible(row: Tensor, head: Tensor, seer: Tensor, seen: Tensor) -> Tensor:
        del head
        a, b = segments[row, seer.clamp(max=most)], segments[row, seen.clamp(max=most)]
        return (a == 0) | (b == 0) | (a == b)

    return visible
