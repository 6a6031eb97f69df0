"""Causal attention by an accelerator's kernel: scores stay on the chip (arXiv 2205.14135).

JAX's splash attention on TPU, cuDNN's on NVIDIA GPUs. Written out, the scores of 3000 tokens cross
a TPU's memory several times, which takes longer than all products of a prefill. For vision towers'
577 tokens the kernel saves no traffic (libtpu's count), so they do without.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.extend.backend import get_backend
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import AxisType, PartitionSpec

from vfjax.fusion.segments import block
from vfjax.sharding import rows_over

Array = jax.Array
Kernel = Callable[[Array, Array, Array, Array, Array | None], Array]
"""`flash` on one device."""

LANES, BLOCK = 128, 640
"""Features and tokens come in multiples of a TPU's lanes, tokens in blocks of so many at most."""
FAR = 256.0
"""By how much splash attention lowers a score that is not to count: exp(-FAR) is 0."""
SHORT = 256
"""Below so many tokens the scores are small."""
CUDNN = 8, 128
"""cuDNN reads heads of a multiple of so many features, and so many at most."""
AMPERE = 8.0
"""Compute capability of the first GPUs that it has a kernel for."""


def kernel_for(q: Array) -> Kernel | None:
    """The kernel for queries [b, t, n, h] where they lie; None: there is none, or t is too small.

    Kernels are for bfloat16: float32 is asked for where digits count, which they do not keep.
    """
    mesh = jax.typeof(q).sharding.mesh
    if q.shape[1] < SHORT or q.dtype != jnp.bfloat16:
        return None
    device = jax.devices()[0] if mesh.empty else mesh.abstract_device
    if device is None or set(mesh.axis_types) - {AxisType.Auto}:
        return None
    if q.shape[2] % mesh.shape.get("model", 1):
        return None
    if device.platform == "tpu":
        return splash
    multiple, most = CUDNN
    fits = q.shape[3] % multiple == 0 and q.shape[3] <= most
    return cudnn if device.platform == "gpu" and fits and has_cudnn() else None


def has_cudnn() -> bool:
    """Whether the GPUs of this process are NVIDIA's, and Ampere or later."""
    if "cuda" not in get_backend().platform_version:
        return False
    return all(float(device.compute_capability) >= AMPERE for device in jax.local_devices())


def flash(
    q: Array, k: Array, v: Array, real: Array, segments: Array | None, kernel: Kernel
) -> Array:
    """Attention of tokens to those before them, on each device for its rows and heads.

    Args:
        q: [b, t, n, h] queries; the mesh's `model` axis divides n.
        k: [b, g, h, t] keys; g divides n.
        v: [b, g, t, h] values.
        real: bool[b, t], the tokens that are seen.
        segments: int32[b, t], as `vfjax.fusion.segments.block` reads them; None: all see all.
        kernel: of `kernel_for`.

    Returns:
        [b, t, n, h] in q's dtype; softmax in float32. Undefined, but finite, at tokens not real.
    """
    mesh = jax.typeof(q).sharding.mesh
    if mesh.empty:
        return kernel(q, k, v, real, segments)
    over = mesh.shape.get("model", 1)
    if k.shape[1] % over:  # heads of keys that the devices cannot share: each query's own
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[1], axis=1) for x in (k, v))
    rows, model = rows_over(mesh, len(q)), "model" if over > 1 else None
    queries, keys = PartitionSpec(rows, None, model), PartitionSpec(rows, model)
    specs = (queries, keys, keys, PartitionSpec(rows), PartitionSpec(rows))
    run = jax.shard_map(kernel, mesh=mesh, in_specs=specs, out_specs=queries, check_vma=False)
    return run(q, k, v, real, segments)


