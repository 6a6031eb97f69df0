"""Several visual branches and one LLM.

VisionFuse (arXiv 2412.01289): the visual tokens of all branches, one branch after another, stand in
the text where the image was; one LLM reads them all. One branch is an ordinary LLaVA. Other ways to
combine members are in `vfjax.fusion.modes`.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.tree_util import PyTreeDef

from vfjax.architectures.base import (
    Architecture,
    Embed,
    Encoded,
    Inputs,
    Pictures,
    VisualTokens,
)
from vfjax.errors import InputError
from vfjax.fusion.deep import Deep, deep
from vfjax.fusion.prune import Groups, Prune, pruned
from vfjax.fusion.segments import check_arrangement, parallel, running
from vfjax.llm import Cache, LlamaConfig
from vfjax.sharding import mesh_of, place

Array = jax.Array
AnyArray = jax.Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Text and pictures as arrays of static shape; made by `vfjax.Processor`.

    Attributes:
        tokens: int32[b, t] text ids, 0 at visual slots and padding.
        visual: int32[b, t] which of the batch's visual tokens stands here, -1 for text. They are
            counted branch by branch.
        mask: bool[b, t], False at padding.
        segments: int32[b, t], k + 1 at tokens and marks of branch k, 0 at other text and padding.
        images: branch name -> its share of the pictures; empty when no row has one.
        labels: int32[b, t] ids to learn, -100 where there is none; None outside training.
        groups: what pruning needs to know; None where no visual token goes.
        sizes: visual tokens of each branch, padding included, by which `visual` counts.
        place: int32[b, t, 3], where a picture's token stands from where the picture starts, by
            time, row and column; 0 at text. None where no branch has such places.
        steps: int32[b, t], positions that the text goes on after a token: 1; within a picture with
            places 0, its last token's the picture's span. None as `place`.
    """

    tokens: AnyArray
    visual: AnyArray
    mask: AnyArray
    segments: AnyArray
    images: dict[str, Pictures]
    labels: AnyArray | None = None
    groups: Groups | None = None
    sizes: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    place: AnyArray | None = None
    steps: AnyArray | None = None

    def with_pictures(self, other: "Batch") -> "Batch":
        """These prompts about the pictures of another batch, so that they are encoded once.

        Args:
            other: of the same pictures in the same order, as `encode` gives it back.

        Raises:
            InputError: one of the two has no pictures, or those of another model, or another
                number of them, as far as shapes tell.
        """
        own, given = (dict(zip(b.images, b.sizes, strict=True)) for b in (self, other))
        if own != given:
            raise InputError(
                "batch",
                found=f"visual tokens by branch {own}",
                expected=f"those of the other, {given}",
                fix="make both by one processor, of the same pictures",
            )
        images = {
            name: dataclasses.replace(seen, prompt=self.images[name].prompt)
            for name, seen in other.images.items()
        }
        return dataclasses.replace(self, images=images)

    @property
    def read(self) -> int:
        """Tokens of a row that the LLM reads, at most: t, or what pruning leaves of it."""
        return self.tokens.shape[1] if self.groups is None else self.groups.length


@dataclasses.dataclass(frozen=True)
class BranchConfig:
    """One member's visual path in a model.

    Attributes:
        name: unique in the model.
        architecture: the path (`vfjax.architectures`).
        scaled: whether an LLM that scales its embeddings (Gemma) scales these visual tokens, too:
            the authors' LLMs scale all that they are given, transformers' since 5.12 text alone.
    """

    name: str
    architecture: Architecture
    scaled: bool = True

    @property
    def tokens(self) -> int:
        """Tokens of one picture, at most."""
        return self.architecture.tokens


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """K branches in the order in which their tokens are read, and one LLM.

    Attributes:
        branches: K configs.
        llm: config of an LLM (`vfjax.llm`).
        positions: "running", one branch after another; or "parallel", each where the picture
            stands, the text after the longest.
        mask: "causal", or "block": a branch's tokens don't see another's
            (`vfjax.fusion.segments`).
        prune: which visual tokens the LLM reads; None: all.

    Raises:
        InputError: unknown `positions` or `mask`, `prune` is for another number of branches, or a
            branch places its tokens by three positions and the LLM reads one.
    """

    branches: tuple[BranchConfig, ...]
    llm: LlamaConfig
    positions: str = "running"
    mask: str = "causal"
    prune: Prune | None = None

    def __post_init__(self) -> None:
        if self.prune is not None:
            self.prune.shares(len(self.branches))
        check_arrangement(self.positions, self.mask)
        for branch in self.branches:
            if branch.architecture.axes > self.llm.axes:
                raise InputError(
                    f"branch {branch.name!r}",
                    found="visual tokens placed by time, row and column",
                    expected="an LLM with M-RoPE, which reads such positions",
                    fix="take the LLM's config of a member that has it",
                )

    def branch(self, name: str) -> BranchConfig:
        """The branch of a name."""
        return next(branch for branch in self.branches if branch.name == name)

    def build(self, *, rngs: nnx.Rngs) -> "Model":
        return Model(self, rngs=rngs)


