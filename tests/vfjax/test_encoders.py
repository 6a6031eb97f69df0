"""Vision encoders at every tap against transformers, weights read from its folders."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import converters
from tests.checkpoints import TOWERS, make_tower, tower_folder
from vfjax import InputError
from vfjax.encoders import CLIPConfig

LIMIT = 2e-5
"""Largest difference, as a share of the activation's largest value."""

LAYERS = 4
KINDS = [*TOWERS, "dinov2 swiglu"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> dict:
    """Kind -> transformers' model and ours, read from the folder that it wrote."""
    folder = tmp_path_factory.mktemp("towers")
    made = {}
    for seed, kind in enumerate(KINDS):
        name, _, swiglu = kind.partition(" ")
        config = {"use_swiglu_ffn": True} if swiglu else {}
        theirs = tower_folder(folder / kind, name, seed, **config)
        made[kind] = theirs, converters.load_encoder(folder / kind)
    return made


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(*shape, 3)).astype(np.float32)


@torch.no_grad()
def reference(model: torch.nn.Module, x: np.ndarray) -> list[np.ndarray]:
    """transformers' hidden states, and its final norm on the last of them."""
    out = model(torch.from_numpy(x.transpose(0, 3, 1, 2)), output_hidden_states=True)
    norm = getattr(model, "post_layernorm", None) or model.layernorm
    final = norm(out.hidden_states[-1])
    if model.config.model_type != "clip_vision_model":  # there it is for the class token alone
        assert torch.equal(final, out.last_hidden_state)
    else:
        assert torch.equal(final[:, 0], out.pooler_output)
    return [s.numpy() for s in (*out.hidden_states, final)]


def assert_close(found: jax.Array, expected: np.ndarray, what: object) -> None:
    assert found.shape == expected.shape, what
    error = np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()
    assert error <= LIMIT, (what, error)


def assert_all_taps(pair: tuple, x: np.ndarray) -> None:
    theirs, ours = pair
    *states, final = reference(theirs, x)
    taps = range(len(ours.blocks) + 1)
    for k, found, expected in zip(taps, ours(jnp.asarray(x), taps), states, strict=True):
        assert_close(found, expected, k)
    (found,) = ours(jnp.asarray(x), (-1,), norm=True)
    assert_close(found, final, "norm")


@pytest.mark.parametrize("kind", KINDS)
def test_every_tap(pairs, kind: str):
    side = pairs[kind][0].config.image_size
    assert_all_taps(pairs[kind], pixels(3, side, side))


SIZES = [
    (28, 28),  # 4 x 4 patches where the table has 5 x 5
    (56, 56),
    (28, 63),
    (63, 28),
    (7, 175),  # as many patches as the table, another shape
    (14, 7),
    (40, 33),  # no multiples of the patch
    (112, 105),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", [k for k in KINDS if k.startswith("dinov2")])
def test_dinov2_of_other_sizes(pairs, kind: str, size: tuple[int, int]):
    assert_all_taps(pairs[kind], pixels(2, *size))


@pytest.mark.parametrize(("trained", "fed"), [(37, 16), (16, 37), (37, 48)])
@pytest.mark.parametrize("kind", ["dinov2", "dinov2_with_registers"])
def test_dinov2_positions_at_published_grids(tmp_path, kind: str, trained: int, fed: int):
    """518 pixels fed 224, which is how DINOv2-L is used; the reverse; and up."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "image_size": trained * 7}
    theirs = tower_folder(tmp_path, kind, 3, **sizes)
    ours = converters.load_encoder(tmp_path)
    with torch.no_grad():
        blank = torch.zeros(1, fed * fed + 1, 16)
        expected = theirs.embeddings.interpolate_pos_encoding(blank, fed * 7, fed * 7)
    assert_close(ours.positions(fed, fed), expected.numpy(), (trained, fed))


@pytest.mark.parametrize("kind", KINDS)
def test_taps_are_those_of_hidden_states(pairs, kind: str):
    """Any order, from either end, twice."""
    _, ours = pairs[kind]
    x = jnp.asarray(pixels(1, ours.config.image_size, ours.config.image_size))
    every = ours(x, range(LAYERS + 1))
    taps = (-1, 0, 2, -2, 2, -LAYERS - 1)
    for tap, found in zip(taps, ours(x, taps), strict=True):
        np.testing.assert_array_equal(found, every[tap])
    assert len({np.asarray(s).tobytes() for s in every}) == LAYERS + 1


@pytest.mark.parametrize("taps", [(), (LAYERS + 1,), (0, -LAYERS - 2)], ids=str)
def test_bad_taps(pairs, taps: tuple[int, ...]):
    _, ours = pairs["clip"]
    with pytest.raises(InputError, match=r"taps: found .* expected at least one index"):
        ours(jnp.zeros((1, 28, 28, 3)), taps)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_computed_past_the_last_tap(pairs, kind: str):
    """Matrix products in the trace: as many a block, and none for the blocks after the tap."""
    _, ours = pairs[kind]
    x = jnp.zeros((1, 28, 28, 3))

    def products(*taps: int) -> int:
        return str(jax.make_jaxpr(lambda x: ours(x, taps))(x)).count("dot_general[")

    base, block = products(0), products(1) - products(0)
    assert block >= 6
    for k in range(LAYERS + 1):
        assert products(k) == products(0, k) == products(k - LAYERS - 1) == base + k * block


def test_flops_and_weights_past_the_last_tap(pairs):
    """The compiled program does a quarter less a block, and later weights may be anything."""
    theirs, ours = pairs["clip"]
    x = jnp.asarray(pixels(1, 28, 28))

    def run(tap: int) -> jax.stages.Compiled:
        return jax.jit(lambda x: ours(x, (tap,))).lower(x).compile()

    flops = [run(tap).cost_analysis()["flops"] for tap in range(LAYERS + 1)]
    steps = np.diff(flops)
    np.testing.assert_allclose(steps, steps.mean(), rtol=0.02)
    expected = reference(theirs, np.asarray(x))[2]
    saved = [(leaf, leaf[...]) for block in ours.blocks[2:] for leaf in leaves(block)]
    for leaf, _ in saved:
        leaf[...] = jnp.full_like(leaf[...], jnp.nan)
    try:
        assert not np.isfinite(ours(x, (3,))[0]).any()
        assert_close(ours(x, (2,))[0], expected, 2)
    finally:
        for leaf, value in saved:
            leaf[...] = value


def leaves(module) -> list:
    from flax import nnx

    return [leaf for _, leaf in nnx.to_flat_state(nnx.state(module))]


@pytest.fixture(scope="module")
def clip_large(tmp_path_factory) -> tuple:
    """CLIP ViT-L/14 at 336 pixels in its true size: 24 layers, 1024 wide, 577 tokens."""
    sizes = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "layer_norm_eps": 1e-5,
    }
    folder = tmp_path_factory.mktemp("large")
    theirs = tower_folder(folder, "clip", 7, **sizes)
    ours = converters.load_encoder(folder)
    shutil.rmtree(folder)  # 1.2 GB
    return theirs, ours


def test_clip_large_at_true_size(clip_large):
    theirs, ours = clip_large
    assert ours.config == CLIPConfig()
    x = pixels(1, 336, 336)
    *states, final = reference(theirs, x)
    taps = (*range(25), -2)
    found = jax.jit(lambda model, x: model(x, taps))(ours, x)
    for tap, state in zip(taps, found, strict=True):
        assert_close(state, states[tap], tap)
    assert_close(ours.norm(found[24]), final, "norm")
