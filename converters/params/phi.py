"""Phi-1.5 and Phi-2 (transformers PhiForCausalLM)."""

from converters.params import llama
from converters.params.table import Rule, Table, dense, norm
from converters.values import ANY, Values
from vfjax.atomic import JSON
from vfjax.llm import PhiConfig

DEFAULTS: dict[str, JSON] = {
    "vocab_size": 51200,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "hidden_act": "gelu_new",
    "layer_norm_eps": 1e-5,
}
"""Of transformers' PhiConfig, where they differ from LlamaConfig's."""


def read(hf: Values) -> PhiConfig:
    """From the keys of transformers' PhiConfig."""
    share = rotary(hf, 0.5)
    made = llama.decoder(hf.over(DEFAULTS), eps="layer_norm_eps")
    return PhiConfig(**{**vars(made), **BIASES, "rotary": share})


BIASES = {"qkv_bias": True, "out_bias": True, "head_bias": True}


def rotary(hf: Values, default: float) -> float:
    """Share of a head that is rotated, from the keys of transformers 5 or of older ones."""
    outer = hf.number("partial_rotary_factor", default)
    share = llama.rotary(hf).number("partial_rotary_factor", outer)
    if not 0 < share <= 1:
        raise llama.rotary(hf).error("partial_rotary_factor", "a share, above 0 and up to 1")
    return share


TABLE = Table(
    types=("phi",),
    read=read,
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
    unused={
        **llama.PLAIN,
        "embd_pdrop": ANY,
        "qk_layernorm": (False,),
        "resid_pdrop": ANY,
    },
    architecture="PhiForCausalLM",
    ignore=llama.TABLE.ignore,
)
