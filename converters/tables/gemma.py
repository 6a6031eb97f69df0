"""Gemma (transformers GemmaForCausalLM)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from converters.tables import llama
from vfjax.llm import LlamaConfig

DEFAULTS = {
    "vocab_size": 256000,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
"""Of transformers' GemmaConfig, where they differ from LlamaConfig's."""


def config(hf: Mapping[str, Any]) -> LlamaConfig:
    """Gemma's published `hidden_act`, "gelu", means the tanh form unless `hidden_activation` says.

    Early transformers (4.38) took it to the letter; folders made with that say so by
    `hidden_activation`.
    """
    act = hf.get("hidden_activation") or hf.get("hidden_act", "gelu_pytorch_tanh")
    if act == "gelu" and not hf.get("hidden_activation"):
        act = "gelu_pytorch_tanh"
    return dataclasses.replace(llama.config(DEFAULTS | dict(hf)), act=act, gemma=True)


TABLE = dataclasses.replace(
    llama.TABLE, types=("gemma",), config=config, architecture="GemmaForCausalLM"
)
