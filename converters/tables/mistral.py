"""Mistral (transformers MistralForCausalLM): Llama's decoder with a window."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from converters.tables import llama
from vfjax.llm import LlamaConfig


def config(hf: Mapping[str, Any]) -> LlamaConfig:
    """Missing keys have the defaults of transformers' MistralConfig.

    Within its sliding window the model is Llama's; the context is cut to that.
    """
    defaults = {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
    }
    return windowed(llama.config(defaults | dict(hf)), hf.get("sliding_window", 4096))


def windowed(config: LlamaConfig, window: int | None) -> LlamaConfig:
    """The config with its context cut to the window, None for none."""
    return dataclasses.replace(config, context=min(config.context, window or config.context))


TABLE = dataclasses.replace(
    llama.TABLE, types=("mistral",), config=config, architecture="MistralForCausalLM"
)
