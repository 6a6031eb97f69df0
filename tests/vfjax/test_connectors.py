"""Connectors against torch's nn.Sequential."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers.activations import ACT2FN

from tests.checkpoints import make_connector
from vfjax.connectors import Combine, MiningConfig, MLPConfig


@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_mlp(layers: int, act: str):
    sizes = (24, *[40] * layers)
    theirs = make_connector(sizes, seed=layers)
    for i in range(1, len(theirs), 2):
        theirs[i] = ACT2FN[act]
    ours = MLPConfig(din=24, dout=40, layers=layers, act=act).build(rngs=nnx.Rngs(0))
    for layer, linear in zip(ours.layers, theirs[::2], strict=True):
        layer.kernel[...] = jnp.asarray(linear.weight.detach().numpy().T)
        layer.bias[...] = jnp.asarray(linear.bias.detach().numpy())
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))
    expected = theirs(x).detach().numpy()
    found = np.asarray(ours(jnp.asarray(x.numpy())))
    assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize(("grid", "side"), [(24, 12), (27, 12), (6, 4), (4, 4)])
def test_efficient_dense_connector(grid: int, side: int):
    """Dense Connector's efficient variant: torch's bilinear resize of the joined features."""
    combine = Combine(groups=((0,), (0, 1)), drop=1, side=side)
    rng = np.random.default_rng(0)
    states = [rng.normal(size=(2, 1 + grid**2, 5)).astype(np.float32) for _ in range(2)]
    first, second = (torch.from_numpy(x[:, 1:]) for x in states)
    joined = torch.cat([first, (first + second) / 2], dim=-1)
    maps = joined.permute(0, 2, 1).unflatten(2, (grid, grid))
    small = torch.nn.functional.interpolate(maps, (side, side), mode="bilinear")
    expected = small.flatten(2).permute(0, 2, 1).numpy()
    plain, found = combine([jnp.asarray(x) for x in states])
    np.testing.assert_array_equal(plain, first)
    assert found.shape == expected.shape == (2, combine.tokens(grid**2), 10)
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_dense_connector_on_mined_features():
    """Mini-Gemini with Dense Connector: the plain feature alone is mined, then all are joined."""
    rng = np.random.default_rng(0)
    states = {tap: rng.normal(size=(1, 5, 8)).astype(np.float32) for tap in (0, 1, -2)}
    maps = [rng.normal(size=(1, 8 >> k, 8 >> k, 4)).astype(np.float32) for k in range(4)]
    sizes = {"width": 8, "aux_width": 16}
    dense = Combine(groups=((-2,), (0, 1), (1,)))
    features = {}
    for name, combine in {"plain": Combine(), "dense": dense}.items():
        projector = MLPConfig(combine.width(8), 6, 2)
        connector = MiningConfig(projector, combine=combine, **sizes).build(rngs=nnx.Rngs(3))
        seen = {"encoder": [states[tap] for tap in combine.taps], "aux": maps}
        features[name] = np.asarray(connector(seen, {}, lambda ids: ids)["connector_features"])
    assert np.abs(features["plain"] - states[-2][:, 1:]).max() > 1e-3  # something was found
    first, second = (states[0][:, 1:] + states[1][:, 1:]) / 2, states[1][:, 1:]
    expected = np.concatenate([features["plain"], first, second], axis=-1)
    np.testing.assert_allclose(features["dense"], expected, atol=1e-6)