@functools.partial(jax.jit, static_argnames="interpret")
def splash(
    q: Array, k: Array, v: Array, real: Array, segments: Array | None, *, interpret: bool = False
) -> Array:
    """`flash` on a TPU; `interpret` runs it step by step on any platform, for tests."""
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas

    t, n, h = q.shape[1:]
    q = q * h**-0.5
    if segments is not None:
        q, k = apart(q, k, segments)
    block = LANES * -(-t // (LANES * -(-t // BLOCK)))
    size = block * -(-t // block)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes: Any = {f"block_{name}": block for name in names}
    kernel = pallas.make_splash_mha_single_device(
        pallas.MultiHeadMask([pallas.CausalMask((size, size))] * n),
        block_sizes=pallas.BlockSizes(**sizes),
        interpret=interpret,
    )

    def grown(x: Array) -> Array:
        """[b, heads, t, h] with as many tokens and features as the kernel takes."""
        return jnp.pad(x, ((0, 0), (0, 0), (0, size - t), (0, -x.shape[3] % LANES)))

    told = jnp.pad(real.astype(jnp.int32), ((0, 0), (0, size - t)))  # padding sees padding
    out = jax.vmap(lambda q, k, v, told: kernel(q, k, v, pallas.SegmentIds(told, told)))(
        grown(q.swapaxes(1, 2)), grown(k.swapaxes(2, 3)), grown(v), told
    )
    return out[:, :, :t, :h].swapaxes(1, 2)


def apart(q: Array, k: Array, segments: Array) -> tuple[Array, Array]:
    """Queries [b, t, n, h + 3] and keys [b, g, h + 3, t] whose scores tell segments apart.

    Splash attention knows segments that see themselves alone. Here text, 0, sees and is seen by
    all: a score of i and j, both above 0, is lowered by FAR (i - j)^2 = FAR (i i - 2 i j + j j).
    """
    own = segments.astype(q.dtype)
    ones = (own > 0).astype(q.dtype)
    seer = FAR * jnp.stack([-own * own, 2 * own, -ones], axis=-1)
    seen = jnp.stack([ones, own, own * own], axis=1)
    wide = jnp.broadcast_to(seer[:, :, None], (*q.shape[:3], 3))
    long = jnp.broadcast_to(seen[:, None], (*k.shape[:2], 3, k.shape[3]))
    return jnp.concatenate([q, wide], axis=3), jnp.concatenate([k, long], axis=2)


@functools.partial(jax.jit, static_argnames="implementation")
def cudnn(
    q: Array,
    k: Array,
    v: Array,
    real: Array,
    segments: Array | None,
    *,
    implementation: Literal["xla", "cudnn"] = "cudnn",
) -> Array:
    """`flash` on an NVIDIA GPU; `implementation` is that of `jax.nn.dot_product_attention`.

    It takes padding at the ends of rows only, so real tokens are moved to the front, in their
    order, and back.
    """
    order = jnp.argsort(~real, axis=1, stable=True)
    lengths = real.sum(axis=1, dtype=jnp.int32)
    held = (jnp.arange(real.shape[1]) < lengths[:, None])[..., None, None]

    def front(x: Array) -> Array:
        """[b, t, heads, h], real tokens first; what follows has no gradient."""
        return jnp.where(held, jnp.take_along_axis(x, order[..., None, None], axis=1), 0)

    if segments is not None:
        segments = block(jnp.take_along_axis(segments, order, axis=1))[:, None]
    lengths = jnp.maximum(lengths, 1)  # a row of padding alone reads its first token
    out = jax.nn.dot_product_attention(
        front(q),
        front(k.transpose(0, 3, 1, 2)),
        front(v.transpose(0, 2, 1, 3)),
        mask=segments,
        is_causal=True,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation=implementation,
    )
    back = jnp.argsort(order, axis=1)[..., None, None]
    return jnp.take_along_axis(jnp.where(held, out, 0), back, axis=1)


PRODUCTS = {"fwd": (1, 1), "dq": (2, 1), "dkv": (2, 2), "bwd": (3, 2)}
"""Phase of a kernel -> its products over all pairs of tokens: of keys', of values' features."""


def kernel_flops(jaxpr: Jaxpr | ClosedJaxpr) -> float:
    """Operations of the attention kernels of a traced program on a device: no compiler counts them.

    Args:
        jaxpr: such as `jax.jit(f).trace(...).jaxpr`.
    """
    total = 0.0
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, tokens = eqn.params.get("name", ""), -2
        if eqn.primitive.name.startswith("dot_product_attention"):  # cuDNN's: [b, t, n, h]
            name, tokens = eqn.primitive.name, 1
        elif eqn.primitive.name != "pallas_call":
            name = ""
        if phase := next((each for each in PRODUCTS if f"_{each}_" in name), None):
            inputs: list[Any] = [x.aval for x in eqn.invars]  # arrays all
            q, _, v, *_ = (x.shape for x in inputs if jnp.issubdtype(x.dtype, jnp.floating))
            features = sum(n * x[-1] for n, x in zip(PRODUCTS[phase], (q, v), strict=True))
            total += features * math.prod(q[:-1]) * q[tokens]  # half of all pairs
            continue
        times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        for inner in jax.tree.leaves(tuple(eqn.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                total += times * kernel_flops(inner)
    return total


def _is_jaxpr(x: object) -> bool:
    return hasattr(getattr(x, "jaxpr", x), "eqns")
