"""Fewer visual tokens before the LLM reads them: a share of each branch's, chosen for each picture.

Not VisionFuse's rule, which is not public (it names pruning as a remedy for K branches' length).
`attention` ranks tokens as FastV's code does (arXiv 2403.06764, whose text has all tokens' looks in
place of the last's): by what the prompt's last token looks at in an early layer; but that layer is
run ahead of the LLM, so that no layer's cache holds what is dropped. `similarity` keeps tokens that
differ from those before them and adds the others to their likest, ToMe's merging (arXiv 2210.09461)
in one step. Tokens that stay keep their positions.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vfjax.errors import InputError, check, counted, one_of
from vfjax.fusion.deep import Deep
from vfjax.fusion.splice import Slots
from vfjax.llm.llama import Attention, Llama, Step
from vfjax.llm.watch import watched, weights

Array = jax.Array
AnyArray = jax.Array | np.ndarray

RULES = ("attention", "similarity")
"""Values of `Prune.by`."""


@dataclasses.dataclass(frozen=True)
class Prune:
    """Which visual tokens the LLM reads.

    Attributes:
        keep: share of a picture's tokens that stay, above 0 and at most 1, rounded up; one for
            all branches, or one each. Where all are 1 nothing is computed.
        by: "attention" or "similarity".
        depth: of "attention": layers after which tokens are ranked; FastV's 2.

    Raises:
        InputError: a value outside of these.
    """

    keep: float | Sequence[float] = 0.5
    by: str = "attention"
    depth: int = 2

    def __post_init__(self) -> None:
        if isinstance(self.keep, list):
            object.__setattr__(self, "keep", tuple(self.keep))
        shares = self.keep if isinstance(self.keep, tuple) else (self.keep,)
        right = all(0 < share <= 1 for share in shares)
        rules = (
            ("prune.keep", self.keep, right, "shares above 0 and at most 1"),
            one_of("prune.by", self.by, RULES),
            ("prune.depth", self.depth, self.depth >= 1, "at least 1 layer"),
        )
        check(rules, fix="choose others")

    def shares(self, count: int) -> tuple[float, ...]:
        """`keep` for each of `count` branches.

        Raises:
            InputError: it has another number of them.
        """
        known = self.keep if isinstance(self.keep, tuple) else (self.keep,)
        shares = known * count if len(known) == 1 else known
        if len(shares) != count:
            raise InputError(
                "prune.keep",
                found=counted(len(shares), "share"),
                expected=f"one for all, or one for each of {count} branches",
                fix="choose as many",
            )
        return shares


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Groups:
    """What `Prune` needs to know of a batch's visual tokens; made by the processor.

    Attributes:
        of: int32[b, t] number of the picture and branch that a token is of, -1 for text.
        most: int32[b, t] how many tokens of its group stay.
        length: of a row with what stays, at most.
    """

    of: AnyArray
    most: AnyArray
    length: int = dataclasses.field(metadata={"static": True})


def pruned(
    prune: Prune,
    groups: Groups,
    llm: Llama,
    apart: bool,
    x: Array,
    mask: Array,
    segments: Array,
    positions: Array | None,
    deep: Deep | None = None,
) -> tuple[Array, Array, Array, Array, Deep | None]:
    """What the LLM reads, without the tokens that go.

    Args:
        prune: the rule.
        groups: of the batch.
        llm: the LLM.
        apart: whether a branch's tokens don't see another's.
        x: [b, t, d] its input.
        mask: bool[b, t].
        segments: int32[b, t] of the batch.
        positions: int32[p, b, t], None counts real tokens.
        deep: what visual tokens are given within the LLM.

    Returns:
        x, mask, segments, positions and deep of `groups.length` tokens a row, in their order.
    """
    if positions is None:
        positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)[None]
    of = jnp.asarray(groups.of)
    visual = mask & (of >= 0)
    alike = visual[:, :, None] & visual[:, None] & (of[:, :, None] == of[:, None])
    if prune.by == "attention":
        score = looked_at(llm, x, mask, positions, segments if apart else None, prune.depth, deep)
        kept = visual & (rank(score, alike) < groups.most)
    else:
        likeness = jnp.where(alike, _cosine(x), -jnp.inf)
        before = jnp.tril(jnp.ones(likeness.shape[1:], bool), -1)
        score = -jnp.where(before, likeness, -jnp.inf).max(axis=-1)
        kept = visual & (rank(score, alike) < groups.most)
        x = merged(x, likeness, visual, kept)
    stay = kept | (mask & ~visual)
    order = jnp.argsort(~stay, axis=1, stable=True)[:, : groups.length]
    mask, segments = (jnp.take_along_axis(a, order, axis=1) for a in (stay, segments))
    positions = jnp.take_along_axis(positions, order[None], axis=2)
    if deep is not None:
        deep = deep.ordered(order, mask)
    return jnp.take_along_axis(x, order[..., None], axis=1), mask, segments, positions, deep


def _cosine(x: Array) -> Array:
    """float32[b, t, t] of [b, t, d]."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.maximum((y * y).sum(axis=-1, keepdims=True), 1e-20))
    return y @ y.transpose(0, 2, 1)


