"""Several visual branches and one LLM.

VisionFuse (arXiv 2412.01289): the visual tokens of all branches, one branch after another, stand in
the text where the image was; one LLM reads them all. One branch is an ordinary LLaVA.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vfjax.images import ImageSpec
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
            counted branch by branch, picture by picture.
        mask: bool[b, t], False at padding.
        images: branch name -> the branch's inputs, {"pixels": float32[n, h, w, 3]}; empty when no
            row has a picture.
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
        images: the preprocessing.
        taps: hidden states that are read, joined on channels if several.
        drop: leading tokens (class, registers) that are left out.
    """

    name: str
    encoder: Any
    connector: Any
    images: ImageSpec
    taps: tuple[int, ...] = (-2,)
    drop: int = 1

    @property
    def tokens(self) -> int:
        """Visual tokens of one picture."""
        return self.encoder.prefix + self.encoder.tokens - self.drop


class Branch(nnx.Module):
    """A member's pictures -> visual tokens in the LLM's width."""

    def __init__(self, config: BranchConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = config.encoder.build(rngs=rngs)
        self.connector = config.connector.build(rngs=rngs)

    def features(self, inputs: Mapping[str, AnyArray]) -> Array:
        """Encoder features [n, tokens, d_encoder] that enter the connector."""
        states = self.encoder(jnp.asarray(inputs["pixels"]), self.config.taps)
        return jnp.concatenate([s[:, self.config.drop :] for s in states], axis=-1)

    def __call__(self, inputs: Mapping[str, AnyArray]) -> Array:
        """Visual tokens [n, tokens, d] of {"pixels": float[n, h, w, 3]}."""
        return self.connector(self.features(inputs))


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

    def visual_tokens(self, images: Mapping[str, Mapping[str, AnyArray]]) -> Array:
        """All visual tokens [sum of n * tokens, d], branch by branch, picture by picture."""
        dtype = self.llm.embedding.dtype
        tokens = [self.branches[b.name](images[b.name]) for b in self.config.branches]
        return jnp.concatenate([t.reshape(-1, t.shape[-1]).astype(dtype) for t in tokens])

    def embed(self, batch: Batch) -> Array:
        """Text embeddings with the visual tokens spliced in, [b, t, d]; zero at padding.

        LLaVA's prepare_inputs_labels_for_multimodal (llava/model/llava_arch.py).
        """
        x = self.llm.embed(jnp.asarray(batch.tokens))
        if batch.images:
            visual = self.visual_tokens(batch.images)
            x = jnp.where(batch.visual[..., None] < 0, x, visual[jnp.maximum(batch.visual, 0)])
        return jnp.where(batch.mask[..., None], x, 0)

    def __call__(self, batch: Batch) -> Array:
        """Logits float32[b, t, vocab]; undefined at padding."""
        hidden, _ = self.llm(self.embed(batch), jnp.asarray(batch.mask))
        return self.llm.logits(hidden)

    def prefill(self, batch: Batch, size: int) -> tuple[Array, Cache]:
        """Reads the batch into a new cache of `size` slots.

        Returns:
            float32[b, vocab] logits after each row's last real token, and the cache.
        """
        cache = self.llm.new_cache(batch.tokens.shape[0], size)
        hidden, cache = self.llm(self.embed(batch), jnp.asarray(batch.mask), cache)
        t = batch.mask.shape[1]
        last = t - 1 - jnp.argmax(batch.mask[:, ::-1], axis=1)
        hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        return self.llm.logits(hidden), cache


@jax.jit
def forward(model: Model, batch: Batch) -> Array:
    """`model(batch)`, compiled: logits float32[b, t, vocab]."""
    return model(batch)
