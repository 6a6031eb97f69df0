"""Families that are Llama's decoder with other switches."""

import pytest
import transformers as hf

from tests.vfjax.llm.common import SIZES, assert_family

FAMILIES = {
    "mistral": lambda: hf.MistralForCausalLM(
        hf.MistralConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    ),
    "yi": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(
            **{**SIZES, "num_attention_heads": 7, "num_key_value_heads": 1, "hidden_size": 56},
            rope_parameters={"rope_type": "default", "rope_theta": 5e6},
        )
    ),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**SIZES)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SIZES, head_dim=16)),
    "gemma": lambda: hf.GemmaForCausalLM(
        hf.GemmaConfig(**{**SIZES, "num_key_value_heads": 1}, head_dim=16)
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_family(tmp_path, name: str):
    assert_family(tmp_path, FAMILIES[name]())


def test_the_context_is_a_window(tmp_path):
    """Within it a windowed model is Llama's."""
    theirs = hf.MistralForCausalLM(hf.MistralConfig(**SIZES, sliding_window=20))
    assert assert_family(tmp_path, theirs).config.context == 20
