#!/usr/bin/env bash
# libtpu 0.0.42.1 with jax 0.10.2: of a program compiled for TPUs, cost_analysis()["bytes accessed"]
# counts a weight that XLA prefetches from HBM to VMEM (copy-start, copy-done) five times: what the
# copy reads and writes, and what reads it. One product of a 34 MB kernel "accesses" 168 MB, and
# "optimal_seconds", which is those bytes by the bandwidth, is six times what the kernel once takes.
# Steps of decoding, which are all such products, look two to three times as slow as they can be.
# Mend: count parameters once, by shapes. Compiled for a v5p, without a TPU.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 'ml_dtypes!=0.7.0'
"$work/env/bin/pip" install --quiet --no-deps libtpu==0.0.42.1
cat > "$work/seen.py" <<'PY'
from importlib.metadata import version

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

print("jax", jax.__version__, "libtpu", version("libtpu"))
topology = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1")
at = SingleDeviceSharding(topology.devices[0])
width, rows, bandwidth = 4096, 8, 2765e9  # bytes a second, by the data sheet


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.bfloat16, sharding=at)


def chain(x, kernels):
    for kernel in kernels:
        x = jax.nn.relu(x @ kernel)
    return x


for count in (1, 4, 16):
    compiled = jax.jit(chain).lower(shape(rows, width), [shape(width, width)] * count).compile()
    cost, text = compiled.cost_analysis(), compiled.as_text()
    needed = count * width * width * 2
    ratio = cost["bytes accessed"] / needed
    prefetched = text.count(" copy-start(")
    print(
        f"{count} kernels of {width} x {width}, {needed / 1e6:.0f} MB: {prefetched} prefetched,",
        f"{cost['bytes accessed'] / 1e6:.0f} MB accessed ({ratio:.1f} times),",
        f"{1e6 * cost['optimal_seconds']:.0f} us at best; {1e6 * needed / bandwidth:.0f} us by the data sheet",
    )
    expected = 1 + 4 * prefetched / count
    assert prefetched and abs(ratio - expected) < 0.1, "the behaviour changed"
PY
JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 "$work/env/bin/python" "$work/seen.py" 2> "$work/log" || {
    tail -3 "$work/log"
    exit 1
}
