"""Building blocks against torch and transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from vfjax.nn import layers
from vfjax.nn.layers import (
    ACTIVATIONS,
    RMSNorm,
    attend,
    attention,
    layer_norm,
    linear,
    param,
    rotate,
)

BFLOAT16_ULP = 2.0**-8


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_is_the_one_of_that_name(name: str):
    x = np.linspace(-12, 12, 4001, dtype=np.float32)
    expected = ACT2FN[name](torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(x)), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("offset", "limit"), [(0.0, 2e-6), (300.0, 5e-4)])
def test_layer_norm(offset: float, limit: float):
    """Around 300 float32 steps are 3e-5; a variance by E[x^2] - E[x]^2 would be off by 1e-2."""
    width, eps = 40, 1e-3
    x, scale, bias = offset + normal(0, 3, 5, width), normal(1, width), normal(2, width)
    norm = layer_norm(width, eps, rngs=nnx.Rngs(0))
    norm.scale[...], norm.bias[...] = scale, bias
    args = (torch.from_numpy(a) for a in (scale, bias))
    expected = torch.nn.functional.layer_norm(torch.from_numpy(x), (width,), *args, eps).numpy()
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=0, atol=limit)


def test_rms_norm():
    width, eps = 40, 1e-3
    x, scale = normal(0, 3, 5, width), normal(1, width)
    norm = RMSNorm(width, eps, rngs=nnx.Rngs(0))
    norm.scale[...] = scale
    theirs = LlamaRMSNorm(width, eps)
    theirs.weight.data = torch.from_numpy(scale)
    expected = theirs(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("make", [layer_norm, RMSNorm])
def test_norms_reduce_in_float32(make):
    """In bfloat16 the sum of 4096 squares would be off by percents."""
    x = jnp.asarray(normal(0, 2, 4096), jnp.bfloat16)
    norm = make(4096, 1e-6, rngs=nnx.Rngs(0))
    expected = np.asarray(norm(x.astype(jnp.float32)))
    norm = nnx.merge(*_cast(norm, jnp.bfloat16))
    found = norm(x)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=BFLOAT16_ULP, atol=1e-6)


def _cast(module: nnx.Module, dtype: jnp.dtype) -> tuple:
    graph, state = nnx.split(module)
    return graph, jax.tree.map(lambda x: x.astype(dtype), state)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("masked", [False, True])
def test_attention(groups: int, masked: bool):
    b, t, s, n, h = 2, 5, 7, 6, 8
    q, k, v = normal(0, b, t, n, h), normal(1, b, s, groups, h), normal(2, b, s, groups, h)
    mask = np.random.default_rng(3).random((b, t, s)) < 0.6
    mask[..., 0] = True
    assert not mask.all()
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(torch.from_numpy(x).transpose(1, 2) for x in (q, k, v)),
        attn_mask=torch.from_numpy(mask[:, None]) if masked else None,
        enable_gqa=True,
    ).transpose(1, 2)
    found = attention(*map(jnp.asarray, (q, k, v)), jnp.asarray(mask) if masked else None)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


def test_causal_attention_in_blocks_is_the_same(monkeypatch):
    q, k, v = (jnp.asarray(normal(i, 2, 150, n, 8)) for i, n in enumerate((4, 2, 2)))
    see = np.random.default_rng(3).random((2, 150, 150)) < 0.7
    see = np.tril(see | np.eye(150, dtype=bool))
    expected = attention(q, k, v, see)
    monkeypatch.setattr(layers, "BLOCK", 1)
    k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
    text = jax.jit(attend, static_argnames="causal").lower(q, k, v, see, causal=True).as_text()
    assert text.count("stablehlo.dot_general") == 2 * 3
    found = attend(q, k, v, see, causal=True)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


def test_attention_with_nothing_to_see_is_a_mean():
    q, k, v = normal(0, 1, 1, 2, 8), normal(1, 1, 3, 2, 8), normal(2, 1, 3, 2, 8)
    found = attention(*map(jnp.asarray, (q, k, v)), jnp.zeros((1, 1, 3), bool))
    np.testing.assert_allclose(found[0, 0], v[0].mean(axis=0), rtol=0, atol=1e-6)


def test_attention_softmax_is_float32():
    """2000 keys of equal weight: bfloat16 sums of 1/2000 would stop growing at 1/8."""
    q, k = jnp.zeros((1, 1, 1, 8), jnp.bfloat16), jnp.zeros((1, 2000, 1, 8), jnp.bfloat16)
    v = jnp.ones((1, 2000, 1, 8), jnp.bfloat16)
    found = attention(q, k, v)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), 1.0, rtol=4 * BFLOAT16_ULP)


def test_rotate():
    x, angles = normal(0, 2, 5, 3, 8), normal(1, 2, 5, 4) * 100
    full = torch.from_numpy(np.concatenate([angles, angles], axis=-1))
    q = torch.from_numpy(x).transpose(1, 2)
    expected, _ = apply_rotary_pos_emb(q, q, full.cos(), full.sin())
    found = rotate(jnp.asarray(x), jnp.cos(angles), jnp.sin(angles))
    np.testing.assert_allclose(found, expected.transpose(1, 2), rtol=0, atol=2e-5)


def test_parameters_carry_their_axes():
    dense = linear(4, 6, ("embed", "mlp"), rngs=nnx.Rngs(0))
    assert dense.kernel.shape == (4, 6)
    assert dense.kernel.axes == ("embed", "mlp")
    assert dense.bias.axes == ("mlp",)
    assert linear(4, 6, ("embed", "mlp"), bias=False, rngs=nnx.Rngs(0)).bias is None
    table = param((3, 4), ("vocab", "embed"), rngs=nnx.Rngs(0))
    assert (table.shape, table.axes) == ((3, 4), ("vocab", "embed"))


def test_gelus_are_told_apart():
    """CLIP's, the projectors' and SigLIP's differ by more than any parity limit."""
    x = jnp.linspace(-4, 4, 801)
    names = ("gelu", "gelu_pytorch_tanh", "quick_gelu")
    erf, tanh, quick = (np.asarray(ACTIVATIONS[name](x)) for name in names)
    assert 1e-4 < np.abs(erf - tanh).max() < 1e-3
    assert np.abs(erf - quick).max() > 1e-2
    assert np.abs(tanh - quick).max() > 1e-2
