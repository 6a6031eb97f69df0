"""Mixtral against transformers; the stacked experts both ways."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file

import converters
from converters.load import flatten
from tests.vfjax.llm.common import SIZES, assert_close, assert_family, read
from vfjax import InputError
from vfjax.llm import MixtralConfig
from vfjax.sharding import make_mesh, param_sharding, place


def make(**config) -> transformers.MixtralForCausalLM:
    sizes = {**SIZES, "num_local_experts": 3, "num_experts_per_tok": 2, **config}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))


def test_family(tmp_path):
    ours = assert_family(tmp_path, make())
    assert ours.blocks[0].mlp.gate.shape == (3, 32, 48)


def test_divided_over_a_mesh(tmp_path):
    """The experts' inner width is divided; logits and exported bytes are those of one device."""
    make(num_hidden_layers=1, num_key_value_heads=4).save_pretrained(tmp_path / "theirs")
    ids, mesh = np.arange(3, 27, dtype=np.int32).reshape(2, 12), make_mesh(2, 4)
    model, _ = converters.load(tmp_path / "theirs", mesh=mesh)
    gate = model.llm.blocks[0].mlp.gate.get_value()
    assert gate.addressable_shards[0].data.shape == (3, 32, 12)
    mask = np.ones(ids.shape, bool)
    found = read(model.llm, place(ids, mesh), place(mask, mesh), size=16)[1]
    expected = read(converters.load(tmp_path / "theirs")[0].llm, ids, mask, size=16)[1]
    assert_close(np.asarray(found), np.asarray(expected), "logits")
    converters.export(model, tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / n / "model.safetensors") for n in ("theirs", "ours"))
    assert {n: x.tolist() for n, x in ours.items()} == {n: x.tolist() for n, x in theirs.items()}


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 8, 1)])
def test_devices_work_on_their_own_rows(shape):
    """An eighth of the operations each, and one device's outputs and gradients."""
    sizes = {"vocab": 8, "width": 16, "layers": 1, "heads": 1, "kv_heads": 1, "head_dim": 8}
    config = MixtralConfig(**sizes, mlp=32, context=64, experts=4, chosen=2)
    graph, state = nnx.split(config.block(rngs=nnx.Rngs(0)).mlp)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 9, 16)), jnp.float32)

    def loss(state, x):
        y = nnx.merge(graph, state)(x)
        return (y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum(), y

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    expected = step(state, x)
    mesh = make_mesh(*shape)
    placed = jax.tree.map(lambda x: x, state)
    for name, p in flatten(placed).items():
        p[...] = jax.device_put(p[...], param_sharding(name, p, mesh))
    args = placed, place(x, mesh)
    for a, b in zip(jax.tree.leaves(step(*args)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    whole, part = (step.lower(*a).compile().cost_analysis()["flops"] for a in ((state, x), args))
    assert part < whole / 5


def test_all_tokens_to_one_expert():
    """No capacity: what a router sends is read, however much."""
    sizes = {"vocab": 8, "width": 8, "layers": 1, "heads": 1, "kv_heads": 1, "head_dim": 8}
    config = MixtralConfig(**sizes, mlp=6, context=64, experts=4, chosen=1)
    experts = config.block(rngs=nnx.Rngs(0)).mlp
    experts.router.kernel[...] = jnp.zeros((8, 4)).at[:, 2].set(1)
    x = jnp.abs(jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 8)), jnp.float32))
    gate, up, down = (w[...][2] for w in (experts.gate, experts.up, experts.down))
    expected = (nnx.silu(x @ gate) * (x @ up)) @ down
    np.testing.assert_allclose(experts(x), expected, atol=1e-7)


def test_members_merge(tmp_path):
    """Each expert's tensors are merged under their own names."""
    theirs = make(num_hidden_layers=1)
    for seed in (1, 2):
        assert_family(tmp_path / str(seed), theirs, seed=seed)
    members = {name: tmp_path / name / "theirs" for name in ("1", "2")}
    out = tmp_path / "fused"
    params = {"weights": [0.5, 0.5]}
    converters.fuse(members, out, method="linear", family=False, params=params, export="llm")
    models = [converters.load(p)[0].llm for p in (out, *members.values())]
    found, one, two = (np.asarray(m.blocks[0].mlp.down[...]) for m in models)
    np.testing.assert_allclose(found, (one + two) / 2, rtol=1e-6)


def test_a_missing_expert_is_named(tmp_path):
    make().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    tensors.pop(name)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=f"{name}: found 1 tensor missing"):
        converters.load(tmp_path)
