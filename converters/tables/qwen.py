"""Qwen2, Qwen2.5 and Qwen3 (transformers Qwen2ForCausalLM, Qwen3ForCausalLM)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from converters.rules import Rule
from converters.tables import llama
from vfjax import InputError
from vfjax.llm import LlamaConfig

DEFAULTS = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}
"""Of transformers' Qwen2Config and Qwen3Config, where they differ from LlamaConfig's."""


def qwen2(hf: Mapping[str, Any]) -> LlamaConfig:
    """Biases on queries, keys and values only.

    Raises:
        InputError: a sliding window is switched on.
    """
    return dataclasses.replace(_config(hf), qkv_bias=True, out_bias=False)


def qwen3(hf: Mapping[str, Any]) -> LlamaConfig:
    """Norms on queries and keys.

    Raises:
        InputError: a sliding window is switched on.
    """
    return dataclasses.replace(_config({"head_dim": 128} | dict(hf)), qk_norm=True)


def _config(hf: Mapping[str, Any]) -> LlamaConfig:
    if hf.get("use_sliding_window"):
        raise InputError(
            "config.json: use_sliding_window", found=True, expected=False, fix="not supported yet"
        )
    return llama.config(DEFAULTS | dict(hf))


TABLES = (
    dataclasses.replace(
        llama.TABLE, types=("qwen2",), config=qwen2, architecture="Qwen2ForCausalLM"
    ),
    dataclasses.replace(
        llama.TABLE,
        types=("qwen3",),
        config=qwen3,
        architecture="Qwen3ForCausalLM",
        rules=(
            *llama.TABLE.rules,
            Rule(llama.LAYER + "self_attn.q_norm.weight", "blocks/{}/attn/q_norm/scale"),
            Rule(llama.LAYER + "self_attn.k_norm.weight", "blocks/{}/attn/k_norm/scale"),
        ),
    ),
)
