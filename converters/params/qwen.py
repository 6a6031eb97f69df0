"""Qwen2, Qwen2.5 and Qwen3 (transformers Qwen2ForCausalLM, Qwen3ForCausalLM).

Qwen2-VL's and Qwen2.5-VL's LLMs are Qwen2s whose positions are of time, row and column; Qwen3-VL's
is such a Qwen3. LLaVA-OneVision-1.5's is a plain Qwen3 under another name.
"""

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


VL_DEFAULTS = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
}
"""Of transformers' Qwen2VLTextConfig and Qwen2_5_VLTextConfig."""


def qwen_vl(hf: Values) -> LlamaConfig:
    """A Qwen2 with M-RoPE: `mrope_section` frequencies turn by time, by row, by column, and so on.

    Raises:
        InputError: as of `llama.decoder`; sections that are not a head's, or heads of another size
            than the class has.
    """
    hf = hf.over(VL_DEFAULTS)
    for key in ("rope_scaling", "rope_parameters"):
        if found := dict(hf.mapping(key, None) or {}):
            kind = found.get("rope_type", found.pop("type", "default"))  # the first one counts
            found.pop("type", None)
            hf = hf.put({key: {**found, "rope_type": "default" if kind == "mrope" else kind}})
    rotary = llama.rotary(hf)
    sections = rotary.wholes("mrope_section", (16, 24, 24), least=0)
    made = dataclasses.replace(llama.decoder(hf), qkv_bias=True)
    if made.head_dim * made.heads != made.width:
        key = "head_dim" if hf.any("head_dim") else "hidden_size"
        raise hf.error(key, f"{made.heads} heads that share hidden_size, {made.width}, equally")
    if sum(sections) != made.head_dim // 2:
        raise rotary.error("mrope_section", f"numbers with the sum {made.head_dim // 2}, of a head")
    axes = tuple(i % 3 for i, count in enumerate(sections) for _ in range(count))
    return dataclasses.replace(made, rope_axes=axes)


def qwen3(hf: Values) -> LlamaConfig:
    """Norms on queries and keys."""
    bias = hf.flag("attention_bias", False)
    made = llama.decoder(hf.over({**DEFAULTS, "head_dim": 128}))
    return dataclasses.replace(made, qkv_bias=bias, out_bias=bias, qk_norm=True)


VL3_DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "num_key_value_heads": 32,
    "max_position_embeddings": 128000,
    "rope_theta": 500000.0,
}
"""Of transformers' Qwen3VLTextConfig, where they differ from Qwen3's."""


def qwen3_vl(hf: Values) -> LlamaConfig:
    """A Qwen3 with interleaved M-RoPE: of every three frequencies one turns by each position.

    Once a row or column has as many as `mrope_section` gives it, time has the others; the section's
    first number is not read.

    Raises:
        InputError: as of `llama.decoder`; a section that is not of three numbers.
    """
    hf = hf.over(VL3_DEFAULTS)
    rotary = llama.rotary(hf)
    sections = rotary.wholes("mrope_section", (24, 20, 20), least=0)
    if len(sections) != 3:
        raise rotary.error("mrope_section", "three numbers: of time, rows and columns")
    rotary.any("mrope_interleaved")  # its class always does
    made = qwen3(hf)
    axes = tuple(i % 3 if i // 3 < sections[i % 3] else 0 for i in range(made.head_dim // 2))
    return dataclasses.replace(made, rope_axes=axes)


RICE_DEFAULTS = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "max_position_embeddings": 262144,
    "rope_theta": 5000000.0,
}
"""Of LLaVAOneVision1_5_TextConfig, where they differ from Qwen3's."""


def onevision15(hf: Values) -> LlamaConfig:
    """A Qwen3; a rope of type "mrope" turns by one position there, too.

    Raises:
        InputError: as of `llama.decoder`.
    """
    hf = hf.over(RICE_DEFAULTS)
    if found := dict(hf.mapping("rope_scaling", None) or {}):
        kind = found.get("type", found.get("rope_type"))  # the older name counts
        found.pop("type", None)
        if kind == "mrope":
            found.pop("mrope_section", None)
            kind = "default"
        hf = hf.put({"rope_scaling": {**found, "rope_type": kind}})
    return qwen3(hf)


QWEN3 = (
    *llama.TABLE.rules,
    Rule(llama.LAYER + "self_attn.q_norm.weight", "blocks/{}/attn/q_norm/scale"),
    Rule(llama.LAYER + "self_attn.k_norm.weight", "blocks/{}/attn/k_norm/scale"),
)

TABLES = (
    dataclasses.replace(
        llama.TABLE,
        types=("qwen2",),
        read=qwen2,
        unused={**UNUSED, "attention_bias": ANY},  # fixed in its class
        architecture="Qwen2ForCausalLM",
    ),
    *(
        dataclasses.replace(
            llama.TABLE,
            types=(f"{kind}_text",),
            read=qwen_vl,
            unused={**UNUSED, "attention_bias": ANY},
            architecture=f"{name}TextForCausalLM",  # there is a ...TextModel alone
            plain="qwen2",
        )
        for kind, name in (("qwen2_vl", "Qwen2VL"), ("qwen2_5_vl", "Qwen2_5_VL"))
    ),
    dataclasses.replace(
        llama.TABLE,
        types=("qwen3",),
        read=qwen3,
        unused=UNUSED,
        architecture="Qwen3ForCausalLM",
        rules=QWEN3,
    ),
    dataclasses.replace(
        llama.TABLE,
        types=("qwen3_vl_text",),
        read=qwen3_vl,
        unused=UNUSED,
        architecture="Qwen3VLTextForCausalLM",  # there is a ...TextModel alone
        plain="qwen3",
        rules=QWEN3,
    ),
    dataclasses.replace(
        llama.TABLE,
        types=("LLaVAOneVision1_5_text",),
        read=onevision15,
        unused={**UNUSED, "image_token_id": ANY, "video_token_id": ANY},  # the whole model's count
        architecture="LLaVAOneVision1_5_TextForCausalLM",  # there is a ..._TextModel alone
        plain="qwen3",
        rules=QWEN3,
    ),
)
