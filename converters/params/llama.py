"""Llama-family decoders (transformers LlamaForCausalLM)."""

import dataclasses
from collections.abc import Callable

from converters.params.table import TRANSPOSE, Rule, Table, dense
from converters.values import ANY, DEEPEST, PRETRAINED, Unused, Values
from vfjax.llm import LlamaConfig, RopeScaling

LAYER = "model.layers.{}."

VOCABULARY = 1 << 24
"""Most tokens, in a vocabulary or in a text."""


def read(hf: Values) -> LlamaConfig:
    """From the keys of transformers' LlamaConfig."""
    bias = hf.flag("attention_bias", False)
    made = decoder(hf)
    return dataclasses.replace(
        made, qkv_bias=bias, out_bias=bias, mlp_bias=hf.flag("mlp_bias", False)
    )


def decoder(
    hf: Values, eps: str = "rms_norm_eps", positions: "Positions | None" = None
) -> LlamaConfig:
    """What the decoders have in common; missing keys have the defaults of LlamaConfig.

    Args:
        hf: the config.
        eps: the key of the norms' epsilon.
        positions: how rotary positions are read; None: by `rope`.

    Raises:
        InputError: heads that don't fit, or layers of several kinds.
    """
    width, heads = hf.whole("hidden_size", 4096), hf.whole("num_attention_heads", 32)
    kv_heads = hf.whole("num_key_value_heads", None) or heads
    if heads % kv_heads:
        raise hf.error("num_key_value_heads", f"a divisor of the {heads} heads")
    head_dim = hf.whole("head_dim", None) or width // heads
    if not head_dim or head_dim % 2:
        key = "head_dim" if hf.any("head_dim") else "hidden_size"
        raise hf.error(key, f"heads of an even width, {heads} of them")
    layers, kinds = hf.whole("num_hidden_layers", 32, most=DEEPEST), hf.names("layer_types")
    if not all(kind == "full_attention" for kind in kinds):
        raise hf.error("layer_types", "'full_attention' alone", "other layers are not supported")
    if kinds and len(kinds) != layers:
        raise hf.error("layer_types", f"{layers}, one for each of num_hidden_layers")
    context = hf.whole("max_position_embeddings", 2048, most=VOCABULARY)
    theta, scaling = (positions or rope)(hf, context)
    return LlamaConfig(
        vocab=hf.whole("vocab_size", 32000, most=VOCABULARY),
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp=hf.whole("intermediate_size", 11008),
        context=context,
        act=hf.activation("hidden_act", "silu"),
        eps=hf.number(eps, 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tied=hf.flag("tie_word_embeddings", False),
    )


def rotary(hf: Values) -> Values:
    """The section on rotary positions: of transformers before 5 if there is one, or else of 5."""
    old, new = (hf.section(key, None) for key in ("rope_scaling", "rope_parameters"))
    return old if old.data else new


def base(hf: Values) -> float:
    """Base of the rotary positions."""
    return rotary(hf).number("rope_theta", hf.number("rope_theta", 10000.0, least=1), least=1)


def rope(hf: Values, context: int) -> tuple[float, RopeScaling | None]:
    """Base and scaling.

    Args:
        hf: the config.
        context: of the model; a section without its original one means this.

    Raises:
        InputError: a scaling other than Llama-3's, or one that counts within the context.
    """
    section, theta = rotary(hf), base(hf)
    kind = section.choice("rope_type", KINDS, section.choice("type", KINDS, "default"))
    if kind in ("default", "dynamic"):  # which grows the base beyond the context alone
        section.done(UNSCALED)
        return theta, None
    low = section.number("low_freq_factor", least=1e-9)
    scaling = RopeScaling(
        factor=section.number("factor", least=1),
        low=low,
        high=section.number("high_freq_factor"),
        original_context=section.whole(
            "original_max_position_embeddings", context, most=VOCABULARY
        ),
    )
    if scaling.high <= low:
        raise section.error("high_freq_factor", f"more than {low}, the lower one")
    section.done(ROTARY)
    return theta, scaling


Positions = Callable[[Values, int], tuple[float, RopeScaling | None]]

KINDS = ("default", "dynamic", "llama3")
"""Rotary scalings."""

ROTARY: Unused = {"partial_rotary_factor": (1.0,)}

UNSCALED: Unused = ROTARY | dict.fromkeys(
    (
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "factor",
        "high_freq_factor",
        "low_freq_factor",
        "long_factor",
        "original_max_position_embeddings",
        "short_factor",
    ),
    ANY,
)
"""What only scaled positions need."""

COMMON: Unused = {
    **PRETRAINED,
    "attention_dropout": ANY,
    "is_causal": (True,),
    "is_llama_config": ANY,  # SmolLM's, read by nothing
    "max_sequence_length": ANY,  # LLaMA's of before transformers' own
    "partial_rotary_factor": (1.0,),
    "pretraining_tp": ANY,  # the same products in pieces
    "rope_interleaved": (False,),
    "seq_length": ANY,  # that of training
}
"""Keys without effect on any decoder."""

PLAIN: Unused = {**COMMON, "attention_bias": (False,), "mlp_bias": (False,)}
"""On one whose class has no biases."""

TABLE = Table(
    types=("llama",),
    read=read,
    unused=COMMON,
    rules=(
        Rule("model.embed_tokens.weight", "embedding"),
        Rule(LAYER + "input_layernorm.weight", "blocks/{}/norm1/scale"),
        *dense(LAYER + "self_attn.q_proj", "blocks/{}/attn/q"),
        *dense(LAYER + "self_attn.k_proj", "blocks/{}/attn/k"),
        *dense(LAYER + "self_attn.v_proj", "blocks/{}/attn/v"),
        *dense(LAYER + "self_attn.o_proj", "blocks/{}/attn/out"),
        Rule(LAYER + "post_attention_layernorm.weight", "blocks/{}/norm2/scale"),
        *dense(LAYER + "mlp.gate_proj", "blocks/{}/mlp/gate"),
        *dense(LAYER + "mlp.up_proj", "blocks/{}/mlp/up"),
        *dense(LAYER + "mlp.down_proj", "blocks/{}/mlp/down"),
        Rule("model.norm.weight", "norm/scale"),
        Rule("lm_head.weight", "head/kernel", TRANSPOSE, like="model.embed_tokens.weight"),
    ),
    architecture="LlamaForCausalLM",
    ignore=(r".*\.rotary_emb\.inv_freq",),
)
