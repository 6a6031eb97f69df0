"""Two more ways to combine members without training, beside `Model`, whose LLM reads all branches.

Both generate as a `Model` does: `vfjax.generate(model, processor, batch)`. They keep the members'
LLMs, so their memory grows with the number of members.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from vfjax.errors import InputError
from vfjax.fusion.segments import parallel
from vfjax.llm import Cache, Llama, LlamaConfig
from vfjax.llm.cache import Rows, wide
from vfjax.model import Batch, Model, at_last, splice
from vfjax.processor import Processor
from vfjax.rows import Picture
from vfjax.settings import Settings

Array = jax.Array
T = TypeVar("T")


class CacheFusion(nnx.Module):
    """Each branch is read by its member's own LLM; the merged LLM reads the text and writes.

    A member's LLM reads the text and its own branch, as if there were no other, at parallel
    positions (`vfjax.fusion.segments`). Its keys and values of the branch, and the first member's
    of the text before a row's first picture, become the cache from which the merged LLM reads the
    rest of the text. Decoding costs what the merged model's does; the prefill one pass of each LLM.
    """

    def __init__(self, merged: Model, llms: Sequence[Llama], owners: Sequence[int] | None = None):
        """Puts a fusion together.

        Args:
            merged: all branches and the merged LLM.
            llms: the members' own.
            owners: for each branch the number of its LLM; None: there are as many of both.

        Raises:
            InputError: LLMs of another shape than the merged one, a branch without one, or visual
                tokens that are pruned.
        """
        self.merged, self.llms = merged, nnx.List(llms)
        if merged.config.prune is not None:
            raise InputError(
                "prune",
                found=merged.config.prune,
                expected="none where each branch is read by its own LLM",
                fix="prune the merged model, or the members of a LogitsFusion",
            )
        names = [branch.name for branch in merged.config.branches]
        self.owners = tuple(range(len(llms)) if owners is None else owners)
        if len(self.owners) != len(names) or not set(self.owners) <= set(range(len(llms))):
            raise InputError(
                "owners",
                found=f"LLMs {list(self.owners)} of {len(llms)}, for {len(names)} branches",
                expected="the number of an LLM for each of " + (", ".join(names) or "no branch"),
                fix="name the LLM that each branch was trained with",
            )
        for i, llm in enumerate(llms):
            if _shape(llm.config) != _shape(merged.config.llm):
                raise InputError(
                    f"llms[{i}]",
                    found=str(_shape(llm.config)),
                    expected=str(_shape(merged.config.llm)),
                    fix="fuse members of one family",
                )

    @property
    def context(self) -> int:
        """Tokens that the LLMs were made for."""
        return self.merged.context

    def prefill(self, batch: Batch, size: int) -> tuple[Array, Cache]:
        """Reads the batch, made by the merged model's processor, into a new cache; see `Model`."""
        merged, branches = self.merged, self.merged.config.branches
        if not batch.images:
            return merged.prefill(batch, size)
        llms = [self.llms[owner] for owner in self.owners]
        memories = [
            merged.memory(branch.name, batch.images, llm.lookup)
            for branch, llm in zip(branches, llms, strict=True)
        ]
        tokens = jnp.asarray(batch.tokens)
        x, mask = splice(merged.llm.embed(tokens), batch, memories)
        deep = merged.deep(batch, mask, memories)
        segments = jnp.asarray(batch.segments)
        positions = parallel(segments, mask, len(branches), batch.place, batch.steps)
        text, pictured = segments == 0, jnp.cumsum(segments, axis=1) > 0
        before = text & ~pictured & pictured[:, -1:]  # the text before the first picture

        joined = empty = merged.llm.new_cache(len(tokens), size)
        hidden = jnp.zeros_like(x)
        for k, llm in enumerate(llms):
            theirs, _ = splice(llm.embed(tokens), batch, memories)
            own = segments == k + 1
            state, cache = llm(theirs, mask & (text | own), empty, positions, deep=deep)
            assert cache is not None
            mine = mask & (own | before if k == 0 else own)
            hidden = jnp.where(mine[..., None], state, hidden)
            joined = _join(joined, cache, mine)

        rest = mask & ~joined.mask[:, : mask.shape[1]]
        filled = _Filled(**_fields(joined), held=joined.mask)
        state, read = merged.llm(x, rest, filled, positions, deep=deep)
        assert read is not None
        hidden = jnp.where(rest[..., None], state, hidden)  # of a branch where it ends the row
        return merged.llm.logits(at_last(hidden, mask)), Cache(**_fields(read))

    def next(self, tokens: Array, cache: Cache) -> tuple[Array, Cache]:
        """One step of the merged LLM; see `Model.next`."""
        return self.merged.next(tokens, cache)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Filled(Cache):
    """A cache some of whose next slots hold tokens already, bool[b, s] `held`: they stay.

    Slots are in the order of the text, so that new tokens see the held ones before them.
    """

    held: Array

    def extend(self, mask: Array, positions: Array | None = None) -> tuple["_Filled", Array, Array]:
        room = self.held[:, : mask.shape[1]]
        cache, positions, see = super().extend(mask | room, positions)
        return cache, positions, see

    def write(
        self, layer: int, k: Array, v: Array, seen: int
    ) -> tuple[tuple[Rows, Rows], tuple[Array, Array]]:
        new, _ = super().write(layer, k, v, seen)
        kept = _choose(self.held, (self.k[layer], self.v[layer]), new)
        return kept, (wide(kept[0], k.dtype)[..., :seen], wide(kept[1], v.dtype)[:, :, :seen])


