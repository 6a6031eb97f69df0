"""Connectors: hidden states of the encoders -> visual tokens in the LLM's width.

A connector's config is a frozen dataclass with `taps` (encoder -> hidden states that are read),
`channels` (encoder -> how many of them are joined, their channels), `dout` (the LLM's width) and
`build(rngs=)`; the connector is called with `(states, inputs, embed)` and names its stages.
"""

from vfjax.connectors.combine import Combine, dense
from vfjax.connectors.comm import COMM, COMMConfig, MergeConfig
from vfjax.connectors.llava import LLaVA, LLaVAConfig
from vfjax.connectors.mining import Mining, MiningConfig
from vfjax.connectors.mlp import MLP, MLPConfig
from vfjax.connectors.slime import SliME, SliMEConfig

__all__ = [
    "COMM",
    "MLP",
    "COMMConfig",
    "Combine",
    "LLaVA",
    "LLaVAConfig",
    "MLPConfig",
    "MergeConfig",
    "Mining",
    "MiningConfig",
    "SliME",
    "SliMEConfig",
    "dense",
]
