"""InternVL's branch in torch, against transformers' features."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from converters.hf.internvl import AuthorsTower
from tests.internvl import VISION, authors_folder, picture, port_folder
from tests.torch_branch import assert_close, assert_usable, show

RMS = {"use_qk_norm": False, "norm_type": "rms_norm", "attention_bias": False}


@pytest.mark.parametrize(
    ("vision", "layer"), [({}, -1), ({"use_mean_pooling": False}, -1), (RMS, -2)]
)
def test_port(tmp_path: Path, vision: dict[str, Any], layer: int) -> None:
    """Tiles and the whole; norms and biases of both kinds; the last state, normed, and others."""
    theirs, _ = port_folder(tmp_path, vision=vision, vision_feature_layer=layer)
    shown = show(tmp_path, [picture(84, 61)])
    cut = transformers.GotOcr2ImageProcessorPil(
        size={"height": 28, "width": 28}, max_patches=6, crop_to_patches=True
    )
    pixels = cut([picture(84, 61)], return_tensors="pt").pixel_values
    expected = theirs.model.get_image_features(pixels).pooler_output
    assert_close(shown.values, torch.cat(list(expected)).reshape(-1, 32))
    if layer == -1:
        assert_usable(shown)


@pytest.mark.parametrize(
    "config", [{}, {"ps_version": "v1", "select_layer": -2}, {"force_image_size": 42}]
)
def test_authors(tmp_path: Path, config: dict[str, Any]) -> None:
    """As the port of the same weights, but for their names and norms' epsilon."""
    theirs, _ = port_folder(tmp_path / "port")
    authors_folder(tmp_path / "own", theirs, "Qwen2ForCausalLM", **config)
    shown = show(tmp_path / "own", [picture(84, 61)])
    assert isinstance(shown.branch.encoder, AuthorsTower)
    for layer in theirs.model.vision_tower.encoder.layer:
        for norm in (layer.attention.q_norm, layer.attention.k_norm):
            norm.variance_epsilon = VISION["layer_norm_eps"]
    theirs.config.vision_feature_layer = config.get("select_layer", -1)
    pixels = shown.given["pixels"].permute(0, 3, 1, 2)
    expected = theirs.model.get_image_features(pixels).pooler_output
    if config.get("ps_version") == "v1":
        expected = expected.unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2)
    expected = expected.reshape(-1, 32)
    assert len(shown.values) in (7 * 4, 7 * 9)
    assert_close(shown.values, expected[: len(shown.values)])
    if not config:
        assert_usable(shown)
