"""Attention against softmax written out by hand, and the shares of branches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vfjax import analysis as look
from vfjax.analysis.attention import weights
from vfjax.architectures import Inputs, Llava, Pictures, ProjectorConfig
from vfjax.architectures.combine import Combine
from vfjax.architectures.mlp import MLPConfig
from vfjax.llm.llama import Attention, LlamaConfig, Step
from vfjax.llm.phi3 import FusedAttention, Phi3Config
from vfjax.model import Batch, BranchConfig, ModelConfig
from vfjax.vision.encoders import CLIPConfig
from vfjax.vision.images import ImageSpec

LLM = LlamaConfig(vocab=20, width=16, layers=2, heads=4, kv_heads=2, head_dim=4, mlp=24, context=64)


def branch(name: str, size: int) -> BranchConfig:
    """Nine or four tokens of one picture."""
    encoder = CLIPConfig(width=8, layers=1, heads=2, mlp=8, patch=4, image_size=size)
    images = ImageSpec(size, size, "shortest", "pad", (0.5,) * 3, (0.5,) * 3)
    connector = ProjectorConfig(MLPConfig(8, 16), Combine(((-1,),)))
    return BranchConfig(name, Llava(encoder, connector, images))


def filled(build, seed: int):
    """A module with random parameters, which no compiler makes."""
    graph, state = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
    rng = np.random.default_rng(seed)
    return nnx.merge(
        graph, jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape), x.dtype), state)
    )


@pytest.fixture(scope="module")
def model():
    config = ModelConfig((branch("a", 12), branch("b", 8)), LLM)
    return filled(lambda rngs: config.build(rngs=rngs), 0)


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Two rows of a picture each, the second shorter and padded on the left."""
    rng = np.random.default_rng(0)
    images = {
        name: Pictures(Inputs(rng.normal(size=(2, size, size, 3)).astype(np.float32)))
        for name, size in (("a", 12), ("b", 8))
    }
    rows = [[1, 2, None, 3, 4, 5], [1, None, 6]]
    tokens, visual = np.zeros((2, 18), np.int32), np.full((2, 18), -1, np.int32)
    mask = np.zeros((2, 18), bool)
    for i, row in enumerate(rows):
        numbers = [*range(9 * i, 9 * i + 9), *range(18 + 4 * i, 22 + 4 * i)]
        ids = [x for t in row for x in ([0] * 13 if t is None else [t])]
        places = [x for t in row for x in (numbers if t is None else [-1])]
        at = slice(18 - len(ids), 18)
        tokens[i, at], visual[i, at], mask[i, at] = ids, places, True
    segments = np.where(visual < 0, 0, np.where(visual < 18, 1, 2))
    return Batch(tokens, visual, mask, segments, images)


@pytest.fixture(scope="module")
def embedded(model, batch: Batch) -> np.ndarray:
    return np.asarray(jax.jit(type(model).embed)(model, batch)[0], np.float64)


def by_hand(model, batch: Batch, x: np.ndarray) -> list[list[np.ndarray]]:
    """Each row's weights float64[heads, t, t] of each layer, of the real tokens alone."""
    return [_row(model, x[i, batch.mask[i]]) for i in range(len(x))]