class Model(nnx.Module):
    """K branches and one LLM; K = 0 is a plain LLM."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.branches = nnx.Dict({b.name: b.architecture.build(rngs=rngs) for b in config.branches})
        self.llm = config.llm.build(rngs=rngs)

    @property
    def context(self) -> int:
        """Tokens that the LLM was made for."""
        return self.config.llm.context

    def memory(self, name: str, images: Mapping[str, Pictures], embed: Embed) -> VisualTokens:
        """A branch's visual tokens of all pictures as the LLM reads them.

        Args:
            name: of the branch.
            images: of a batch.
            embed: the LLM's embedding table (`Llama.lookup`).
        """
        seen, branch = images[name], self.branches[name]
        if isinstance(seen.given, VisualTokens):  # of `encode`
            return jax.tree.map(jnp.asarray, seen.given)
        states = seen.given if isinstance(seen.given, Encoded) else branch.encode(seen.given)
        memory = branch.visual_tokens(states, embed, prompt=seen.prompt, key=seen.key)
        values = memory.values.astype(self.llm.embedding.dtype)
        if self.config.branch(name).scaled:
            values = self.llm.scaled(values)
        memory = dataclasses.replace(memory, values=values)
        return memory if seen.gather is None else seen.gather(memory)

    def memories(self, images: Mapping[str, Pictures]) -> list[VisualTokens]:
        """Each branch's visual tokens; none where no row has a picture."""
        names = [branch.name for branch in self.config.branches] if images else []
        return [self.memory(name, images, self.llm.lookup) for name in names]

    def visual_tokens(self, images: Mapping[str, Pictures]) -> VisualTokens:
        """All branches' memories one after another, without what `deep` adds within the LLM."""
        return _concatenate(self.memories(images))

    def deep(self, batch: Batch, mask: Array, memories: Sequence[VisualTokens]) -> Deep | None:
        """What the visual tokens are given within the LLM; see `vfjax.fusion.deep`."""
        branches = [self.branches[branch.name] for branch in self.config.branches]
        return deep(jnp.asarray(batch.visual), mask, memories, branches[: len(memories)])

    def embed(self, batch: Batch) -> tuple[Array, Array]:
        """Text embeddings with the visual tokens spliced in, and where something is read."""
        text = self.llm.embed(jnp.asarray(batch.tokens))
        x, mask = splice(text, batch, self.memories(batch.images))
        return x, mask

    def read(self, batch: Batch, cache: Cache | None = None) -> tuple[Array, Array, Cache | None]:
        """The LLM on a batch, as `ModelConfig.positions` and `mask` say.

        Returns:
            [b, t, d] hidden states, undefined where nothing is read; bool[b, t], where something
            is; and the cache, which must have been new, with it all. Where tokens are pruned, t is
            `batch.read`, and rows are filled from the left.
        """
        text = self.llm.embed(jnp.asarray(batch.tokens))
        memories = self.memories(batch.images)
        x, mask = splice(text, batch, memories)
        more = self.deep(batch, mask, memories)
        segments = jnp.asarray(batch.segments)
        positions, count = None, len(self.config.branches)
        apart = count > 1 and self.config.mask == "block"
        if count > 1 and self.config.positions == "parallel":
            positions = parallel(segments, mask, count, batch.place, batch.steps)
        elif batch.place is not None and batch.steps is not None:
            positions = running(mask, jnp.asarray(batch.place), jnp.asarray(batch.steps))
        if self.config.prune is not None and batch.groups is not None:
            x, mask, segments, positions, more = pruned(
                self.config.prune, batch.groups, self.llm, apart, x, mask, segments, positions, more
            )
        hidden, cache = self.llm(x, mask, cache, positions, segments if apart else None, more)
        return hidden, mask, cache

    def __call__(self, batch: Batch) -> Array:
        """Logits float32[b, t, vocab], t as in `read`; undefined at padding."""
        return self.llm.logits(self.read(batch)[0])

    def prefill(self, batch: Batch, size: int) -> tuple[Array, Cache]:
        """Reads the batch into a new cache of `size` slots.

        Returns:
            float32[b, vocab] logits after each row's last real token, and the cache.
        """
        empty = self.llm.new_cache(batch.tokens.shape[0], size)
        hidden, mask, cache = self.read(batch, empty)
        assert cache is not None
        return self.llm.logits(at_last(hidden, mask)), cache

    def next(self, tokens: Array, cache: Cache) -> tuple[Array, Cache]:
        """Reads int32[b] tokens, one a row: logits float32[b, vocab] after them, and the cache."""
        x = self.llm.embed(tokens[:, None])
        hidden, read = self.llm(x, jnp.ones((len(tokens), 1), bool), cache)
        assert read is not None
        return self.llm.logits(hidden[:, 0]), read


