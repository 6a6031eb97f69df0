"""Connectors against torch's nn.Sequential."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers.activations import ACT2FN

from tests.checkpoints import make_connector
from vfjax.connectors import MLPConfig


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
