"""Mixtral (transformers MixtralForCausalLM)."""

import dataclasses
import re

from converters.files.reader import inner
from converters.params import llama
from converters.params.mistral import windowed
from converters.params.table import TRANSPOSE, Rule
from converters.values import ANY, DEEPEST, Values
from vfjax.llm import MixtralConfig
from vfjax.merge import LazyTensor

DEFAULTS = {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096 * 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}
"""Of transformers' MixtralConfig, where they differ from LlamaConfig's."""

EXPERT = llama.LAYER + "block_sparse_moe.experts.{}."


def read(hf: Values) -> MixtralConfig:
    """From the keys of transformers' MixtralConfig."""
    window = hf.whole("sliding_window", None, most=llama.VOCABULARY)
    made = windowed(llama.decoder(hf.over(DEFAULTS)), window)
    experts = hf.whole("num_local_experts", 8, most=DEEPEST)
    chosen = hf.whole("num_experts_per_tok", 2, most=experts)
    return MixtralConfig(**vars(made), experts=experts, chosen=chosen)


FUSED = re.compile(r"(model\.layers\.\d+\.)mlp\.(?:experts\.(gate_up_proj|down_proj)|gate\.weight)")


def split(name: str, tensor: LazyTensor) -> dict[str, LazyTensor]:
    """The experts as transformers 5 has them in memory, and saves them if asked to.

    `gate_up_proj` [experts, 2 mlp, width] holds w1 and below it w3, `down_proj` [experts, width,
    mlp] w2 (transformers conversion_mapping.py).
    """
    match = FUSED.fullmatch(name)
    if match is None:
        return {}
    start = f"{match[1]}block_sparse_moe."
    if match[2] is None:
        return {f"{start}gate.weight": tensor}
    if len(tensor.shape) != 3:
        return {}
    experts, rows, _ = tensor.shape
    parts = {"w2": (0, rows)}
    if match[2] == "gate_up_proj":
        parts = {"w1": (0, rows // 2), "w3": (rows // 2, rows)}
    return {
        f"{start}experts.{i}.{part}.weight": inner(tensor, i, *where)
        for i in range(experts)
        for part, where in parts.items()
    }


TABLE = dataclasses.replace(
    llama.TABLE,
    types=("mixtral",),
    read=read,
    unused={
        **llama.PLAIN,
        "output_router_logits": ANY,
        "router_aux_loss_coef": ANY,  # in training
        "router_jitter_noise": ANY,
    },
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
    split=split,
)
