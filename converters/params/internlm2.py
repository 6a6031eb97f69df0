"""InternLM2 and 2.5 (InternLM2ForCausalLM, of code in its folders).

In normal form embedding and head have Llama's names, by which vocabularies are joined.
"""

import dataclasses

from converters.params import llama
from converters.params.table import TRANSPOSE, Rule, dense
from converters.values import ANY, Values
from vfjax.llm import InternLM2Config

DEFAULTS = {"vocab_size": 103168}
"""Of InternLM2Config (configuration_internlm2.py), where they differ from LlamaConfig's."""


def read(hf: Values) -> InternLM2Config:
    """From the keys of InternLM2Config."""
    hf = hf.over(DEFAULTS)
    bias = hf.flag("bias", True)
    made = dataclasses.replace(llama.decoder(hf), qkv_bias=bias, out_bias=bias)
    if made.heads * made.head_dim != made.width:
        raise hf.error("num_attention_heads", f"a divisor of hidden_size, {made.width}")
    return InternLM2Config(**vars(made))


TABLE = dataclasses.replace(
    llama.TABLE,
    types=("internlm2",),
    read=read,
    unused=llama.PLAIN | {"attn_implementation": ANY},
    rules=(
        Rule("model.embed_tokens.weight", "embedding"),
        Rule(llama.LAYER + "attention_norm.weight", "blocks/{}/norm1/scale"),
        *dense(llama.LAYER + "attention.wqkv", "blocks/{}/attn/qkv"),
        *dense(llama.LAYER + "attention.wo", "blocks/{}/attn/out"),
        Rule(llama.LAYER + "ffn_norm.weight", "blocks/{}/norm2/scale"),
        *dense(llama.LAYER + "feed_forward.w1", "blocks/{}/mlp/gate"),
        *dense(llama.LAYER + "feed_forward.w3", "blocks/{}/mlp/up"),
        *dense(llama.LAYER + "feed_forward.w2", "blocks/{}/mlp/down"),
        Rule("model.norm.weight", "norm/scale"),
        Rule("lm_head.weight", "head/kernel", TRANSPOSE, like="model.embed_tokens.weight"),
    ),
    prefixes=(
        ("model.tok_embeddings.", "model.embed_tokens."),
        ("output.", "lm_head."),
        ("", ""),
    ),
    architecture="InternLM2ForCausalLM",
)
