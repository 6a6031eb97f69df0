"""Phi-2 against transformers."""

import pytest
import transformers

from converters.registry import find
from tests.vfjax.llm.common import SIZES, assert_family
from vfjax import InputError


def test_family(tmp_path):
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    sizes = {**SIZES, "hidden_size": 64, "num_key_value_heads": 4}
    theirs = transformers.PhiForCausalLM(transformers.PhiConfig(**sizes, rope_parameters=rope))
    ours = assert_family(tmp_path, theirs)
    assert ours.config.rotary == 0.5


def test_older_configs_keep_the_share_beside():
    """As the published Phi-2's: 0.4 of 80 features."""
    config = {"model_type": "phi", "partial_rotary_factor": 0.4, "rope_theta": 1e4}
    assert find(config, "x").config(config).rotary == 0.4


def test_norms_on_queries_are_refused():
    config = {"model_type": "phi", "qk_layernorm": True}
    with pytest.raises(InputError, match="config.json: qk_layernorm: found True, expected False"):
        find(config, "x").config(config)
