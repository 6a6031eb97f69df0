"""LLaVA's projectors, `linear` and `mlpNx_gelu`.

LLaVA llava/model/multimodal_projector/builder.py.
"""

import dataclasses

import jax
from flax import nnx

from vfjax.architectures.combine import Combine
from vfjax.nn.layers import ACTIVATIONS, linear

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class MLPConfig:
    """`layers` dense layers with an activation between; one layer is LLaVA's `linear`."""

    din: int
    dout: int
    layers: int = 2
    act: str = "gelu"
    bias: bool = True

    def build(self, *, rngs: nnx.Rngs) -> "MLP":
        return MLP(self, rngs=rngs)


class Projecting:
    """Of a connector's config: what is read of the encoder is joined, and ends in a projector."""

    projector: MLPConfig
    combine: Combine

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


class MLP(nnx.Module):
    """Features float[n, s, din] -> visual tokens float[n, s, dout]."""

    def __init__(self, config: MLPConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        self.layers = nnx.List(
            linear(c.dout if i else c.din, c.dout, (None, "embed"), bias=c.bias, rngs=rngs)
            for i in range(c.layers)
        )

    def __call__(self, features: Array) -> Array:
        x = self.layers[0](features.astype(self.layers[0].kernel.dtype))
        for layer in self.layers[1:]:
            x = layer(ACTIVATIONS[self.config.act](x))
        return x
