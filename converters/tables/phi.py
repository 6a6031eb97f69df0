"""Phi-1.5 and Phi-2 (transformers PhiForCausalLM)."""

from collections.abc import Mapping
from typing import Any

from converters.rules import Rule, Table, dense, norm
from converters.tables import llama
from vfjax import InputError
from vfjax.llm import PhiConfig

DEFAULTS = {
    "vocab_size": 51200,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "hidden_act": "gelu_new",
}
"""Of transformers' PhiConfig, where they differ from LlamaConfig's."""


def config(hf: Mapping[str, Any]) -> PhiConfig:
    """Missing keys have the defaults of transformers' PhiConfig.

    Raises:
        InputError: norms on queries and keys.
    """
    if hf.get("qk_layernorm"):
        raise InputError(
            "config.json: qk_layernorm", found=True, expected=False, fix="not supported yet"
        )
    made = llama.config(DEFAULTS | dict(hf))
    return PhiConfig(
        **{
            **vars(made),
            "act": "gelu_pytorch_tanh" if made.act == "gelu_new" else made.act,  # one formula
            "eps": hf.get("layer_norm_eps", 1e-5),
            "qkv_bias": True,
            "out_bias": True,
            "head_bias": True,
            "rotary": rotary(hf, 0.5),
        }
    )


def rotary(hf: Mapping[str, Any], default: float) -> float:
    """Share of a head that is rotated, from the keys of transformers 5 or of older ones."""
    new = hf.get("rope_parameters") or {}
    return new.get("partial_rotary_factor", hf.get("partial_rotary_factor", default))


TABLE = Table(
    types=("phi",),
    config=config,
    rules=(
        Rule("model.embed_tokens.weight", "embedding"),
        *norm(llama.LAYER + "input_layernorm", "blocks/{}/norm"),
        *dense(llama.LAYER + "self_attn.q_proj", "blocks/{}/attn/q"),
        *dense(llama.LAYER + "self_attn.k_proj", "blocks/{}/attn/k"),
        *dense(llama.LAYER + "self_attn.v_proj", "blocks/{}/attn/v"),
        *dense(llama.LAYER + "self_attn.dense", "blocks/{}/attn/out"),
        *dense(llama.LAYER + "mlp.fc1", "blocks/{}/mlp/fc1"),
        *dense(llama.LAYER + "mlp.fc2", "blocks/{}/mlp/fc2"),
        *norm("model.final_layernorm", "norm"),
        *dense("lm_head", "head", like="model.embed_tokens.weight"),
    ),
    architecture="PhiForCausalLM",
    ignore=llama.TABLE.ignore,
)
