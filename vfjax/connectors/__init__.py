"""Connectors: encoder features -> visual tokens in the LLM's width."""

from vfjax.connectors.mlp import MLP, MLPConfig

__all__ = ["MLP", "MLPConfig"]
