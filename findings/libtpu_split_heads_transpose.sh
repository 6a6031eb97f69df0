#!/usr/bin/env bash
# libtpu 0.0.42.1 with jax 0.10.2: in a step of decoding, (x @ kernel).reshape(rows, 1, heads, size)
# makes XLA for TPUs transpose the kernel, in memory, at every step: it takes the reshape into the
# product, whose kernel then has three axes and another layout. One would expect a reshape of a few
# rows to cost nothing, and the kernel to be read once. Mend: jax.lax.optimization_barrier on the
# product where a row has one token. Compiled for a v5p, without a TPU.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 'ml_dtypes!=0.7.0'
"$work/env/bin/pip" install --quiet --no-deps libtpu==0.0.42.1
cat > "$work/seen.py" <<'PY'
import re
from importlib.metadata import version

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

print("jax", jax.__version__, "libtpu", version("libtpu"))
topology = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1")
at = SingleDeviceSharding(topology.devices[0])
rows, heads, size, width, slots = 8, 8, 128, 1024, 16


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.bfloat16, sharding=at)


def scores(product, turn, keys):
    queries = product.reshape(rows, 1, heads, size) * turn
    return jnp.einsum("btnh,bnhs->bnts", queries, keys)


def plain(x, kernel, turn, keys):
    return scores(x @ kernel, turn, keys)


def apart(x, kernel, turn, keys):
    return scores(jax.lax.optimization_barrier(x @ kernel), turn, keys)


def copies(step):
    """Instructions of the compiled step that write as many values as the kernel has."""
    given = shape(rows, 1, width), shape(width, heads * size)
    given += shape(rows, 1, 1, size), shape(rows, heads, size, slots)
    text = jax.jit(step).lower(*given).compile().as_text()
    entry = text[text.index("\nENTRY") :]
    return re.findall(rf"%?([\w.]+ = bf16\[{width},{heads * size}\])\S* copy\(", entry)


found = {step.__name__: copies(step) for step in (plain, apart)}
for name, copied in found.items():
    print(f"{name}: {copied or 'the kernel is read where it lies'}")
assert len(found["plain"]) == 1 and not found["apart"], "the behaviour changed"
PY
JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 "$work/env/bin/python" "$work/seen.py" 2> "$work/log" || {
    tail -3 "$work/log"
    exit 1
}
