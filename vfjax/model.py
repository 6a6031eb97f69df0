"""Several visual branches and one LLM.

VisionFuse (arXiv 2412.01289): the visual tokens of all branches, one branch after another, stand in
the text where the image was; one LLM reads them all. One branch is an ordinary LLaVA.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vfjax.llm import Cache

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
        images: branch name -> what its views prepared, such as {"pixels": float32[n, h, w, 3]};
            with videos, "pool" int32[m, p]: m more visual tokens, each the largest values of p
            others; empty when no row has a picture.
        labels: int32[b, t] ids to learn, -100 where there is none; None outside training.
    """

    tokens: AnyArray
    visual: AnyArray
    mask: AnyArray
    images: dict[str, dict[str, AnyArray]]
    labels: AnyArray | None = None


@dataclasses.dataclass(frozen=True)
class BranchConfig:
    """One member's visual path.

    Attributes:
        name: unique in the model.
        encoder: config of an encoder (`vfjax.encoders`).
        connector: config of a connector (`vfjax.connectors`).
        views: what the encoders are shown (`vfjax.views`).
        aux: config of a second encoder, None without one.
    """

    name: str
    encoder: Any
    connector: Any
    views: Any
    aux: Any = None

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

    def stages(
        self, inputs: Mapping[str, AnyArray], embed: Callable[[Array], Array]
    ) -> dict[str, Array]:
        """All that is computed on the way, by name; the last are the branch's memory.

        Args:
            inputs: what `config.views` prepared.
            embed: the LLM's embedding, int32[..., t] ids -> [..., t, d].

        Returns:
            Among others "tokens" [m, d], the branch's memory of visual tokens, and, if the
            connector leaves some out, "keep" bool[m].
        """
        taps = self.config.connector.taps
        states = {"encoder": self.encoder(jnp.asarray(inputs["pixels"]), taps["encoder"])}
        if self.config.aux is not None:
            states["aux"] = self.aux(jnp.asarray(inputs["pixels_aux"]), taps["aux"])
        return self.connector(states, inputs, embed)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """K branches in the order in which their tokens are read, and one LLM.

    `source` is the normal-form description of the checkpoint as JSON text; `converters` writes and
    reads it, vfjax only carries it.
    """

    branches: tuple[BranchConfig, ...]
    llm: Any
    source: str = ""

    def build(self, *, rngs: nnx.Rngs) -> "Model":
        return Model(self, rngs=rngs)


class Model(nnx.Module):
    """K branches and one LLM; K = 0 is a plain LLM."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.branches = nnx.Dict({b.name: Branch(b, rngs=rngs) for b in config.branches})
        self.llm = config.llm.build(rngs=rngs)

    def visual_tokens(self, images: Mapping[str, Mapping[str, AnyArray]]) -> tuple[Array, Array]:
        """All branches' memories one after another, [m, d], and which tokens are read, bool[m]."""
        dtype = self.llm.embedding.dtype
        tokens, keep = [], []
        for branch in self.config.branches:
            inputs = images[branch.name]
            stages = self.branches[branch.name].stages(inputs, self.llm.embed)
            tokens.append(stages["tokens"].astype(dtype))
            keep.append(stages.get("keep", jnp.ones(len(tokens[-1]), bool)))
            if "pool" in inputs:  # of videos' frames
                tokens.append(tokens[-1][inputs["pool"]].max(axis=1))
                keep.append(keep[-1][inputs["pool"]].all(axis=1))
        return jnp.concatenate(tokens), jnp.concatenate(keep)

    def embed(self, batch: Batch) -> tuple[Array, Array]:
        """Text embeddings with the visual tokens spliced in.

        LLaVA's prepare_inputs_labels_for_multimodal (llava/model/llava_arch.py).

        Returns:
            [b, t, d] embeddings, zero where nothing is read, and bool[b, t], where something is:
            `batch.mask` without the visual tokens that a connector leaves out.
        """
        x, mask = self.llm.embed(jnp.asarray(batch.tokens)), jnp.asarray(batch.mask)
        if batch.images:
            visual, keep = self.visual_tokens(batch.images)
            at = jnp.maximum(batch.visual, 0)
            x = jnp.where(batch.visual[..., None] < 0, x, visual[at])
            mask &= (batch.visual < 0) | keep[at]
        return jnp.where(mask[..., None], x, 0), mask

    def __call__(self, batch: Batch) -> Array:
        """Logits float32[b, t, vocab]; undefined at padding."""
        hidden, _ = self.llm(*self.embed(batch))
        return self.llm.logits(hidden)

    def prefill(self, batch: Batch, size: int) -> tuple[Array, Cache]:
        """Reads the batch into a new cache of `size` slots.

        Returns:
            float32[b, vocab] logits after each row's last real token, and the cache.
        """
        cache = self.llm.new_cache(batch.tokens.shape[0], size)
        x, mask = self.embed(batch)
        hidden, cache = self.llm(x, mask, cache)
        last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
        hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        return self.llm.logits(hidden), cache


@jax.jit
def forward(model: Model, batch: Batch) -> Array:
    """`model(batch)`, compiled: logits float32[b, t, vocab]."""
    return model(batch)
