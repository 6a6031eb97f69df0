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
    made = llama.config(defaults | dict(hf))
    window = hf.get("sliding_window", 4096)
    return dataclasses.replace(made, context=min(made.context, window or made.context))


TABLE = dataclasses.replace(
    llama.TABLE, types=("mistral",), config=config, architecture="MistralForCausalLM"
)
