"""Attention's kernels against attention written out: the TPU's step by step, cuDNN's inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

import vfjax.nn.layers
from converters.load import flatten
from vfjax.fusion.segments import block
from vfjax.llm import Llama, LlamaConfig
from vfjax.nn.flash import Kernel, cudnn, flash, kernel_flops, kernel_for, splash
from vfjax.nn.layers import attend
from vfjax.sharding import AXES, make_mesh, param_sharding, place

TPU = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
GPU = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
KERNELS = {
    "splash": functools.partial(splash, interpret=True),
    "cudnn": functools.partial(cudnn, implementation="xla"),
}
"""As they run here."""


def random(b: int, t: int, n: int, g: int, h: int) -> tuple[jax.Array, ...]:
    """Queries, keys, values and real tokens: padding on the right, or on the left."""
    rng = np.random.default_rng(0)
    shapes = (b, t, n, h), (b, g, h, t), (b, g, t, h)
    q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    real = np.ones((b, t), bool)
    real[0, t - 30 :] = real[1:, :20] = False
    return q, k, v, jnp.asarray(real)


def branches(b: int, t: int) -> jax.Array:
    """Text, three branches' tokens, text, two of the next picture, text."""
    lengths = np.array([0.2, 0.1, 0.2, 0.1, 0.1, 0.1, 0.2]) * t
    row = np.repeat([0, 1, 2, 3, 0, 1, 2], np.round(lengths).astype(int))
    return jnp.asarray(np.stack([np.roll(np.resize(row, t), 7 * i) for i in range(b)]), jnp.int32)


def written_out(
    q: jax.Array, k: jax.Array, v: jax.Array, real: jax.Array, segments: jax.Array | None
) -> jax.Array:
    see = real[:, None] & jnp.tril(jnp.ones((q.shape[1],) * 2, bool))
    if segments is not None:
        see &= block(segments)
    return attend(q, k, v, see, causal=True)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(("t", "heads"), [(130, (4, 4, 128)), (300, (2, 1, 80)), (700, (4, 2, 64))])
def test_as_written_out(t, heads, apart, kernel):
    args = *random(2, t, *heads), branches(2, t) if apart else None
    found, expected = flash(*args, KERNELS[kernel]), written_out(*args)
    assert found.shape == expected.shape
    assert jnp.isfinite(found).all()  # padding's keys and values are read by the next layer
    atol = 1e-4 if apart else 3e-6
    np.testing.assert_allclose(found[args[3]], expected[args[3]], atol=atol)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("shape", "apart"), [(None, True), ((2, 4), False), ((2, 4), True)])
def test_gradients(shape, apart, kernel):
    """Rematerialised, as in training; on a mesh of more devices than heads of keys."""
    args = *random(2, 130, 4, 2, 64), branches(2, 130) if apart else None
    if shape is not None:
        args = place(args, make_mesh(*shape))

    def gradients(attend):
        def loss(q, k, v, real, segments):
            out = jax.checkpoint(attend)(q, k, v, real, segments)
            return (out * real[..., None, None]).sum()

        return jax.jit(jax.grad(loss, (0, 1, 2)))(*args)

    found = gradients(functools.partial(flash, kernel=KERNELS[kernel]))
    for a, b in zip(found, gradients(written_out), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-4 if apart else 1e-5)


@pytest.mark.parametrize(("shape", "rows"), [((2, 4), 4), ((1, 8), 3)])
def test_llama_on_a_mesh(monkeypatch, shape, rows):
    """Prefill and a step after it; key heads and rows that the mesh divides, and does not."""
    size = 270
    config = LlamaConfig(64, 64, 2, 8, 4, 16, 128, 512)
    rng = np.random.default_rng(1)
    llm = Llama(config, rngs=nnx.Rngs(0))
    ids = rng.integers(0, 64, (rows, size))
    mask = np.arange(size) < rng.integers(200, size, (rows, 1))
    used = []

    def counted(*args):
        used.append(args)
        return KERNELS["splash"](*args)

    def run(llm, ids, mask):
        x = llm.embed(ids)
        hidden, cache = llm(x, mask, llm.new_cache(rows, size + 1))
        step, _ = llm(x[:, :1], jnp.ones((rows, 1), bool), cache)
        return jnp.where(mask[..., None], hidden, 0), step

    expected = run(llm, ids, mask)
    monkeypatch.setattr(
        vfjax.nn.layers, "kernel_for", lambda q: counted if q.shape[1] > 1 else None
    )
    mesh = make_mesh(*shape)
    graph, state = nnx.split(llm)
    for name, p in flatten(state).items():
        p[...] = jax.device_put(p[...], param_sharding(name, p, mesh))
    found = jax.jit(lambda state, *args: run(nnx.merge(graph, state), *args))(
        state, *place((ids, mask), mesh)
    )
    assert len(used) == config.layers
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def shape_on(mesh: Mesh | AbstractMesh | None, *shape: int, dtype=jnp.bfloat16):
    at = mesh and NamedSharding(mesh, PartitionSpec())
    return jax.ShapeDtypeStruct(shape, dtype, sharding=at)


