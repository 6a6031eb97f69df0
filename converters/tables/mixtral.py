"""Mixtral (transformers MixtralForCausalLM)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from converters.rules import TRANSPOSE, Rule
from converters.tables import llama
from converters.tables.mistral import windowed
from vfjax.llm import MixtralConfig

DEFAULTS = {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096 * 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}
"""Of transformers' MixtralConfig, where they differ from LlamaConfig's."""

EXPERT = llama.LAYER + "block_sparse_moe.experts.{}."


def config(hf: Mapping[str, Any]) -> MixtralConfig:
    """Missing keys have the defaults of transformers' MixtralConfig."""
    made = windowed(llama.config(DEFAULTS | dict(hf)), hf.get("sliding_window"))
    experts, chosen = hf.get("num_local_experts", 8), hf.get("num_experts_per_tok", 2)
    return MixtralConfig(**vars(made), experts=experts, chosen=chosen)


TABLE = dataclasses.replace(
    llama.TABLE,
    types=("mixtral",),
    config=config,
    rules=(
        *(r for r in llama.TABLE.rules if ".mlp." not in r.source),
        Rule(
            llama.LAYER + "block_sparse_moe.gate.weight", "blocks/{}/mlp/router/kernel", TRANSPOSE
        ),
        Rule(EXPERT + "w1.weight", "blocks/{}/mlp/gate", TRANSPOSE, stack=True),
        Rule(EXPERT + "w3.weight", "blocks/{}/mlp/up", TRANSPOSE, stack=True),
        Rule(EXPERT + "w2.weight", "blocks/{}/mlp/down", TRANSPOSE, stack=True),
    ),
    architecture="MixtralForCausalLM",
)
