"""DINO against transformers' ViTModel, weights read from its folders."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

import converters
from converters.registry import find
from tests.checkpoints import randomize
from tests.vfjax.vision.encoders.common import (
    assert_all_taps,
    assert_close,
    pixels,
    published,
    spec,
)
from vfjax.vision.encoders import DINOConfig

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 35,
    "patch_size": 7,
    "layer_norm_eps": 1e-3,
}
"""A position table of 5 x 5; not the default `layer_norm_eps`, so that a lost one shows."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple:
    """Transformers' model, whose file has a pooler that the published one has not, and ours."""
    path = tmp_path_factory.mktemp("dino")
    theirs = transformers.ViTModel(transformers.ViTConfig(**SIZES))
    randomize(theirs, seed=1).save_pretrained(path)
    return theirs, converters.load_encoder(path)


@pytest.mark.parametrize(
    "size",
    [
        (35, 35),
        (28, 63),
        (7, 175),  # as many patches as the table, another shape
        (40, 33),  # no multiples of the patch
    ],
    ids=str,
)
def test_every_tap(pair, size: tuple[int, int]):
    assert_all_taps(*pair, pixels(2, *size), interpolate_pos_encoding=True)


def test_final_norm_comes_on_request(pair):
    _, ours = pair
    x = pixels(1, 28, 28)
    plain, normed = ours(x, (1,)), ours(x, (1,), norm=True)
    np.testing.assert_array_equal(ours.norm(plain[0]), normed[0])


@pytest.mark.parametrize("grid", [(14, 14), (24, 24), (28, 30), (48, 48), (7, 7), (1, 1)], ids=str)
def test_positions(grid: tuple[int, int]):
    """From the 14 x 14 of the published table."""
    h, w = grid
    sizes = SIZES | {"num_hidden_layers": 1, "image_size": 98}
    theirs = randomize(transformers.ViTModel(transformers.ViTConfig(**sizes)), seed=2)
    ours = find({"model_type": "vit"}, "test").config(sizes).build(rngs=nnx.Rngs(0))
    ours.pos[...] = jnp.asarray(theirs.embeddings.position_embeddings.detach().numpy())
    blank = torch.zeros(1, h * w + 1, 32)
    expected = theirs.embeddings.interpolate_pos_encoding(blank, h * 7, w * 7)
    assert_close(ours.positions(h, w), expected.detach().numpy(), grid)


def test_published_file(shared):
    model = spec(shared, "dino-vitb16")
    ours, unread, count = published(model["config"], model["files"]["model"])
    assert ours == DINOConfig()
    assert not unread
    assert count == model["params"]["model"]