def _choose(take: Array, a: tuple[T, T], b: tuple[T, T]) -> tuple[T, T]:
    """Keys and values of one cache in the slots bool[b, s] `take`, of another elsewhere."""
    slots = take[:, None, None, :], take[:, None, :, None]
    keys, values = (
        jax.tree.map(functools.partial(jnp.where, mine), one, other)
        for mine, one, other in zip(slots, a, b, strict=True)
    )
    return keys, values


def _fields(cache: Cache) -> dict[str, Any]:
    return {field.name: getattr(cache, field.name) for field in dataclasses.fields(Cache)}


def _join(joined: Cache, cache: Cache, mine: Array) -> Cache:
    """A cache with another's slots where bool[b, t] `mine`."""
    mine = jnp.pad(mine, ((0, 0), (0, joined.mask.shape[1] - mine.shape[1])))
    k, v = _choose(mine, (cache.k, cache.v), (joined.k, joined.v))
    return dataclasses.replace(joined, k=k, v=v, mask=joined.mask | mine)


def _shape(config: LlamaConfig) -> LlamaConfig:
    """An LLM's config without what members may differ in."""
    return dataclasses.replace(config, vocab=0, context=0, rope_axes=())


class LogitsFusion(nnx.Module):
    """Members side by side, each with its own branch, prompt and LLM.

    The mean of their probabilities chooses each next token. All costs are the sum of the members'.
    """

    def __init__(self, members: Sequence[Model]):
        """Puts a fusion together.

        Raises:
            InputError: no member, or vocabularies of different sizes.
        """
        self.members = nnx.List(members)
        sizes = [member.config.llm.vocab for member in members]
        if len(set(sizes)) != 1:
            raise InputError(
                "members",
                found=f"vocabularies of {', '.join(map(str, sizes)) or 'none'}",
                expected="members that all have the same one",
                fix="choose others",
            )

    @property
    def context(self) -> int:
        """Tokens that all members were made for."""
        return min(member.context for member in self.members)

    def prefill(self, batch: tuple[Batch, ...], size: int) -> tuple[Array, tuple[Cache, ...]]:
        """Reads one batch a member; log-probabilities float32[b, vocab], and the caches."""
        pairs = zip(self.members, batch, strict=True)
        return _average([member.prefill(own, size) for member, own in pairs])

    def next(self, tokens: Array, cache: tuple[Cache, ...]) -> tuple[Array, tuple[Cache, ...]]:
        """Reads int32[b] tokens: log-probabilities float32[b, vocab], and the caches."""
        pairs = zip(self.members, cache, strict=True)
        return _average([member.next(tokens, own) for member, own in pairs])


def _average(found: Sequence[tuple[Array, Cache]]) -> tuple[Array, tuple[Cache, ...]]:
    """The logarithm of the mean probabilities of several logits, and their caches."""
    logits, caches = zip(*found, strict=True)
    shares = jax.nn.log_softmax(jnp.stack(logits), axis=-1)
    return jax.nn.logsumexp(shares, axis=0) - jnp.log(len(logits)), tuple(caches)


@dataclasses.dataclass(frozen=True)
class MemberProcessors:
    """Makes the batches of a `LogitsFusion`: every member sees the pictures, and its own prompt.

    Attributes:
        processors: one a member.

    Raises:
        InputError: tokenizers that don't give the same ids.
    """

    processors: tuple[Processor, ...]

    def __post_init__(self) -> None:
        known = [p.tokenizer.get_vocab() for p in self.processors if p.tokenizer is not None]
        if any(vocab != known[0] for vocab in known):
            raise InputError(
                "members",
                found="tokenizers with different ids",
                expected="the same vocabulary",
                fix="choose members of one family",
            )

    @property
    def stops(self) -> tuple[int, ...]:
        """Token ids that end any member's answer."""
        return tuple(sorted({i for p in self.processors for i in p.stops}))

    @property
    def settings(self) -> Settings:
        """Of generation; raises InputError if members have others."""
        first, *others = (p.settings for p in self.processors)
        for other in others:
            if other != first:
                raise InputError(
                    "members: generation_config.json",
                    found=f"{first} and {other}",
                    expected="the same settings in all",
                    fix="make the files alike",
                )
        return first

    def chat(self, question: str, *, images: int | None = None) -> tuple[str, ...]:
        """Each member's prompt; see `Processor.chat`."""
        return tuple(p.chat(question, images=images) for p in self.processors)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of new token ids; see `Processor.decode`, of the first member."""
        return self.processors[0].decode(ids)

    def __call__(
        self,
        images: Sequence[Picture | Sequence[Picture]] | None = None,
        prompts: Sequence[str | tuple[str, ...]] | None = None,
        *,
        input_ids: Sequence[Sequence[int]] | None = None,
        padding: str = "right",
    ) -> tuple[Batch, ...]:
        """One batch a member, as its own `Processor` makes it.

        Args:
            images: pictures or videos in the order of the placeholders, or one list a row.
            prompts: for each row each member's, from `chat`, or one for all.
            input_ids: in place of prompts, ids with -200 at each picture, the same for all members.
            padding: side on which short rows are filled, "right" or "left".
        """
        return tuple(
            processor(
                images,
                None if prompts is None else [p if isinstance(p, str) else p[i] for p in prompts],
                input_ids=input_ids,
                padding=padding,
            )
            for i, processor in enumerate(self.processors)
        )
