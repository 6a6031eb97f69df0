"""Phi-3 (transformers Phi3ForCausalLM)."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from converters.rules import TRANSPOSE, Rule
from converters.tables import llama
from converters.tables.mistral import windowed
from converters.tables.phi import rotary
from vfjax import InputError
from vfjax.llm import Phi3Config

DEFAULTS = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
"""Of transformers' Phi3Config, where they differ from LlamaConfig's."""


def config(hf: Mapping[str, Any]) -> Phi3Config:
    """Missing keys have the defaults of transformers' Phi3Config.

    Within its sliding window, and within its original context where LongRoPE stretches that, the
    model is this one; the context is cut to them.

    Raises:
        InputError: a rotary scaling other than LongRoPE, or factors of another number.
    """
    hf = DEFAULTS | dict(hf)
    new = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    stretched = new.get("rope_type", new.get("type")) in ("longrope", "su")
    theta = new.get("rope_theta", hf.get("rope_theta"))
    unscaled = {"rope_parameters": None, "rope_scaling": None, "rope_theta": theta}
    made = llama.config(hf | unscaled if stretched else hf)
    made = windowed(dataclasses.replace(made, rotary=rotary(hf, 1.0)), hf.get("sliding_window"))
    if not stretched:
        return Phi3Config(**vars(made))
    original = int(hf.get("original_max_position_embeddings", 4096))  # not that of the scaling
    short, features = tuple(new["short_factor"]), int(made.head_dim * made.rotary)
    if len(short) != features // 2:
        raise InputError(
            "config.json: short_factor",
            found=f"{len(short)} numbers",
            expected=f"{features // 2}, half the rotated features of a head",
            fix="use the published config.json",
        )
    factor = new.get("factor") or hf["max_position_embeddings"] / original
    scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    made = dataclasses.replace(made, context=min(made.context, original))
    return Phi3Config(**vars(made), stretch=short, scale=new.get("attention_factor") or scale)


REPLACED = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
"""Llama's products that are parts of others here."""

TABLE = dataclasses.replace(
    llama.TABLE,
    types=("phi3",),
    config=config,
    rules=(
        *(r for r in llama.TABLE.rules if not any(name in r.source for name in REPLACED)),
        Rule(llama.LAYER + "self_attn.qkv_proj.weight", "blocks/{}/attn/qkv/kernel", TRANSPOSE),
        Rule(llama.LAYER + "mlp.gate_up_proj.weight", "blocks/{}/mlp/gate_up/kernel", TRANSPOSE),
    ),
    architecture="Phi3ForCausalLM",
)
