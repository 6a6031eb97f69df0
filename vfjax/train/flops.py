"""Floating-point operations of a training step, and what a device can do."""

import math
from collections.abc import Mapping

import jax
from flax import nnx

PEAK: Mapping[str, float] = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 2307e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}
"""Dense bfloat16 operations a second of a chip, by the start of its `device_kind`; vendors' data
sheets."""


def peak() -> float | None:
    """Operations a second of all devices together, None for a kind that is not in `PEAK`."""
    kind = jax.devices()[0].device_kind
    names = [name for name in PEAK if kind.startswith(name)]
    return PEAK[max(names, key=len)] * jax.device_count() if names else None


def step_flops(
    params: nnx.State, frozen: nnx.State, tokens: int, views: Mapping[str, int]
) -> float:
    """What a step must compute, without rematerialisation, for model FLOPs utilisation.

    Two operations a weight and position forward, two for the gradient of its input, two for that
    of the weight; attention's products are left out, as in PaLM's 6N (arXiv 2204.02311, appendix
    B). An encoder of which nothing trains has no backward pass.

    Args:
        params: what trains.
        frozen: what does not.
        tokens: positions that the LLM reads, padding included.
        views: branch -> positions of its encoders' hidden states.
    """
    total = 0.0
    trained = _matrices(params)
    for name, size in {**_matrices(frozen), **trained}.items():
        part, branch = name.split("/")[0], name.split("/")[1]
        encoder = part == "branches" and name.split("/")[2] in ("encoder", "aux")
        backward = not encoder or any(t.startswith("/".join(name.split("/")[:3])) for t in trained)
        passes = 2 + 2 * backward + 2 * (name in trained)
        total += passes * size * (views[branch] if part == "branches" else tokens)
    return total


def _matrices(state: nnx.State) -> dict[str, int]:
    """Sizes of the matrices that are multiplied with, by name."""
    return {
        "/".join(map(str, path)): math.prod(value.shape)
        for path, value in nnx.to_flat_state(state)
        if value.ndim > 1 and path[-1] in ("kernel", "a", "b")
    }
