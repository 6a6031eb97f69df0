"""Mistral (transformers MistralForCausalLM): Llama's decoder with a window."""

import dataclasses

from converters.params import llama
from converters.values import Values
from vfjax.llm import LlamaConfig

DEFAULTS = {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096 * 32,
    "sliding_window": 4096,
}
"""Of transformers' MistralConfig, where they differ from LlamaConfig's."""


def read(hf: Values) -> LlamaConfig:
    """Within its sliding window the model is Llama's; the context is cut to that."""
    hf = hf.over(DEFAULTS)
    made = llama.decoder(hf)
    return windowed(made, hf.whole("sliding_window", None, most=llama.VOCABULARY))


def windowed(config: LlamaConfig, window: int | None) -> LlamaConfig:
    """The config with its context cut to the window, None for none."""
    return dataclasses.replace(config, context=min(config.context, window or config.context))


TABLE = dataclasses.replace(
    llama.TABLE,
    types=("mistral",),
    read=read,
    unused=llama.PLAIN,
    architecture="MistralForCausalLM",
)
