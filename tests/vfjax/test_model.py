"""Whole models against transformers' LLaVA, and against several of its towers put together."""

import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import converters
from tests import checkpoints
from tests.checkpoints import IMAGE_TOKEN, make_connector, make_llama, make_tower
from vfjax import Batch, InputError, Model, encode, forward
from vfjax.architectures import Encoded, VisualTokens

LIMIT = 2e-5
"""Largest difference of logits, as a share of the largest."""

PICTURE = -200
ROWS = [[1, 40, PICTURE, 50, 60], [1, PICTURE, 70, PICTURE, 80, 90, 41], [1, 42, 43]]
"""One picture, several, none."""


def pictures(n: int, seed: int = 0) -> list[np.ndarray]:
    """Pictures of n sizes."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(20, 90, (n, 2))
    return [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in sizes]


def pixels_of(batch: Batch, row: int, rows=ROWS) -> dict[str, np.ndarray]:
    """Branch -> the pixels of a row's own pictures."""
    first = sum(r.count(PICTURE) for r in rows[:row])
    count = rows[row].count(PICTURE)
    return {name: x.given.pixels[first : first + count] for name, x in batch.images.items()}


def assert_close(found, expected, what: object = "") -> None:
    assert found.shape == expected.shape, what
    error = np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()
    assert error <= LIMIT, (what, error)


LLAVAS = {
    "clip": {},
    "clip with class token": {"vision_feature_select_strategy": "full"},
    "clip, two layers": {"vision_feature_layer": [-3, -2]},
    "clip, last layer": {"vision_feature_layer": -1},
    "siglip": {"kind": "siglip", "vision_feature_select_strategy": "full"},
    "tanh projector": {"projector_hidden_act": "gelu_pytorch_tanh"},
    "gemma": {"text": {"model_type": "gemma", "head_dim": 8}},
    "tied head": {"tie_word_embeddings": True, "text": {"tie_word_embeddings": True}},
}


@pytest.mark.parametrize("name", LLAVAS)
def test_llava_of_transformers(tmp_path, name: str):
    options = {"vision": {"num_hidden_layers": 2}, **LLAVAS[name]}
    theirs = checkpoints.hf_llava_folder(tmp_path, 1, **options)
    model, processor = converters.load(tmp_path)
    batch = processor(pictures(3), input_ids=ROWS)
    logits = forward(model, batch)
    assert logits.dtype == jnp.float32
    (config,) = model.config.branches
    for i, row in enumerate(ROWS):
        ids = [t for token in row for t in expand(token, config.tokens)]
        inputs = {"input_ids": torch.tensor([ids])}
        if PICTURE in row:
            (x,) = pixels_of(batch, i).values()
            inputs["pixel_values"] = torch.from_numpy(np.moveaxis(x, -1, 1).copy())
        with torch.no_grad():
            expected = theirs(**inputs).logits[0].numpy()
        assert_close(logits[i][batch.mask[i]], expected, i)


def expand(token: int, count: int) -> list[int]:
    return [IMAGE_TOKEN] * count if token == PICTURE else [token]


@pytest.fixture(scope="module")
def upstream(tmp_path_factory) -> tuple:
    """A LLaVA-1.5 as its authors publish it: its folder, torch parts; model, processor."""
    folder = tmp_path_factory.mktemp("upstream") / "llava"
    member = checkpoints.upstream_llava_folder(folder, 4, vision={"num_hidden_layers": 2})
    return folder, member, *converters.load(folder)


def test_upstream_llava(upstream):
    _, member, model, processor = upstream
    batch = processor(pictures(3), input_ids=ROWS)
    logits = forward(model, batch)
    branches = {"clip": (member.tower, member.connector, {"taps": [-2], "drop": 1})}
    for i, row in enumerate(ROWS):
        expected = checkpoints.reference_logits(member.llm, branches, row, pixels_of(batch, i))
        assert_close(logits[i][batch.mask[i]], expected, i)


def test_one_branch_is_the_member_bit_for_bit(upstream, tmp_path):
    _, member, *loaded = upstream
    entry = {"taps": [-2], "drop": 1, "aspect": "pad"}
    branches = {"only": (member.tower, member.connector, entry)}
    checkpoints.fused_folder(tmp_path / "fused", member.llm, branches)
    found = []
    for model, processor in (loaded, converters.load(tmp_path / "fused")):
        batch = processor(pictures(3), input_ids=ROWS)
        found.append((np.asarray(forward(model, batch)), batch))
    (a, left), (b, right) = found
    np.testing.assert_array_equal(left.visual, right.visual)
    np.testing.assert_array_equal(
        left.images["clip"].given.pixels, right.images["only"].given.pixels
    )
    np.testing.assert_array_equal(a[left.mask], b[left.mask])


KINDS = {
    "clip": {"taps": [-2], "drop": 1, "aspect": "pad"},
    "dinov2": {"taps": [1, -1], "drop": 1, "aspect": "crop"},
    "siglip": {"taps": [-2], "drop": 0, "aspect": "crop"},
    "dinov2_with_registers": {"taps": [-2], "drop": 5, "aspect": "crop"},
}