def rank(score: Array, alike: Array) -> Array:
    """How many of its group are before a token, int32[b, t]: of a higher score, or first of equals.

    Args:
        score: float32[b, t].
        alike: bool[b, t, t], whether two are of one group.
    """
    mine, other = score[:, :, None], score[:, None]
    first = jnp.tril(jnp.ones(alike.shape[1:], bool), -1)
    return (alike & ((other > mine) | ((other == mine) & first))).sum(axis=-1, dtype=jnp.int32)


def merged(x: Array, likeness: Array, visual: Array, kept: Array) -> Array:
    """[b, t, d] with each kept visual token the mean of itself and of those that go into it.

    Args:
        x: [b, t, d].
        likeness: float32[b, t, t], minus infinity between groups.
        visual: bool[b, t].
        kept: bool[b, t], at least one of each group.
    """
    nearest = jnp.where(kept[:, None], likeness, -jnp.inf).argmax(axis=-1)
    nearest = jnp.where(kept, jnp.arange(x.shape[1]), nearest)
    takes = visual[:, None] & (nearest[:, None] == jnp.arange(x.shape[1])[:, None])
    takes = takes.astype(jnp.float32)  # [b, to, from]
    mean = takes @ x.astype(jnp.float32) / jnp.maximum(takes.sum(axis=-1, keepdims=True), 1)
    return jnp.where(kept[..., None], mean.astype(x.dtype), x)


def looked_at(
    llm: Llama,
    x: Array,
    mask: Array,
    positions: Array,
    segments: Array | None,
    depth: int,
    deep: Deep | None = None,
) -> Array:
    """Attention from each row's last token, float32[b, t], the mean over heads of layer `depth`.

    Args:
        llm: of which as many layers are run.
        x: [b, t, d] its input.
        mask: bool[b, t].
        positions: int32[p, b, t].
        segments: as `Llama` takes them.
        depth: from 1; a shallower LLM gives its last layer's.
        deep: what visual tokens are given within the LLM.
    """
    last = (mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1))[:, None]
    found: list[Array] = []

    def take(a: Array) -> Array:
        return jnp.take_along_axis(a, last[..., None], axis=1)

    def show(attn: Attention, y: Array, k: Array, step: Step) -> None:
        alone = dataclasses.replace(
            step, cos=take(step.cos), sin=take(step.sin), see=take(step.see)
        )
        found.append(weights(attn, take(y), k, alone).mean(axis=1)[:, 0])

    watched(llm, show, depth)(x, mask, None, positions, segments, deep)
    return found[-1]


def marks(parts: Sequence[Sequence[AnyArray]], shares: Sequence[float]) -> np.ndarray:
    """The group of each visual token of a row, and how many of the group stay: int64[2, n].

    Args:
        parts: of each picture each branch's tokens.
        shares: of each branch that stay.
    """
    sizes = np.array([[len(numbers) for numbers in branches] for branches in parts], np.int64)
    sizes = sizes.reshape(-1, len(shares))
    # Rounded first: 0.07 of 100 are 7, though the product is more in binary.
    most = np.ceil(np.round(sizes * np.asarray(shares), 6)).astype(np.int64)
    return np.stack(
        [np.repeat(np.arange(sizes.size), sizes.ravel()), np.repeat(most, sizes.ravel())]
    )


def group(
    shares: Sequence[float],
    parts: Sequence[Sequence[Sequence[Slots]]],
    visual: np.ndarray,
    mask: np.ndarray,
    bucket_of: Callable[[int], int],
) -> Groups | None:
    """What `Prune` needs to know of a batch; None where all visual tokens stay.

    Args:
        shares: of each branch that stay.
        parts: of each row each picture's tokens by branch.
        visual: int32[b, t] of the batch.
        mask: bool[b, t].
        bucket_of: the length that a row of so many tokens is filled up to.
    """
    if all(share == 1 for share in shares):
        return None
    of, most = np.full(visual.shape, -1, np.int32), np.zeros(visual.shape, np.int32)
    stay = (mask & (visual < 0)).sum(axis=1)
    for i, pictures in enumerate(parts):
        places = np.flatnonzero(visual[i] >= 0)
        numbers = [[s.visual[s.visual >= 0] for s in branches] for branches in pictures]
        marked = marks(numbers, shares)[:, : len(places)]
        of[i, places], most[i, places] = marked
        sizes = np.bincount(marked[0])
        stay[i] += sum(min(k, sizes[g]) for g, k in dict(marked.T.tolist()).items())
    return Groups(of, most, bucket_of(int(stay.max())))
