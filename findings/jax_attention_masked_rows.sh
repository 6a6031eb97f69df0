#!/usr/bin/env bash
# jax 0.10.2: a query that may see no key gets the mean of ALL values from
# jax.nn.dot_product_attention where `mask` says so, and NaN where `bias` says the same by -inf; and
# `is_causal` with fewer queries than keys lets the first query see the first key only, as if the
# queries stood at the start (a decoding step with a cache stands at the end). No error, no warning.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet jax==0.10.2
JAX_PLATFORMS=cpu "$work/env/bin/python" - <<'PY'
import jax
import jax.numpy as jnp

print("jax", jax.__version__)
attention = jax.nn.dot_product_attention
ones, values = jnp.ones((1, 2, 1, 4)), jnp.arange(8.0).reshape(1, 2, 1, 4)
nothing = jnp.zeros((1, 1, 2, 2), bool)
by_mask = attention(ones, ones, values, mask=nothing)[0, 0, 0]
by_bias = attention(ones, ones, values, bias=jnp.where(nothing, 0, -jnp.inf))[0, 0, 0]
last = attention(ones[:, :1], ones, values, is_causal=True)[0, 0, 0]
print("no key by mask:", by_mask, "by bias:", by_bias, "| one causal query of two keys:", last)
assert jnp.array_equal(by_mask, values[0].mean(0)[0]), "the behaviour changed"
assert jnp.isnan(by_bias).all(), "the behaviour changed"
assert jnp.array_equal(last, values[0, 0, 0]), "the behaviour changed"
PY
