"""Configs of Qwen-VL's towers that can't be read."""

import pytest

from converters.registry import find
from vfjax import InputError


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (
            "qwen2_vl",
            {"num_heads": 3},
            "num_heads: found 3, expected heads of embed_dim 1280, each",
        ),
        ("qwen2_vl", {"spatial_merge_size": 3}, "spatial_merge_size: found 3, expected a power of"),
        ("qwen2_vl", {"in_channels": 1}, "in_channels: found 1, expected 3"),
        ("qwen2_vl", {"window_size": 112}, "window_size: found 112, expected no such key"),
        ("qwen2_5_vl", {"window_size": 20}, "window_size: found 20, expected pixels of a token"),
        ("qwen2_5_vl", {"fullatt_block_indexes": [-1]}, "fullatt_block_indexes: found"),
        (
            "qwen2_5_vl",
            {"rope_parameters": {"rope_type": "yarn"}},
            "rope_type: found 'yarn', expec",
        ),
        ("qwen3_vl", {"num_heads": 5}, "num_heads: found 5, expected heads of hidden_size 1152"),
        ("qwen3_vl", {"patch_size": [16, 8]}, "patch_size: found [16, 8], expected"),
        ("qwen3_vl", {"fullatt_block_indexes": [1]}, "fullatt_block_indexes: found [1], expec"),
    ],
)
def test_bad_configs(kind: str, changes: dict, message: str):
    config = {"model_type": f"{kind}_vision", **changes}
    with pytest.raises(InputError) as error:
        find(config, "here").config(config, "here")
    assert message in str(error.value) and "\n" not in str(error.value)
