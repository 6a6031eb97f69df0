"""Connectors against torch's nn.Sequential."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers.activations import ACT2FN

from tests.checkpoints import make_connector
from vfjax.architectures import Combine, MiningConfig, MLPConfig, Prompt, SliMEConfig
from vfjax.architectures.slime import EncodedSlices
from vfjax.nn.layers import redraw


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
        features[name] = np.asarray(connector(seen).stages["connector_features"])
    assert np.abs(features["plain"] - states[-2][:, 1:]).max() > 1e-3  # something was found
    first, second = (states[0][:, 1:] + states[1][:, 1:]) / 2, states[1][:, 1:]
    expected = np.concatenate([features["plain"], first, second], axis=-1)
    np.testing.assert_allclose(features["dense"], expected, atol=1e-6)


def test_mining_is_attention_of_each_token_to_its_cell():
    """As the paper has it: every pixel through the dense layers of keys and values, a softmax."""
    rng = np.random.default_rng(0)
    connector = MiningConfig(MLPConfig(8, 6, 2), width=8, aux_width=16).build(rngs=nnx.Rngs(3))
    for asker in (connector.query, connector.key, connector.value):
        for p in (asker.dense.bias, asker.norm.scale, asker.norm.bias):
            p[...] = jnp.asarray(rng.normal(size=p.shape), jnp.float32)
    tokens = jnp.asarray(rng.normal(size=(2, 4, 8)), jnp.float32)
    maps = [jnp.asarray(rng.normal(size=(2, 8, 8, 16)), jnp.float32)]
    weights = [(np.eye(8), np.eye(8))]
    cells = maps[0].reshape(2, 2, 4, 2, 4, 16).swapaxes(2, 3).reshape(2, 4, 16, 16)
    q, k, v = connector.query(tokens), connector.key(cells), connector.value(cells)
    shares = jax.nn.softmax(jnp.einsum("nsd,nscd->nsc", q, k) / 8**0.5)
    expected = jnp.einsum("nsc,nscd->nsd", shares, v)
    found = connector.mine(tokens, maps, weights)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_new_weights_are_torchs():
    """A projector's output and its weights are as large as those of torch's new modules."""
    torch.manual_seed(0)
    theirs = torch.nn.Sequential(
        torch.nn.Linear(256, 512), torch.nn.GELU(), torch.nn.Linear(512, 512)
    )
    ours = MLPConfig(256, 512).build(rngs=nnx.Rngs(0))
    redraw(ours, nnx.Rngs(1))
    for layer, linear in zip(ours.layers, theirs[::2], strict=True):
        for p, q in ((layer.kernel, linear.weight), (layer.bias, linear.bias)):
            a, b = np.abs(np.asarray(p[...])), np.abs(q.detach().numpy())
            np.testing.assert_allclose([a.mean(), a.max()], [b.mean(), b.max()], rtol=0.1)
    x = torch.randn(64, 256)
    found, expected = ours(jnp.asarray(x.numpy())), theirs(x).detach()
    rms = [float((y**2).mean() ** 0.5) for y in (found, expected)]
    np.testing.assert_allclose(*rms, rtol=0.05)


def slime(**options):
    """A SliME connector, the inputs of one picture, and what it makes of them."""
    config = SliMEConfig(
        MLPConfig(128, 16), 128, grid=2, queries=4, separator=3, tiles=2, **options
    )
    connector = config.build(rngs=nnx.Rngs(0))
    redraw(connector, nnx.Rngs(0))
    rng = np.random.default_rng(0)
    connector.gate[...] = jnp.asarray(rng.normal(size=(128, 2)), jnp.float32)
    states = {"encoder": [jnp.asarray(rng.normal(size=(3, 5, 128)), jnp.float32)]}
    encoded = EncodedSlices(states, jnp.ones((1, 2), bool), jnp.arange(8)[None])
    prompt = Prompt(jnp.asarray([[1, 2]]), jnp.ones((1, 2), bool))
    table = jnp.asarray(rng.normal(size=(9, 16)), jnp.float32)

    def run(key=None):
        return connector(encoded, lambda ids: table[ids], prompt, key)

    return connector, run


def test_new_resampler_is_torchs():
    """Torch's MultiheadAttention: one uniform matrix for queries, keys and values; biases zero."""
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(128, 1)
    ours = slime()[0].sampler
    found = np.concatenate([np.asarray(x.kernel[...]) for x in (ours.q, ours.k, ours.v)], axis=1)
    expected = theirs.in_proj_weight.detach().numpy()
    for a, b in (
        (found, expected),
        (ours.out.kernel[...], theirs.out_proj.weight.detach().numpy()),
    ):
        a, b = np.abs(np.asarray(a)), np.abs(b)
        np.testing.assert_allclose([a.mean(), a.max()], [b.mean(), b.max()], rtol=0.05)
    assert not any(np.asarray(x.bias[...]).any() for x in (ours.q, ours.k, ours.v, ours.out))


def test_slime_adds_noise_in_training():
    """softplus(logits) + 0.01 times normal numbers on the gates' logits, 0.1 on the scores."""
    connector, run = slime()
    key = jax.random.key(7)
    plain, noisy, again = (run(k).stages for k in (None, key, key))
    for name in ("gates", "router_scores"):
        np.testing.assert_array_equal(noisy[name], again[name])
    gate, router = jax.random.split(key)
    x = plain["vision_features"][:1]
    logits = torch.tensor(np.asarray(x @ connector.gate[...]))
    draws = torch.tensor(np.asarray(jax.random.normal(gate, logits.shape)))
    logits = logits + draws * (torch.nn.functional.softplus(logits) + 0.01)
    np.testing.assert_allclose(noisy["gates"], logits.softmax(-1).numpy(), atol=1e-5)
    draws = jax.random.normal(router, plain["router_scores"].shape)
    np.testing.assert_allclose(
        noisy["router_scores"], plain["router_scores"] + 0.1 * draws, atol=1e-6
    )


@pytest.mark.parametrize(
    ("shown", "kept"), [("all", [4, 1, 8]), ("global", [4, 0, 0]), ("local", [0, 0, 8])]
)
def test_slimes_stages_show_parts(shown: str, kept: list[int]):
    """Whole view, separator and tiles; use_global_only and use_local_only leave one of them."""
    keep = np.asarray(slime(shown=shown, top_p=1.0)[1]().keep)
    assert [int(part.sum()) for part in np.split(keep, [4, 5])] == kept
