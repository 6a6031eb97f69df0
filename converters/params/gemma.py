"""Gemma (transformers GemmaForCausalLM)."""

import dataclasses

from converters.params import llama
from converters.values import Values
from vfjax.atomic import JSON
from vfjax.llm import LlamaConfig

DEFAULTS: dict[str, JSON] = {
    "vocab_size": 256000,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}
"""Of transformers' GemmaConfig, where they differ from LlamaConfig's."""


def read(hf: Values) -> LlamaConfig:
    """Gemma's published `hidden_act`, "gelu", means the tanh form; "gelu_python" the exact one.

    Raises:
        InputError: a `hidden_activation`, which transformers 4 read in place of `hidden_act` and 5
            does not read, that is another activation.
    """
    hf = hf.over(DEFAULTS)
    made, bias = llama.decoder(hf), hf.flag("attention_bias", False)
    act = "gelu_pytorch_tanh" if hf.text("hidden_act") == "gelu" else made.act
    if hf.activation("hidden_activation", None) not in (act, None):
        raise hf.error("hidden_activation", f"{act!r}, as hidden_act")
    return dataclasses.replace(made, act=act, qkv_bias=bias, out_bias=bias, gemma=True)


TABLE = dataclasses.replace(
    llama.TABLE,
    types=("gemma",),
    read=read,
    unused={**llama.COMMON, "mlp_bias": (False,), "use_bidirectional_attention": (False, None)},
    architecture="GemmaForCausalLM",
)