def splice(text: Array, batch: Batch, memories: Sequence[VisualTokens]) -> tuple[Array, Array]:
    """Text embeddings with the visual tokens spliced in.

    LLaVA's prepare_inputs_labels_for_multimodal (llava/model/llava_arch.py).

    Args:
        text: [b, t, d] embeddings of `batch.tokens`.
        batch: whose visual tokens are numbered through the memories.
        memories: one a branch; none where no row has a picture.

    Returns:
        [b, t, d] embeddings, zero where nothing is read; and bool[b, t], where something is:
        `batch.mask` without the visual tokens that a connector leaves out.
    """
    x, mask = text, jnp.asarray(batch.mask)
    if memories:
        memory = _concatenate(memories)
        visual = jnp.asarray(batch.visual)
        at, seen = jnp.maximum(visual, 0), (visual >= 0)[..., None]
        x = jnp.where(seen, memory.values[at], x)
        mask &= (visual < 0) | memory.keep[at]
    return jnp.where(mask[..., None], x, 0), mask


def _concatenate(memories: Sequence[VisualTokens]) -> VisualTokens:
    """One memory of all, without what they are given within the LLM."""
    return VisualTokens(
        jnp.concatenate([memory.values for memory in memories]),
        jnp.concatenate([memory.keep for memory in memories]),
    )


def at_last(hidden: Array, mask: Array) -> Array:
    """Of [b, t, d] the states at each row's last token that bool[b, t] `mask` has, [b, d]."""
    last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]


@jax.jit
def forward(model: Model, batch: Batch) -> Array:
    """`model(batch)`, compiled: logits float32[b, t, vocab]."""
    return model(batch)


def encode(model: Model, batch: Batch) -> Batch:
    """The batch with its pictures encoded, so that other prompts about them need not do it again.

    `other.with_pictures(encode(model, batch))` takes them over. Of a branch whose visual tokens the
    prompt chooses (SliME's router) the encoder's states are kept, of others the visual tokens.

    Args:
        model: any; of a `CacheFusion` its `merged`.
        batch: of the model's processor.
    """
    leaves, tree = jax.tree.flatten(model)
    images = _encoded(leaves, tree, place(batch.images, mesh_of(leaves)))
    return dataclasses.replace(batch, images=images)


@functools.partial(jax.jit, static_argnames="tree")
def _encoded(
    leaves: list[Array], tree: PyTreeDef, images: dict[str, Pictures]
) -> dict[str, Pictures]:
    model: Model = jax.tree.unflatten(tree, leaves)
    out: dict[str, Pictures] = {}
    for name, seen in images.items():
        if not model.config.branch(name).architecture.reads_text:
            memory = model.memory(name, images, model.llm.lookup)
            out[name] = Pictures(dataclasses.replace(memory, stages={}))
        elif isinstance(seen.given, Inputs):
            given = model.branches[name].encode(seen.given)
            out[name] = dataclasses.replace(seen, given=given)
        else:
            out[name] = seen
    return out
