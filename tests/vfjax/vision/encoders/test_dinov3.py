"""DINOv3 against transformers, weights read from its folders."""

import numpy as np
import pytest
import transformers

import converters
from tests.checkpoints import randomize
from tests.vfjax.vision.encoders.common import assert_all_taps, pixels, products, published, spec
from vfjax import InputError
from vfjax.vision.encoders import DINOv3Config

LAYERS = 3
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
    "num_register_tokens": 4,
    "layer_norm_eps": 1e-3,
}
VARIANTS = {
    "plain": {},
    "gated": {"use_gated_mlp": True, "hidden_act": "silu", "num_register_tokens": 2},
    "other biases": {
        "query_bias": False,
        "key_bias": True,
        "value_bias": False,
        "proj_bias": False,
        "mlp_bias": False,
    },
    "bare": {"use_gated_mlp": True, "mlp_bias": False, "num_register_tokens": 0},
    "other rotations": {"rope_theta": 20.0, "num_attention_heads": 4},
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> dict:
    """Variant -> transformers' model and ours, read from the folder that it wrote."""
    folder, made = tmp_path_factory.mktemp("dinov3"), {}
    for seed, (name, more) in enumerate(VARIANTS.items()):
        theirs = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**SIZES | more))
        randomize(theirs, seed).save_pretrained(folder / name)
        made[name] = theirs, converters.load_encoder(folder / name)
    return made


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tap(pairs, variant: str):
    assert_all_taps(*pairs[variant], pixels(2, 28, 28))


@pytest.mark.parametrize("size", [(14, 70), (7, 7), (40, 33)], ids=str)
def test_other_sizes(pairs, size: tuple[int, int]):
    assert_all_taps(*pairs["plain"], pixels(2, *size))


def test_final_norm_comes_on_request(pairs):
    _, ours = pairs["plain"]
    x = pixels(1, 28, 28)
    plain, normed = ours(x, (1, -1)), ours(x, (1, -1), norm=True)
    for state, expected in zip(normed, map(ours.norm, plain), strict=True):
        np.testing.assert_array_equal(state, expected)


def test_nothing_is_computed_past_the_last_tap(pairs):
    _, ours = pairs["plain"]
    x = pixels(1, 28, 28)
    base, block = products(ours, x, 0), products(ours, x, 1) - products(ours, x, 0)
    assert block >= 6
    for k in range(LAYERS + 1):
        assert products(ours, x, 0, k) == products(ours, x, k - LAYERS - 1) == base + k * block


@pytest.mark.parametrize("taps", [(), (LAYERS + 1,)], ids=str)
def test_bad_taps(pairs, taps: tuple[int, ...]):
    with pytest.raises(InputError, match=r"taps: found .* expected at least one index"):
        pairs["plain"][1](pixels(1, 28, 28), taps)


def test_published_file(shared):
    model = spec(shared, "dinov3-vitl16-pretrain-lvd1689m")
    ours, unread, count = published(model["config"], model["files"]["model"])
    assert ours == DINOv3Config()
    assert not unread
    assert count == model["params"]["model"]
