"""Qwen2, Qwen2.5 and Qwen3 (transformers Qwen2ForCausalLM, Qwen3ForCausalLM)."""

import dataclasses

from converters.params import llama
from converters.params.table import Rule
from converters.values import ANY, Unused, Values
from vfjax.llm import LlamaConfig

DEFAULTS = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}
"""Of transformers' Qwen2Config and Qwen3Config, where they differ from LlamaConfig's."""


UNUSED: Unused = {
    **llama.COMMON,
    "dual_chunk_attention_config": ANY,  # of other engines, beyond the context
    "max_window_layers": ANY,  # of the window that is not in use
    "mlp_bias": (False,),
    "sliding_window": ANY,
    "use_mrope": (False,),
    "use_sliding_window": (False,),
}


def qwen2(hf: Values) -> LlamaConfig:
    """Biases on queries, keys and values only."""
    return dataclasses.replace(llama.decoder(hf.over(DEFAULTS)), qkv_bias=True)


def qwen3(hf: Values) -> LlamaConfig:
    """Norms on queries and keys."""
    bias = hf.flag("attention_bias", False)
    made = llama.decoder(hf.over({**DEFAULTS, "head_dim": 128}))
    return dataclasses.replace(made, qkv_bias=bias, out_bias=bias, qk_norm=True)


TABLES = (
    dataclasses.replace(
        llama.TABLE,
        types=("qwen2",),
        read=qwen2,
        unused={**UNUSED, "attention_bias": ANY},  # fixed in its class
        architecture="Qwen2ForCausalLM",
    ),
    dataclasses.replace(
        llama.TABLE,
        types=("qwen3",),
        read=qwen3,
        unused=UNUSED,
        architecture="Qwen3ForCausalLM",
        rules=(
            *llama.TABLE.rules,
            Rule(llama.LAYER + "self_attn.q_norm.weight", "blocks/{}/attn/q_norm/scale"),
            Rule(llama.LAYER + "self_attn.k_norm.weight", "blocks/{}/attn/k_norm/scale"),
        ),
    ),
)
