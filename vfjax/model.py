"""Several visual branches and one LLM.

VisionFuse (arXiv 2412.01289): the visual tokens of all branches, one branch after another, stand in
the text where the image was; one LLM reads them all. One branch is an ordinary LLaVA. Other ways to
combine members are in `vfjax.fusion.modes`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vfjax.errors import InputError
from vfjax.fusion.prune import Groups, Prune, pruned
from vfjax.fusion.segments import MASKS, POSITIONS, parallel, segment_ids
from vfjax.llm import Cache
from vfjax.sharding import mesh_of, place

Array = jax.Array
AnyArray = jax.Array | np.ndarray
Memory = tuple[Array, Array]
"""A branch's visual tokens [m, d], and which of them are read, bool[m]."""

PIXELS, PROMPT = ("pixels", "pixels_aux"), ("text", "text_mask")
"""What of a branch's inputs its encoders alone read, and what is the prompt's."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Text and pictures as arrays of static shape; made by `vfjax.Processor`.

    Attributes:
        tokens: int32[b, t] text ids, 0 at visual slots and padding.
        visual: int32[b, t] which of the batch's visual tokens stands here, -1 for text. They are
            counted branch by branch.
        mask: bool[b, t], False at padding.
        images: branch name -> what its views prepared, such as {"pixels": float32[n, h, w, 3]}, or
            what `encode` makes of it; with videos, "pool" int32[m, p]: m more visual tokens, each
            the largest values of p others; empty when no row has a picture.
        labels: int32[b, t] ids to learn, -100 where there is none; None outside training.
        groups: what pruning needs to know; None where no visual token goes.
        sizes: visual tokens of each branch, padding included, by which `visual` counts.
    """

    tokens: AnyArray
    visual: AnyArray
    mask: AnyArray
    images: dict[str, dict[str, Any]]
    labels: AnyArray | None = None
    groups: Groups | None = None
    sizes: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})

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
        asked = {name: {k: x[k] for k in PROMPT if k in x} for name, x in self.images.items()}
        images = {name: {**seen, **asked[name]} for name, seen in other.images.items()}
        return dataclasses.replace(self, images=images)

    @property
    def read(self) -> int:
        """Tokens of a row that the LLM reads, at most: t, or what pruning leaves of it."""
        return self.tokens.shape[1] if self.groups is None else self.groups.length


@dataclasses.dataclass(frozen=True)
class BranchConfig:
    """One member's visual path.

    Attributes:
        name: unique in the model.
        encoder: config of an encoder (`vfjax.vision.encoders`).
        connector: config of a connector (`vfjax.connectors`).
        views: what the encoders are shown (`vfjax.views`).
        aux: config of a second encoder, None without one.
        scaled: whether an LLM that scales its embeddings (Gemma) scales these visual tokens, too:
            the authors' LLMs scale all that they are given, transformers' since 5.12 text alone.
    """

    name: str
    encoder: Any
    connector: Any
    views: Any
    aux: Any = None
    scaled: bool = True

    @property
    def tokens(self) -> int:
        """Visual tokens of one picture, at most."""
        return self.views.most()