def make_fused(folder: Path, names: Sequence[str]) -> tuple:
    """Torch's LLM and branches, whose projectors have one layer, two, three; model, processor."""
    llm = make_llama(20)
    branches = {}
    for i, name in enumerate(names):
        tower = make_tower(name, 30 + i, num_hidden_layers=2)
        din = tower.config.hidden_size * len(KINDS[name]["taps"])
        sizes = (din, *[llm.config.hidden_size] * (i + 1))
        branches[f"b{i}"] = (tower, make_connector(sizes, 40 + i), KINDS[name])
    checkpoints.fused_folder(folder, llm, branches)
    return llm, branches, *converters.load(folder)


@pytest.fixture(scope="module")
def fused(tmp_path_factory) -> tuple:
    return make_fused(tmp_path_factory.mktemp("fused"), ["clip", "dinov2"])


def assert_all_rows(llm, branches, model, processor) -> None:
    """Every row of a mixed batch equals the torch assembly of that row alone."""
    assert [b.name for b in model.config.branches] == list(branches)
    batch = processor(pictures(3), input_ids=ROWS)
    logits = np.asarray(forward(model, batch))
    for i, row in enumerate(ROWS):
        expected = checkpoints.reference_logits(llm, branches, row, pixels_of(batch, i))
        found = logits[i][batch.mask[i]]
        assert_close(found, expected, i)
        assert np.abs(found - expected).max() <= 2e-4


def test_two_branches(fused):
    assert_all_rows(*fused)


def test_three_branches(tmp_path):
    assert_all_rows(*make_fused(tmp_path, ["dinov2_with_registers", "clip", "siglip"]))


def test_order_of_branches_is_the_order_of_tokens(fused):
    """The comparison above would notice branches in another order."""
    llm, branches, model, processor = fused
    batch = processor(pictures(3), input_ids=ROWS)
    logits = np.asarray(forward(model, batch))[0][batch.mask[0]]
    other = dict(reversed(branches.items()))
    expected = checkpoints.reference_logits(llm, other, ROWS[0], pixels_of(batch, 0))
    assert np.abs(logits - expected).max() > 0.1


def test_padding_sides_are_equal(fused):
    _, _, model, processor = fused
    right, left = (
        processor(pictures(3), input_ids=ROWS, padding=side) for side in ("right", "left")
    )
    a, b = (np.asarray(forward(model, x)) for x in (right, left))
    assert not np.array_equal(right.mask, left.mask)
    for i in range(len(ROWS)):
        assert_close(b[i][left.mask[i]], a[i][right.mask[i]], i)


def test_rows_do_not_see_one_another(fused):
    _, _, model, processor = fused
    some = pictures(3)
    batch = processor(some, input_ids=ROWS)
    together = np.asarray(forward(model, batch))
    other = processor([pictures(1, seed=9)[0], *some[1:]], input_ids=ROWS)
    changed = np.asarray(forward(model, other))
    np.testing.assert_array_equal(changed[1:], together[1:])
    assert np.abs(changed[0] - together[0])[batch.mask[0]].max() > 0.1


@pytest.mark.parametrize("padding", ["right", "left"])
def test_prefill_ends_where_each_row_ends(fused, padding: str):
    _, _, model, processor = fused
    batch = processor(pictures(3), input_ids=ROWS, padding=padding)
    every = np.asarray(forward(model, batch))
    last, cache = prefill(model, batch, 200)
    for i in range(len(ROWS)):
        assert_close(last[i], every[i][batch.mask[i]][-1], i)
    np.testing.assert_array_equal(cache.length, batch.mask.sum(axis=1))
    assert cache.k[0].shape[3] == 200


@functools.partial(jax.jit, static_argnums=2)
def prefill(model: Model, batch: Batch, size: int) -> tuple:
    return model.prefill(batch, size)


def test_embeddings_are_zero_at_padding(fused):
    _, _, model, processor = fused
    batch = processor(pictures(3), input_ids=ROWS)
    x, mask = (np.asarray(y) for y in jax.jit(Model.embed)(model, batch))
    np.testing.assert_array_equal(mask, batch.mask)
    assert not x[~mask].any()
    assert np.abs(x[mask]).max(axis=-1).min() > 0
    np.testing.assert_array_equal(x[2, :3], np.asarray(model.llm.embedding[...])[ROWS[2]])


def test_who_scales_visual_tokens(tmp_path):
    """Gemma scales text; one branch's tokens too, as its authors' code does, the other's not."""
    llm = make_llama(6, model_type="gemma", head_dim=8)
    branches = {}
    for name in ("authors", "transformers"):
        tower, connector = make_tower("clip", 7, num_hidden_layers=1), make_connector((32, 32), 8)
        entry = {"taps": [-1], "drop": 1, "aspect": "crop", "code": name}
        branches[name] = (tower, connector, entry)
    checkpoints.fused_folder(tmp_path / "fused", llm, branches)
    model, processor = converters.load(tmp_path / "fused")
    assert [branch.scaled for branch in model.config.branches] == [True, False]
    batch = processor(pictures(1), input_ids=ROWS[:1])
    expected = checkpoints.reference_logits(llm, branches, ROWS[0], pixels_of(batch, 0))
    assert_close(forward(model, batch)[0][batch.mask[0]], expected)
    again = encode(model, batch)
    assert_close(forward(model, again)[0][batch.mask[0]], expected)


