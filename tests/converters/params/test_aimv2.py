"""Ovis2's tower: its names in full size, and configs that it refuses."""

import math

import pytest
import torch
from transformers import Ovis2VisionConfig
from transformers.models.ovis2.modeling_ovis2 import Ovis2VisionTransformer

from converters.params.aimv2 import TABLE
from tests.vfjax.vision.encoders.common import published
from vfjax import InputError
from vfjax.vision.encoders import AIMv2Config


def test_names():
    """AIMv2-large's at the defaults."""
    config = Ovis2VisionConfig()
    with torch.device("meta"):
        theirs = Ovis2VisionTransformer(config)
    tensors = {name: ("F32", x.shape) for name, x in theirs.state_dict().items()}
    ours, unread, count = published(config.to_dict(), tensors)
    assert (ours, unread) == (AIMv2Config(), [])
    old = {"backbone_config": {"depth": 2}, "depths": None, "tau": 1.0, "vocab_size": 65536}
    assert TABLE.config({"model_type": "ovis2_vision", **old}) == ours  # of published folders
    assert count == sum(math.prod(x.shape) for x in theirs.parameters())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_attention_heads": 5}, "num_attention_heads: found 5, expected a divisor"),
        ({"num_channels": 1}, "num_channels"),
        ({"hidden_act": "relu6"}, "hidden_act"),
        ({"qkv_bias": None}, "qkv_bias"),
        ({"use_head": True}, "use_head"),
    ],
)
def test_bad_keys(change: dict, said: str):
    with pytest.raises(InputError, match=said) as caught:
        TABLE.config({"model_type": "ovis2_vision", **change})
    assert "\n" not in str(caught.value)