class Branch(nnx.Module):
    """A member's pictures -> visual tokens in the LLM's width."""

    def __init__(self, config: BranchConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = config.encoder.build(rngs=rngs)
        if config.aux is not None:
            self.aux = config.aux.build(rngs=rngs)
        self.connector = config.connector.build(rngs=rngs)

    def states(self, inputs: Mapping[str, Any]) -> dict[str, list[Array]]:
        """Encoder -> the hidden states that the connector taps."""
        if "states" in inputs:  # of `encode`
            return inputs["states"]
        taps = self.config.connector.taps
        states = {"encoder": self.encoder(jnp.asarray(inputs["pixels"]), taps["encoder"])}
        if self.config.aux is not None:
            states["aux"] = self.aux(jnp.asarray(inputs["pixels_aux"]), taps["aux"])
        return states

    def stages(
        self, inputs: Mapping[str, Any], embed: Callable[[Array], Array]
    ) -> dict[str, Array]:
        """All that is computed on the way, by name; the last are the branch's memory.

        Args:
            inputs: what `config.views` prepared, or `encode` made of it.
            embed: the LLM's embedding table, int32[..., t] ids -> [..., t, d] (`Llama.lookup`).

        Returns:
            Among others "tokens" [m, d], the branch's memory of visual tokens, and, if the
            connector leaves some out, "keep" bool[m].
        """
        return self.connector(self.states(inputs), inputs, embed)


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
        InputError: unknown `positions` or `mask`, or `prune` is for another number of branches.
    """

    branches: tuple[BranchConfig, ...]
    llm: Any
    positions: str = "running"
    mask: str = "causal"
    prune: Prune | None = None

    def __post_init__(self) -> None:
        if self.prune is not None:
            self.prune.shares(len(self.branches))
        choices = {"positions": POSITIONS, "mask": MASKS}
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                raise InputError(
                    key,
                    found=repr(getattr(self, key)),
                    expected=" or ".join(map(repr, allowed)),
                    fix="choose one",
                )

    def build(self, *, rngs: nnx.Rngs) -> "Model":
        return Model(self, rngs=rngs)


class Model(nnx.Module):
    """K branches and one LLM; K = 0 is a plain LLM."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.branches = nnx.Dict({b.name: Branch(b, rngs=rngs) for b in config.branches})
        self.llm = config.llm.build(rngs=rngs)

    @property
    def context(self) -> int:
        """Tokens that the LLM was made for."""
        return self.config.llm.context

    def memory(
        self,
        name: str,
        images: Mapping[str, Mapping[str, AnyArray]],
        embed: Callable[[Array], Array],
    ) -> Memory:
        """A branch's visual tokens of all pictures as the LLM reads them; see `Branch.stages`."""
        if "tokens" in images[name]:  # of `encode`
            return jnp.asarray(images[name]["tokens"]), jnp.asarray(images[name]["keep"])
        stages = self.branches[name].stages(images[name], embed)
        tokens = stages["tokens"].astype(self.llm.embedding.dtype)
        if self.branches[name].config.scaled:
            tokens = self.llm.scaled(tokens)
        keep = stages.get("keep", jnp.ones(len(tokens), bool))
        if "pool" not in images[name]:
            return tokens, keep
        pool = images[name]["pool"]  # of videos' frames
        pooled = tokens[pool].max(axis=1), keep[pool].all(axis=1)
        return jnp.concatenate([tokens, pooled[0]]), jnp.concatenate([keep, pooled[1]])

    def memories(self, images: Mapping[str, Mapping[str, AnyArray]]) -> list[Memory]:
        """Each branch's visual tokens; none where no row has a picture."""
        names = [branch.name for branch in self.config.branches] if images else []
        return [self.memory(name, images, self.llm.lookup) for name in names]

    def visual_tokens(self, images: Mapping[str, Mapping[str, AnyArray]]) -> Memory:
        """All branches' memories one after another, [m, d], and which tokens are read, bool[m]."""
        return _concatenate(self.memories(images))

    def embed(self, batch: Batch) -> tuple[Array, Array]:
        """Text embeddings with the visual tokens spliced in: `splice` without the segments."""
        text = self.llm.embed(jnp.asarray(batch.tokens))
        x, mask, _ = splice(text, batch, self.memories(batch.images))
        return x, mask

    def read(self, batch: Batch, cache: Cache | None = None) -> tuple[Array, Array, Any]:
        """The LLM on a batch, as `ModelConfig.positions` and `mask` say.

        Returns:
            [b, t, d] hidden states, undefined where nothing is read; bool[b, t], where something
            is; and the cache, which must have been new, with it all. Where tokens are pruned, t is
            `batch.read`, and rows are filled from the left.
        """
        text = self.llm.embed(jnp.asarray(batch.tokens))
        x, mask, segments = splice(text, batch, self.memories(batch.images))
        positions, count = None, len(self.config.branches)
        apart = count > 1 and self.config.mask == "block"
        if count > 1 and self.config.positions == "parallel":
            positions = parallel(segments, mask, count)
        if self.config.prune is not None and batch.groups is not None:
            x, mask, segments, positions = pruned(
                *(self.config.prune, batch.groups, self.llm, apart),
                *(x, mask, segments, positions),
            )
        hidden, cache = self.llm(x, mask, cache, positions, segments if apart else None)
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
        return self.llm.logits(at_last(hidden, mask)), cache

    def next(self, tokens: Array, cache: Cache) -> tuple[Array, Cache]:
        """Reads int32[b] tokens, one a row: logits float32[b, vocab] after them, and the cache."""
        x = self.llm.embed(tokens[:, None])
        hidden, cache = self.llm(x, jnp.ones((len(tokens), 1), bool), cache)
        return self.llm.logits(hidden[:, 0]), cache


def splice(text: Array, batch: Batch, memories: Sequence[Memory]) -> tuple[Array, Array, Array]:
    """Text embeddings with the visual tokens spliced in.

    LLaVA's prepare_inputs_labels_for_multimodal (llava/model/llava_arch.py).

    Args:
        text: [b, t, d] embeddings of `batch.tokens`.
        batch: whose visual tokens are numbered through the memories.
        memories: one a branch; none where no row has a picture.

    Returns:
        [b, t, d] embeddings, zero where nothing is read; bool[b, t], where something is:
        `batch.mask` without the visual tokens that a connector leaves out; and int32[b, t], whose
        token it is (`segment_ids`).
    """
    x, mask = text, jnp.asarray(batch.mask)
    segments = jnp.zeros(mask.shape, jnp.int32)
    if memories:
        visual, keep = _concatenate(memories)
        at = jnp.maximum(batch.visual, 0)
        x = jnp.where(batch.visual[..., None] < 0, x, visual[at])
        mask &= (batch.visual < 0) | keep[at]
        segments = segment_ids(batch.visual, [len(tokens) for tokens, _ in memories])
    return jnp.where(mask[..., None], x, 0), mask, segments


def _concatenate(memories: Sequence[Memory]) -> Memory:
    tokens, keep = zip(*memories, strict=True)
    return jnp.concatenate(tokens), jnp.concatenate(keep)


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
    leaves: list[Array], tree: Any, images: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    model: Model = jax.tree.unflatten(tree, leaves)
    out: dict[str, dict[str, Any]] = {}
    for name, inputs in images.items():
        branch = model.branches[name]
        if branch.config.views.reads_text:
            rest = {key: x for key, x in inputs.items() if key not in PIXELS}
            out[name] = {**rest, "states": branch.states(inputs)}
        else:
            tokens, keep = model.memory(name, images, model.llm.lookup)
            out[name] = {"tokens": tokens, "keep": keep}
    return out
