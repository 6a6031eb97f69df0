"""Encoders in torch against the transformers classes that their configs are of."""

from typing import Any

import pytest
import torch
import transformers
from transformers.initialization import no_init_weights

from converters import registry
from converters.hf import encoders
from tests.checkpoints import CLIP, DINOV2, randomize

VIT = {**CLIP, "layer_norm_eps": 1e-3, "hidden_act": "gelu_pytorch_tanh"}
BIASES = {"query_bias": False, "key_bias": True, "value_bias": False, "proj_bias": False}
CASES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "clip": (transformers.CLIPVisionConfig, transformers.CLIPVisionModel, VIT),
    "siglip": (
        transformers.SiglipVisionConfig,
        transformers.SiglipVisionModel,
        {**VIT, "vision_use_head": False},
    ),
    "dino": (transformers.ViTConfig, transformers.ViTModel, VIT),
    "dino without bias": (
        transformers.ViTConfig,
        transformers.ViTModel,
        {**VIT, "qkv_bias": False, "image_size": 35, "input_size": 28},
    ),
    "dinov2": (transformers.Dinov2Config, transformers.Dinov2Model, DINOV2),
    "dinov2, gated": (
        transformers.Dinov2Config,
        transformers.Dinov2Model,
        {**DINOV2, "use_swiglu_ffn": True, "mlp_ratio": 3, "qkv_bias": False},
    ),
    "dinov2 with registers": (
        transformers.Dinov2WithRegistersConfig,
        transformers.Dinov2WithRegistersModel,
        {**DINOV2, "num_register_tokens": 3},
    ),
    "dinov3": (
        transformers.DINOv3ViTConfig,
        transformers.DINOv3ViTModel,
        {**VIT, "num_register_tokens": 2, "rope_theta": 30.0},
    ),
    "dinov3, gated": (
        transformers.DINOv3ViTConfig,
        transformers.DINOv3ViTModel,
        {**VIT, **BIASES, "use_gated_mlp": True, "mlp_bias": False},
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_every_tap_is_transformers(name: str) -> None:
    config_class, model_class, keys = CASES[name]
    config = config_class(**keys)
    more = {"add_pooling_layer": False} if model_class is transformers.ViTModel else {}
    with no_init_weights():
        theirs = randomize(model_class(config, **more), 1)
    own = registry.find(config.to_dict(), name).config({**config.to_dict(), **keys})
    made = encoders.build(own)
    made.load_state_dict(theirs.state_dict())
    pixels = torch.randn(2, 28, 28, 3, generator=torch.Generator().manual_seed(0))
    resized = {"interpolate_pos_encoding": True} if more else {}
    states = theirs(pixels.permute(0, 3, 1, 2), output_hidden_states=True, **resized).hidden_states
    found = encoders.tapped(own, made.eval(), pixels, (0, -2, 2, -1))
    for tap, state in zip((0, -2, 2, -1), found, strict=True):
        torch.testing.assert_close(state, states[tap], rtol=0, atol=1e-6)
