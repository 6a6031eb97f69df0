#!/usr/bin/env bash
# optax 0.2.8: the second moment of optax.adam on bfloat16 parameters stops growing at half its value.
# Each step adds 0.001 (g^2 - v); from v = 0.5 on that is less than half a bfloat16 step, so it is
# rounded away and updates are 1.4 times too large for ever. `mu_dtype` is about the first moment
# alone. Mend: float32 master weights.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet jax==0.10.2 optax==0.2.8
JAX_PLATFORMS=cpu "$work/env/bin/python" - <<'PY'
import jax
import jax.numpy as jnp
import optax

print("jax", jax.__version__, "optax", optax.__version__)
for dtype, low, high in ((jnp.bfloat16, 0.45, 0.55), (jnp.float32, 0.9999, 1.0)):
    for mu_dtype in (None, jnp.float32):
        adam = optax.adam(1e-3, mu_dtype=mu_dtype)
        state, gradient = adam.init(jnp.ones(1, dtype)), jnp.ones(1, dtype)
        step = jax.jit(lambda s: adam.update(gradient, s)[1])
        for _ in range(10_000):
            state = step(state)
        found = float(state[0].nu[0])
        print(f"{dtype.__name__}, mu_dtype {mu_dtype}: v = {found:.4f} after 10,000 gradients of 1")
        assert low <= found <= high, "the behaviour changed"
PY
