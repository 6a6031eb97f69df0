"""Vision encoders at every tap against transformers, weights read from its folders."""

import dataclasses
import functools
import shutil
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import converters
from tests.checkpoints import TOWERS, tower_folder
from vfjax import InputError
from vfjax.vision.encoders import CLIPConfig
from vfjax.vision.resize import bicubic

LIMIT = 2e-5
"""Largest difference, as a share of the activation's largest value."""

LAYERS = 3
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
    """Transformers' hidden states, and its final norm on the last of them."""
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


@functools.partial(jax.jit, static_argnums=2)
def states_of(model: nnx.Module, x: jax.Array, taps: Sequence[int]) -> list[jax.Array]:
    return model(x, taps)


def assert_all_taps(pair: tuple, x: np.ndarray) -> None:
    theirs, ours = pair
    *states, final = reference(theirs, x)
    taps = tuple(range(-len(states), len(states)))
    for tap, found in zip(taps, states_of(ours, x, taps), strict=True):
        assert_close(found, states[tap], tap)
    assert len(ours.blocks) + 1 == len(states)
    assert_close(ours.norm(jnp.asarray(states[-1])), final, "norm")


@pytest.mark.parametrize("kind", KINDS)
def test_every_tap(pairs, kind: str):
    """From either end."""
    side = pairs[kind][0].config.image_size
    assert_all_taps(pairs[kind], pixels(3, side, side))


@pytest.mark.parametrize("kind", KINDS)
def test_final_norm_comes_on_request(pairs, kind: str):
    theirs, ours = pairs[kind]
    x = pixels(2, 28, 28)
    state = reference(theirs, x)[0]
    norm = getattr(theirs, "post_layernorm", None) or theirs.layernorm
    assert_close(ours(jnp.asarray(x), (0,))[0], state, "without")
    with torch.no_grad():
        normed = norm(torch.from_numpy(state)).numpy()
    assert_close(ours(jnp.asarray(x), (0,), norm=True)[0], normed, "with")


SIZES = [
    (28, 28),  # 4 x 4 patches where the table has 5 x 5
    (28, 63),
    (7, 175),  # as many patches as the table, another shape
    (40, 33),  # no multiples of the patch
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", ["dinov2", "dinov2_with_registers"])
def test_dinov2_of_other_sizes(pairs, kind: str, size: tuple[int, int]):
    assert_all_taps(pairs[kind], pixels(2, *size))


@pytest.mark.parametrize(("trained", "grid"), [(37, (16, 16)), (16, (37, 24))])
@pytest.mark.parametrize("kind", ["dinov2", "dinov2_with_registers"])
def test_dinov2_positions(tmp_path, kind: str, trained: int, grid: tuple[int, int]):
    """37 is the published tables' side, 16 the grid of the 224 pixels that they are mostly fed."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "image_size": trained * 7}
    theirs = tower_folder(tmp_path, kind, 3, **sizes)
    ours = converters.load_encoder(tmp_path)
    h, w = grid
    with torch.no_grad():
        blank = torch.zeros(1, h * w + 1, 16)
        expected = theirs.embeddings.interpolate_pos_encoding(blank, h * 7, w * 7)
    assert_close(jax.jit(lambda: ours.positions(h, w))(), expected.numpy(), grid)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("source", [1, 2, 5, 16, 37])
def test_bicubic_is_torchs(source: int, antialias: bool):
    """Torch computes coordinates in float32, which moves the weights by some 1e-6 a pixel."""
    grid = torch.randn(1, 1, source, source, generator=torch.Generator().manual_seed(0))
    for size in [(1, 1), (2, 3), (5, 5), (4, 9), (16, 16), (15, 37), (48, 41), (100, 7)]:
        expected = torch.nn.functional.interpolate(
            grid, size=size, mode="bicubic", align_corners=False, antialias=antialias
        )
        rows, cols = (bicubic(source, k, antialias=antialias) for k in size)
        found = rows @ grid[0, 0].numpy() @ cols.T
        np.testing.assert_allclose(found, expected[0, 0], rtol=0, atol=5e-5, err_msg=str(size))


def test_taps_in_any_order(pairs):
    """From either end, and twice."""
    theirs, ours = pairs["dinov2"]
    x = pixels(1, 35, 35)
    *states, _ = reference(theirs, x)
    taps = (-1, 0, 2, -2, 2, -LAYERS - 1)
    for tap, found in zip(taps, states_of(ours, x, taps), strict=True):
        assert_close(found, states[tap], tap)


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


def test_weights_past_the_last_tap_may_be_anything(pairs):
    theirs, ours = pairs["clip"]
    x = pixels(1, 28, 28)
    broken = nnx.clone(ours)
    for block in broken.blocks[2:]:
        for _, leaf in nnx.to_flat_state(nnx.state(block)):
            leaf[...] = jnp.full_like(leaf[...], jnp.nan)
    assert not np.isfinite(states_of(broken, x, (3,))[0]).any()
    assert_close(states_of(broken, x, (1, 2))[1], reference(theirs, x)[2], 2)


@pytest.fixture(scope="module")
def clip_large(room, tmp_path_factory) -> tuple:
    """CLIP ViT-L/14 at 336 pixels in its true size, 1024 wide, 577 tokens, but 12 of 24 layers:
    more would take a test process 4 GB.
    """
    sizes = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "layer_norm_eps": 1e-5,
    }
    folder = tmp_path_factory.mktemp("large")
    theirs = tower_folder(folder, "clip", 7, **sizes)
    ours = converters.load_encoder(folder)
    shutil.rmtree(folder)  # 0.6 GB
    return theirs, ours


def test_clip_large_at_true_size(clip_large):
    assert clip_large[1].config == dataclasses.replace(CLIPConfig(), layers=12)
    assert_all_taps(clip_large, pixels(1, 336, 336))