def test_text_alone_is_the_llm(fused):
    llm, _, model, processor = fused
    batch = processor(input_ids=ROWS[2:])
    expected = checkpoints.reference_logits(llm, {}, ROWS[2], {})
    assert_close(forward(model, batch)[0][batch.mask[0]], expected)


def test_no_branch_is_a_plain_llm(tmp_path):
    llm = checkpoints.llama_folder(tmp_path, 6)
    model, processor = converters.load(tmp_path)
    assert model.config.branches == ()
    batch = processor(input_ids=ROWS[2:])
    expected = checkpoints.reference_logits(llm, {}, ROWS[2], {})
    assert_close(forward(model, batch)[0][batch.mask[0]], expected)


def test_layers_past_the_tap_are_not_read(upstream):
    folder, _, exact, processor = upstream
    batch = processor(pictures(3), input_ids=ROWS)
    expected = np.asarray(forward(exact, batch))
    model, _ = converters.load(folder)
    encoder = model.branches["clip"].encoder
    for module in (encoder.blocks[-1], encoder.norm):
        for _, leaf in nnx.to_flat_state(nnx.state(module)):
            leaf[...] = jnp.full_like(leaf[...], jnp.nan)
    found = np.asarray(forward(model, batch))
    np.testing.assert_array_equal(found[batch.mask], expected[batch.mask])


def features(model: Model, batch: Batch) -> jax.Array:
    (branch,) = model.branches.values()
    (seen,) = batch.images.values()
    return branch.visual_tokens(branch.encode(seen.given), model.llm.lookup).stages[
        "vision_features"
    ]


def test_bfloat16(upstream):
    """Features, embeddings and cache have the weights' dtype; logits are float32 and near."""
    folder, _, exact, processor = upstream
    model, _ = converters.load(folder, dtype=jnp.bfloat16)
    assert {leaf.dtype.name for _, leaf in nnx.to_flat_state(nnx.state(model))} == {"bfloat16"}
    batch = processor(pictures(3), input_ids=ROWS)
    assert jax.eval_shape(Model.embed, model, batch)[0].dtype == jnp.bfloat16
    assert jax.eval_shape(features, model, batch).dtype == jnp.bfloat16
    expected = np.asarray(forward(exact, batch))[batch.mask]
    _, cache = jax.eval_shape(lambda: model.prefill(batch, 64))
    assert {x.dtype.name for x in (*cache.k, *cache.v)} == {"bfloat16"}
    found = forward(model, batch)
    assert found.dtype == jnp.float32
    error = np.abs(np.asarray(found)[batch.mask] - expected).max() / np.abs(expected).max()
    assert 1e-4 < error < 0.1


def test_pictures_are_encoded_once(fused):
    """Other prompts about the same pictures, without the encoders."""
    _, _, model, processor = fused
    first = encode(model, processor(pictures(3), input_ids=ROWS))
    other = processor(pictures(3), input_ids=[[1, PICTURE, 9], [1, PICTURE, 8, PICTURE], [1, 7]])
    taken = other.with_pictures(first)
    assert all(isinstance(seen.given, VisualTokens) for seen in first.images.values())
    np.testing.assert_array_equal(forward(model, taken), forward(model, other))
    text = processor(None, input_ids=[[1, 7]])
    assert encode(model, text).images == {}
    with pytest.raises(InputError, match=r"visual tokens by branch {}, expected those of the oth"):
        text.with_pictures(first)
    one = encode(model, processor(pictures(1), input_ids=[[1, PICTURE, 9]]))
    with pytest.raises(InputError, match="visual tokens by branch {'b0': 64"):
        other.with_pictures(one)  # of a third as many pictures


def test_pictures_are_encoded_once_where_the_prompt_chooses_tokens(shared: Path, monkeypatch):
    """SliME's router reads each prompt; its encoder sees the pictures once."""
    model, processor = converters.load(shared / "golden" / "slime_vicuna")
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (70, 30 * n, 3), np.uint8) for n in (1, 4)]
    first = encode(model, processor(pictures, input_ids=[[1, PICTURE, 9, 8], [1, PICTURE, 7]]))
    other = processor(pictures, input_ids=[[1, 12, PICTURE, 30], [1, 17, 18, PICTURE]])
    (seen,) = first.images.values()
    assert isinstance(seen.given, Encoded)
    expected = forward(model, other)
    (branch,) = model.branches.values()
    monkeypatch.setattr(type(branch.encoder), "__call__", None)
    np.testing.assert_array_equal(forward(model, other.with_pictures(first)), expected)
