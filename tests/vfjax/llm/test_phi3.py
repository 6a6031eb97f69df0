"""Phi-3 against transformers, within its original context where LongRoPE stretches it."""

import pytest
import transformers

from converters.registry import find
from tests.vfjax.llm.common import SIZES, assert_family
from vfjax import InputError

LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.25, 1.5, 2.0],
    "long_factor": [4.0, 5.0, 6.0, 7.0],
}


def make(**config) -> transformers.Phi3ForCausalLM:
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**{**SIZES, **config}))


def test_family(tmp_path):
    assert_family(tmp_path, make())


def test_longrope(tmp_path):
    theirs = make(rope_parameters=LONG, original_max_position_embeddings=32)
    ours = assert_family(tmp_path, theirs)
    assert ours.config.context == 32
    assert ours.config.scale > 1


def test_window(tmp_path):
    assert assert_family(tmp_path, make(sliding_window=16)).config.context == 16


def test_as_published():
    """Phi-3-mini-128k: `su` in older files, factors of 48 pairs, 4096 of 131072 positions."""
    config = {
        "model_type": "phi3",
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "su", "short_factor": [1.1] * 48, "long_factor": [9.0] * 48},
    }
    made = find(config, "x").config(config)
    assert (made.context, made.stretch) == (4096, (1.1,) * 48)
    assert made.scale == pytest.approx(1.1902, abs=1e-4)


@pytest.mark.parametrize(
    ("keys", "scaling"),
    [
        ({}, {"factor": 8.0}),
        ({}, {"attention_factor": 1.7}),
        ({}, {"original_max_position_embeddings": 64}),
        ({"original_max_position_embeddings": 32}, {"original_max_position_embeddings": 64}),
    ],
)
def test_scale_and_context_are_those_of_transformers(keys: dict, scaling: dict):
    keys = {**SIZES, "max_position_embeddings": 131072, **keys}
    theirs = transformers.Phi3Config(**keys, rope_parameters={**LONG, **scaling})
    rotary = transformers.models.phi3.modeling_phi3.Phi3RotaryEmbedding(theirs)
    config = {"model_type": "phi3", **keys, "rope_parameters": {**LONG, **scaling}}
    made = find(config, "x").config(config)
    assert made.scale == pytest.approx(rotary.attention_scaling)
    assert made.context == theirs.rope_parameters["original_max_position_embeddings"]


def test_factors_of_another_number():
    config = {
        "model_type": "phi3",
        "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]},
    }
    with pytest.raises(InputError, match="short_factor: found 1 number, expected 48"):
        find(config, "x").config(config)
