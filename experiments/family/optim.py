"""The training loop that the base and the encoders share."""

import time
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import optax
import optax.contrib

Params = TypeVar("Params")
Data = TypeVar("Data")
Carry = tuple[Params, optax.OptState]


def fit(
    params: Params,
    loss: Callable[..., jax.Array],
    batches: Callable[[int, int], Data],
    *,
    steps: int,
    rate: float,
    every: int,
    report: Callable[[str], object],
) -> Params:
    """Trains with Muon (block kernels) and AdamW at half its rate (all else).

    The rate rises over 30 steps, holds, and falls linearly over the last 60 %. `every` steps are
    one compiled scan, since at this size a call from Python costs as much as a step.

    Args:
        params: pytree of float32 arrays.
        loss: (params, batch) -> float32[].
        batches: (first step, count) -> the batches of so many steps, stacked; called each `every`.
        steps: a multiple of `every`.
        rate: Muon's, of updates as large as AdamW's (arXiv 2502.16982).
        every: steps between reports.
        report: called with a line of text.

    Returns:
        The trained params.
    """
    fall = optax.linear_schedule(1.0, 0.0, int(0.6 * steps), int(0.4 * steps))

    def schedule(peak: float) -> optax.Schedule:
        return lambda step: peak * fall(step) * jnp.minimum(1.0, (step + 1) / 30)

    tx = optax.contrib.muon(
        schedule(rate),
        adam_learning_rate=schedule(rate / 2),
        adam_b2=0.98,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=_matrices,
    )

    @jax.jit
    def run(carry: Carry[Params], data: Data) -> tuple[Carry[Params], jax.Array]:
        return jax.lax.scan(step, carry, data)

    def step(carry: Carry[Params], batch: Data) -> tuple[Carry[Params], jax.Array]:
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    carry = params, tx.init(params)
    start = time.perf_counter()
    for i in range(0, steps, every):
        carry, losses = run(carry, batches(i, every))
        seconds = time.perf_counter() - start
        report(f"step {i + every}, loss {losses.mean():.3f}, {seconds:.0f} s")
    return carry[0]


def _matrices(params: optax.Params) -> optax.Params:
    """Which parameters Muon trains: the kernels of blocks' dense layers."""
    dims = optax.contrib.MuonDimensionNumbers(0, 1)

    def pick(
        path: jax.tree_util.KeyPath, x: jax.Array
    ) -> optax.contrib.MuonDimensionNumbers | None:
        name = jax.tree_util.keystr(path)
        return dims if "blocks" in name and "kernel" in name else None

    return jax.tree.map_with_path(pick, params)
