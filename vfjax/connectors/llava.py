"""LLaVA's connector, and Dense Connector's: joined hidden states through a projector.

LLaVA llava/model/llava_arch.py; DenseConnector llava/model/multimodal_encoder (arXiv 2405.13800).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from vfjax.connectors.combine import Combine
from vfjax.connectors.mlp import MLPConfig
from vfjax.nn.layers import param

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class LLaVAConfig:
    """What is read, how it is joined and projected; `newline` is LLaVA-NeXT's end of a row."""

    projector: MLPConfig
    combine: Combine = Combine()
    newline: bool = False

    @property
    def act(self) -> str:
        """Activation of the projector."""
        return self.projector.act

    @property
    def taps(self) -> dict[str, tuple[int, ...]]:
        """Hidden states that are read of each encoder."""
        return {"encoder": self.combine.taps}

    @property
    def channels(self) -> dict[str, tuple[int, int]]:
        """Encoder -> hidden states that are joined on channels, channels of all of them."""
        return {"encoder": (self.combine.width(1), self.projector.din)}

    @property
    def dout(self) -> int:
        """The LLM's width."""
        return self.projector.dout

    def build(self, *, rngs: nnx.Rngs) -> "LLaVA":
        return LLaVA(self, rngs=rngs)


class LLaVA(nnx.Module):
    """Hidden states -> visual tokens."""

    def __init__(self, config: LLaVAConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.projector = config.projector.build(rngs=rngs)
        if config.newline:
            self.newline = param((config.projector.dout,), ("embed",), rngs=rngs)

    def __call__(
        self,
        states: Mapping[str, Sequence[Array]],
        inputs: Mapping[str, Array],
        embed: Callable[[Array], Array],
    ) -> dict[str, Array]:
        """Stages up to the visual tokens.

        Args:
            states: "encoder": hidden states [n, 1 + s, d] at the taps.
            inputs: not read.
            embed: not read.

        Returns:
            vision_features [n, s, d], connector_features [n, s', d'], image_features [n, s', D],
            tokens [n * s', D] with the newline behind them.
        """
        del inputs, embed
        plain, joined = self.config.combine(states["encoder"])
        projected = self.projector(joined)
        tokens = projected.reshape(-1, projected.shape[-1])
        if self.config.newline:
            tokens = jnp.concatenate([tokens, self.newline[...][None].astype(tokens.dtype)])
        return {
            "vision_features": plain,
            "connector_features": joined,
            "image_features": projected,
            "tokens": tokens,
        }
