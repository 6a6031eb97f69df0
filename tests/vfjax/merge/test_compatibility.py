"""Whether weights have one origin: what is refused, and that fine-tunes are not."""

import json
import re

import numpy as np
import pytest

from vfjax import InputError
from vfjax.merge import check_family
from vfjax.merge.compatibility import check_weights

KINDS = {
    "self_attn.q_proj": (48, 32),
    "self_attn.k_proj": (16, 32),
    "self_attn.o_proj": (32, 48),
    "mlp.gate_proj": (80, 32),
    "mlp.down_proj": (32, 80),
}

TABLES = ("model.embed_tokens.weight", "lm_head.weight")


def model(seed: int, vocab: int = 300, layers: int = 5) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    out = {
        f"model.layers.{i}.{kind}.weight": rng.standard_normal(shape)
        for i in range(layers)
        for kind, shape in KINDS.items()
    }
    out |= {name: rng.standard_normal((vocab, 32)) for name in TABLES}
    return {"model.norm.weight": rng.standard_normal(32), **out}


def tuned(base: dict[str, np.ndarray], size: float, seed: int) -> dict[str, np.ndarray]:
    """Moved by a random delta of `size` times the base's length."""
    rng = np.random.default_rng(seed)
    return {name: x + size * rng.standard_normal(x.shape) for name, x in base.items()}


@pytest.mark.parametrize("part", [*KINDS, *TABLES])
def test_any_kind_of_another_origin_is_refused(part: str):
    base, other = model(0), model(1)
    member = tuned(base, 0.1, 2)
    member |= {name: x for name, x in other.items() if part in name}
    line = rf"^b: .*{part}.*: found weights with a cosine of -?0\.[01]"
    with pytest.raises(InputError, match=line):
        check_weights({"base": base, "a": tuned(base, 0.1, 3), "b": member})


@pytest.mark.parametrize("vocab", [290, 310])
def test_tables_of_other_sizes_are_compared_by_their_common_rows(vocab: int):
    base = model(0)
    member, anew = tuned(base, 0.1, 1), model(9, vocab)[TABLES[0]]
    with pytest.raises(InputError, match="embed_tokens"):
        check_weights({"base": base, "a": {**member, TABLES[0]: anew}})
    rows = min(vocab, 300)
    anew[:rows] = member[TABLES[0]][:rows]
    check_weights({"base": base, "a": {**member, TABLES[0]: anew}})


@pytest.mark.parametrize("size", [0.5, 1.0, 1.5])
def test_a_large_delta_is_no_alarm(size: float):
    for seed in range(40):
        base = model(seed)
        check_weights({"base": base, "a": tuned(base, size, seed + 100)})


VICUNA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_scaling": None,
}

LLAVA = {
    **VICUNA,
    "model_type": "llava_llama",
    "rope_theta": 10000.0,
    "mm_hidden_size": 1024,
    "head_dim": 128,
}

LINEAR = {"rope_type": "linear", "factor": 2.0}


def test_one_family_is_accepted():
    new = {**VICUNA, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}
    sparse = {"model_type": "llama", "vocab_size": 32000, "rms_norm_eps": 1e-5}
    check_family({"base": VICUNA, "llava": LLAVA, "new": new, "sparse": sparse})
    old = {**VICUNA, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    both = {**old, "rope_scaling": {**LINEAR, "type": "linear"}}
    new = {**VICUNA, "rope_parameters": {**LINEAR, "rope_theta": 500000.0, "beta": None}}
    check_family({"base": old, "both": both, "new": new})


def test_positions_of_time_row_and_column_may_differ():
    """Qwen2-VL's LLM is a Qwen2's, in the spellings of transformers 4 and 5 and Qwen3-VL's keys."""
    base = {**VICUNA, "rope_theta": 1e6}
    old = {**base, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
    rope = {"rope_theta": 1e6, "rope_type": "default", "mrope_section": [24, 20, 20]}
    new = {**VICUNA, "rope_parameters": {**rope, "mrope_interleaved": True}}
    check_family({"base": base, "old": old, "new": new})
    check_family({"base": new, "text": base})


def test_positions_that_grow_beyond_the_context_are_the_same_within():
    """InternVL3's LLM beside Qwen2.5's."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    check_family({"base": VICUNA, "internvl": {**VICUNA, "rope_parameters": rope}})


def test_another_theta_is_merged_all_the_same_where_asked():
    """Qwen3-VL's LLM beside Qwen3's."""
    configs = {"base": VICUNA, "qwen3-vl": {**VICUNA, "rope_theta": 5e6}}
    check_family(configs, theta=False)
    with pytest.raises(InputError, match="rope_theta: found 5000000.0.* set family to False"):
        check_family(configs)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"hidden_size": 5120}, "llava: hidden_size: found 5120, expected 4096 as in base"),
        ({"intermediate_size": 1}, "llava: intermediate_size"),
        ({"num_hidden_layers": 40}, "llava: num_hidden_layers"),
        ({"num_attention_heads": 64, "head_dim": 64}, "llava: num_attention_heads"),
        ({"num_key_value_heads": 8}, "llava: num_key_value_heads"),
        ({"head_dim": 64}, "llava: head_dim: found 64, expected 128"),
        ({"vocab_size": 32064}, "vocab_size: found vocabulary of 32064 rows, base has 32000"),
        ({"rms_norm_eps": 1e-6}, "llava: rms_norm_eps: found 1e-06, expected 1e-05"),
        ({"rope_theta": 1e6}, "llava: rope_theta: found 1000000.0, expected 10000.0"),
        ({"rope_parameters": {"rope_theta": 5e5}}, "llava: rope_theta: found 500000.0"),
        ({"rope_scaling": LINEAR}, "llava: rope_scaling"),
        ({"rope_parameters": {**LINEAR, "rope_theta": 1e4}}, "llava: rope_scaling"),
    ],
)
def test_configs_of_other_families_are_refused(change, message):
    llava = json.loads(json.dumps({**LLAVA, **change}))
    with pytest.raises(InputError, match=re.escape(message)):
        check_family({"base": VICUNA, "llava": llava})