def asked(x: jax.ShapeDtypeStruct) -> Kernel | None:
    """`kernel_for` a traced array."""
    out = []
    jax.eval_shape(lambda q: out.append(kernel_for(q)), x)
    return out[0]


def test_where_a_kernel_is():
    auto = (AxisType.Auto,) * 3
    tpus = AbstractMesh((2, 1, 4), AXES, auto, abstract_device=TPU)
    assert asked(shape_on(tpus, 2, 1024, 8, 128)) is splash
    assert not asked(shape_on(tpus, 2, 1024, 6, 128))  # heads that four devices cannot share
    assert not asked(shape_on(tpus, 2, 64, 8, 128))
    assert not asked(shape_on(tpus, 2, 1024, 8, 128, dtype=jnp.float32))
    assert not asked(shape_on(make_mesh(2, 4), 2, 1024, 8, 128))
    assert not asked(shape_on(None, 2, 1024, 8, 128))


def test_where_cudnn_is(monkeypatch):
    gpus = AbstractMesh((2, 1, 4), AXES, (AxisType.Auto,) * 3, abstract_device=GPU)
    assert not asked(shape_on(gpus, 2, 1024, 8, 128))  # not on this machine
    monkeypatch.setattr(vfjax.nn.flash, "has_cudnn", lambda: True)
    assert asked(shape_on(gpus, 2, 1024, 8, 128)) is cudnn
    assert not asked(shape_on(gpus, 2, 1024, 8, 256))  # longer heads than it reads
    assert not asked(shape_on(gpus, 2, 1024, 8, 100))
    assert not asked(shape_on(gpus, 2, 1024, 8, 128, dtype=jnp.float32))


@pytest.mark.parametrize("apart", [False, True])
def test_lowers_for_tpu(apart):
    """As far as it goes without the TPU's own compiler; as many kernels as layers."""
    mesh = AbstractMesh((2, 1, 4), AXES, (AxisType.Auto,) * 3, abstract_device=TPU)
    config = LlamaConfig(64, 64, 2, 8, 4, 16, 128, 512)
    graph, state = nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))
    state = jax.tree.map(lambda x: shape_on(mesh, *x.shape), state)

    def run(state, x, mask, segments):
        llm = nnx.merge(graph, state)
        return llm(x, mask, llm.new_cache(2, 400), None, segments if apart else None)[0]

    args = state, shape_on(mesh, 2, 300, 64), shape_on(mesh, 2, 300, dtype=jnp.bool_)
    args += (shape_on(mesh, 2, 300, dtype=jnp.int32),)
    text = jax.jit(run).trace(*args).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("call @splash(") == config.layers
    assert "tpu_custom_call" in text


@pytest.mark.parametrize("apart", [False, True])
def test_lowers_for_cuda(apart, monkeypatch):
    """Calls of cuDNN, forward and back, on a mesh; JAX asks for its version and for the GPU's."""
    from jax._src.cudnn import fused_attention_stablehlo as calls

    monkeypatch.setattr(calls, "check_cudnn_version", lambda: 91100)
    mesh = make_mesh(2, 4)
    shapes = [(2, 300, 8, 64), (2, 4, 64, 300), (2, 4, 300, 64)]
    args = [*(shape_on(mesh, *shape) for shape in shapes), shape_on(mesh, 2, 300, dtype=jnp.bool_)]
    args += [shape_on(mesh, 2, 300, dtype=jnp.int32) if apart else None]
    grad = jax.grad(lambda *args: flash(*args, cudnn).astype(jnp.float32).sum())
    traced = jax.jit(grad).trace(*args)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    for call in ("Softmax", "SoftmaxBackward"):
        assert text.count(f"@__cudnn$fmha{'ScaleBias' * apart}{call}(") == 1
    pairs = 1 * 2 * 300 * 300 / 2  # of a device
    assert kernel_flops(traced.jaxpr) == (2 + 5) * pairs * 2 * 64


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("b", [1, 2])
def test_counts_operations(b, apart):
    """Of segments that are told apart by three features of keys, of which 128 are read."""
    t, n, g, h = 256, 4, 2, 128
    shapes = [(b, t, n, h), (b, g, h, t), (b, g, t, h)]
    args = [*(shape_on(None, *shape) for shape in shapes), shape_on(None, b, t, dtype=jnp.bool_)]
    args += [shape_on(None, b, t, dtype=jnp.int32) if apart else None]
    pairs, long = b * n * t * t / 2, 2 * h if apart else h
    forward = jax.jit(functools.partial(flash, kernel=splash)).trace(*args).jaxpr
    assert kernel_flops(forward) == 2 * pairs * (long + h)
    back = jax.jit(jax.grad(lambda *args: flash(*args, splash).astype(jnp.float32).sum())).trace(
        *args
    )
    assert kernel_flops(back.jaxpr) == 2 * pairs * (5 * long + 4 * h)
    assert kernel_flops(jax.jit(jnp.sin).trace(1.0).jaxpr) == 0
