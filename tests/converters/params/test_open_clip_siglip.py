"""SigLIP's names in OpenCLIP's files; features are compared in tests/converters/formats."""

import pytest

from converters.registry import find
from converters.towers import vision_config
from vfjax import InputError

SO400M = {"image_size": 384, "timm_model_name": "vit_so400m_patch14_siglip_384"}


def test_sizes_by_name():
    """timm/models/vision_transformer.py."""
    config = vision_config({"model_cfg": {"vision_cfg": SO400M, "embed_dim": 1152}}, "file")
    found = find(config, "file").config(config)
    assert (found.width, found.layers, found.heads, found.mlp) == (1152, 27, 16, 4304)
    assert (found.patch, found.image_size, found.tokens, found.act) == (14, 384, 729, "gelu")


@pytest.mark.parametrize("name", ["vit_huge_patch14_siglip_384", "vit_so400m_patch14_siglip_448"])
def test_another_name(name: str):
    config = {"model_type": "open_clip_siglip", **SO400M, "timm_model_name": name}
    with pytest.raises(InputError, match=f"timm_model_name: found '{name}'"):
        find(config, "file").config(config)
