"""Causal attention by an accelerator's kernel: scores stay on the chip (arXiv 2205.14135).

On TPU it is JAX's splash attention; other platforms have none here. Written out, the scores of 3000
tokens cross a TPU's memory several times, which takes longer than all products of a prefill. For
vision towers' 577 tokens the kernel saves no traffic (libtpu's count), so they do without.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from vfjax.sharding import rows_over

Array = jax.Array

LANES, BLOCK = 128, 640
"""Features and tokens come in multiples of a TPU's lanes, tokens in blocks of so many at most."""
SHORT = 256
"""Below so many tokens the scores are small."""


def has_kernel(q: Array) -> bool:
    """Whether queries [b, t, n, h] lie on devices with a kernel for them, and are many enough.

    The kernel is for bfloat16: float32 is asked for where digits count, which it does not keep.
    """
    mesh = jax.typeof(q).sharding.mesh
    if q.shape[1] < SHORT or q.dtype != jnp.bfloat16:
        return False
    if mesh.empty:
        return jax.default_backend() == "tpu"
    device = mesh.abstract_device
    return (
        device is not None
        and device.platform == "tpu"
        and set(mesh.axis_types) == {AxisType.Auto}
        and q.shape[2] % mesh.shape.get("model", 1) == 0
    )


def flash(q: Array, k: Array, v: Array, real: Array, *, interpret: bool = False) -> Array:
    """Attention of tokens to those before them, on each device for its rows and heads.

    Args:
        q: [b, t, n, h] queries; the mesh's `model` axis divides n.
        k: [b, g, h, t] keys; g divides n.
        v: [b, g, t, h] values.
        real: bool[b, t], the tokens that are seen.
        interpret: runs the kernel step by step on any platform, for tests.

    Returns:
        [b, t, n, h] in q's dtype; softmax in float32. Undefined, but finite, at tokens not real.
    """
    local = functools.partial(_splash, interpret=interpret)
    mesh = jax.typeof(q).sharding.mesh
    if mesh.empty:
        return local(q, k, v, real)
    over = mesh.shape.get("model", 1)
    if k.shape[1] % over:  # heads of keys that the devices cannot share: each query's own
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[1], axis=1) for x in (k, v))
    rows, model = rows_over(mesh, len(q)), "model" if over > 1 else None
    queries, keys = PartitionSpec(rows, None, model), PartitionSpec(rows, model)
    specs = (queries, keys, keys, PartitionSpec(rows))
    run = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=queries, check_vma=False)
    return run(q, k, v, real)


@functools.partial(jax.jit, static_argnames="interpret")
def _splash(q: Array, k: Array, v: Array, real: Array, *, interpret: bool) -> Array:
    """`flash` on one device."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    t, n, h = q.shape[1:]
    block = LANES * -(-t // (LANES * -(-t // BLOCK)))
    size = block * -(-t // block)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes: Any = {f"block_{name}": block for name in names}
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([splash.CausalMask((size, size))] * n),
        block_sizes=splash.BlockSizes(**sizes),
        interpret=interpret,
    )

    def grown(x: Array) -> Array:
        """[b, heads, t, h] with as many tokens and features as the kernel takes."""
        return jnp.pad(x, ((0, 0), (0, 0), (0, size - t), (0, -h % LANES)))

    told = jnp.pad(real.astype(jnp.int32), ((0, 0), (0, size - t)))  # padding sees padding
    out = jax.vmap(lambda q, k, v, told: kernel(q, k, v, splash.SegmentIds(told, told)))(
        grown((q * h**-0.5).swapaxes(1, 2)), grown(k.swapaxes(2, 3)), grown(v), told
    )
    return out[:, :, :t, :h].swapaxes(1, 2)


PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}
"""Phase of a kernel -> its matrix products over all pairs of tokens."""


def kernel_flops(jaxpr: Any) -> float:
    """Operations of the attention kernels of a traced program on a device: no compiler counts them.

    Args:
        jaxpr: such as `jax.jit(f).trace(...).jaxpr`.
    """
    total = 0.0
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if eqn.primitive.name == "pallas_call":
            inputs = (x.aval for x in eqn.invars)
            q = next(x.shape for x in inputs if jnp.issubdtype(x.dtype, jnp.floating))
            (phase,) = (each for each in PRODUCTS if f"_{each}_" in eqn.params["name"])
            total += PRODUCTS[phase] * math.prod(q) * q[-2]  # half of all pairs
            continue
        times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        for inner in jax.tree.leaves(tuple(eqn.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                total += times * kernel_flops(inner)
    return total


def _is_jaxpr(x: Any) -> bool:
    return hasattr(getattr(x, "jaxpr", x), "eqns")
