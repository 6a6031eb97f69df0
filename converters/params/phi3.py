"""Phi-3 (transformers Phi3ForCausalLM)."""

import dataclasses
import math

from converters.params import llama
from converters.params.mistral import windowed
from converters.params.phi import rotary
from converters.params.table import TRANSPOSE, Rule
from converters.values import ANY, Values
from vfjax import InputError
from vfjax.errors import counted
from vfjax.llm import Phi3Config

DEFAULTS = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
"""Of transformers' Phi3Config, where they differ from LlamaConfig's."""


def read(hf: Values) -> Phi3Config:
    """From the keys of transformers' Phi3Config.

    Within its sliding window, and within its original context where LongRoPE stretches that, the
    model is this one; the context is cut to them.

    Raises:
        InputError: a rotary scaling other than LongRoPE, or factors of another number.
    """
    hf, section = hf.over(DEFAULTS), llama.rotary(hf)
    kind = section.choice("rope_type", KINDS, section.choice("type", KINDS, "default"))
    original = hf.whole("original_max_position_embeddings", 4096, least=2, most=llama.VOCABULARY)
    window = hf.whole("sliding_window", None, most=llama.VOCABULARY)
    share = rotary(hf, 1.0)
    made = llama.decoder(hf, positions=lambda hf, _: (llama.base(hf), None))
    made = windowed(dataclasses.replace(made, rotary=share), window)
    if kind == "default":
        section.done(llama.UNSCALED)
        return Phi3Config(**vars(made))
    short, features = section.numbers("short_factor"), int(made.head_dim * share)
    if len(short) != features // 2:
        raise InputError(
            f"{section.where}: short_factor",
            found=counted(len(short), "number"),
            expected=f"{features // 2}, half the rotated features of a head",
            fix="use the published config.json",
        )
    longest = hf.whole("max_position_embeddings", most=llama.VOCABULARY)
    factor = section.number("factor", None) or longest / original
    scale = section.number("attention_factor", None)
    if scale is None:
        scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    section.done({"long_factor": ANY, "original_max_position_embeddings": ANY})
    made = dataclasses.replace(made, context=min(made.context, original))
    return Phi3Config(**vars(made), stretch=short, scale=scale)


KINDS = ("default", "longrope", "su", "yarn")
"""Rotary scalings: all but the first are names of LongRoPE here, as in transformers."""

REPLACED = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
"""Llama's products that are parts of others here."""

TABLE = dataclasses.replace(
    llama.TABLE,
    types=("phi3",),
    read=read,
    unused={
        **llama.PLAIN,
        "embd_pdrop": ANY,
        "full_attn_mod": (1,),  # Phi-4-mini's, of its own code
        "interpolate_factor": (1,),
        "lm_head_bias": (False,),
        "resid_pdrop": ANY,
    },
    rules=(
        *(r for r in llama.TABLE.rules if not any(name in r.source for name in REPLACED)),
        Rule(llama.LAYER + "self_attn.qkv_proj.weight", "blocks/{}/attn/qkv/kernel", TRANSPOSE),
        Rule(llama.LAYER + "mlp.gate_up_proj.weight", "blocks/{}/mlp/gate_up/kernel", TRANSPOSE),
    ),
    architecture="Phi3ForCausalLM",
)