def _row(model, x: np.ndarray) -> list[np.ndarray]:
    t, found = len(x), []
    angles = np.arange(t)[:, None] * 10000.0 ** -np.array([0, 0.5])
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]

    def normed(norm, y):
        return np.asarray(norm.scale[...]) * y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5)

    def split(layer, y):
        return (y @ np.asarray(layer.kernel[...], np.float64)).reshape(t, -1, 4)

    def turned(y):
        a, b = y[..., :2], y[..., 2:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    for block in model.llm.blocks:
        y = normed(block.norm1, x)
        q, k, v = (split(layer, y) for layer in (block.attn.q, block.attn.k, block.attn.v))
        q, k = turned(q), turned(k)
        out, weights = np.zeros((t, 4, 4)), np.zeros((4, t, t))
        for head in range(4):
            for i in range(t):
                scores = np.exp(k[: i + 1, head // 2] @ q[i, head] / 2)
                weights[head, i, : i + 1] = scores / scores.sum()
            out[:, head] = weights[head] @ v[:, head // 2]
        x = x + split(block.attn.out, out.reshape(t, 16)).reshape(t, 16)
        y = normed(block.norm2, x)
        gate, up = (split(layer, y).reshape(t, -1) for layer in (block.mlp.gate, block.mlp.up))
        x = x + split(block.mlp.down, gate / (1 + np.exp(-gate)) * up).reshape(t, 16)
        found.append(weights)
    return found


@pytest.mark.parametrize("who", ["question", "last"])
def test_equal_to_softmax_by_hand(model, batch: Batch, embedded, who: str) -> None:
    found, segments = jax.device_get(look.attention(model, batch, look.readers(batch)))
    rows, readers = found[who], look.readers(batch)[who]
    assert np.allclose(rows.sum(axis=-1), 1, atol=1e-6)
    for i, layers in enumerate(by_hand(model, batch, embedded)):
        real = batch.mask[i]
        assert not rows[i][:, ~real].any() and not rows[i][:, real][:, 0].any()  # padding, sink
        for layer, heads in enumerate(layers):
            mine = heads.mean(axis=0)[readers[i, real]]
            mine[:, 0] = 0
            expected = (mine / mine.sum(axis=1, keepdims=True)).mean(axis=0)
            np.testing.assert_allclose(rows[i, layer, real], expected, atol=2e-6)
    counts = [[(row == k).sum() for k in (1, 2)] for row in segments]
    assert counts == [[9, 4], [9, 4]]


def test_readers_are_the_text_after_the_picture(batch: Batch) -> None:
    found = look.readers(batch)
    assert [batch.tokens[i][found["question"][i]].tolist() for i in (0, 1)] == [[3, 4, 5], [6]]
    assert [batch.tokens[i][found["last"][i]].tolist() for i in (0, 1)] == [[5], [6]]


def test_shares_of_branches_sum_to_one(model, batch: Batch) -> None:
    by_reader, segments = jax.device_get(look.attention(model, batch, look.readers(batch)))
    rows = by_reader["last"]
    found = look.shares(rows, segments, 2)
    assert found.shape == (2, 2, 3) and np.allclose(found.sum(axis=-1), 1, atol=1e-6)
    one = rows[0, 1][segments[0] == 2]
    assert found[0, 1, 2] == pytest.approx(one.sum()) and 0 < one.sum() < 1


@pytest.mark.parametrize(
    "make",
    [
        lambda rngs: Attention(dataclasses.replace(LLM, qk_norm=True, qkv_bias=True), rngs=rngs),
        lambda rngs: Attention(dataclasses.replace(LLM, rotary=0.5), rngs=rngs),
        lambda rngs: FusedAttention(
            Phi3Config(**dataclasses.asdict(LLM) | {"rope_scaling": None}), rngs=rngs
        ),
    ],
    ids=["qwen3", "phi", "phi3"],
)
def test_weights_give_what_the_block_computes(make) -> None:
    attn = filled(make, 1)
    x = np.random.default_rng(2).normal(size=(2, 5, 16)).astype(np.float32)
    positions, see = np.tile(np.arange(5), (2, 1)), np.tile(np.tri(5, dtype=bool), (2, 1, 1))

    @jax.jit
    def both(attn, x):
        step = Step(*attn.config.rope(positions), see, None, None, None)
        out, (k, v) = attn(x, 0, step)
        values = jnp.repeat(v, 2, axis=1)
        mixed = jnp.einsum("bnts,bnsh->btnh", weights(attn, x, k, step), values)
        return out, attn.out(mixed.reshape(x.shape))

    np.testing.assert_allclose(*both(attn, x), rtol=1e-4, atol=1e-5)


def test_entropy_and_divergence() -> None:
    assert look.entropy(np.ones(7)) == pytest.approx(1)
    assert look.entropy(np.eye(7)[2]) == pytest.approx(0)
    assert look.entropy(np.array([1.0, 1, 0, 0])) == pytest.approx(0.5)
    p, q = np.array([[1.0, 1, 0], [3, 0, 1]]), np.array([[0.0, 0, 5], [6, 0, 2]])
    np.testing.assert_allclose(look.divergence(p, q), [1, 0], atol=1e-12)
    half = look.divergence(np.array([1.0, 0]), np.array([0.5, 0.5]))
    assert half == pytest.approx(0.311278, abs=1e-6)  # 1.5 - 0.75 log2 3


def test_features_are_means_of_a_branchs_tokens(model, batch: Batch, embedded) -> None:
    found = look.pooled(model, batch)
    for row in (0, 1):
        x = embedded[row][np.flatnonzero(batch.visual[row] >= 0)]
        assert len(x) == 13
        np.testing.assert_allclose(found[row], [x[:9].mean(axis=0), x[9:].mean(axis=0)], atol=1e-6)
