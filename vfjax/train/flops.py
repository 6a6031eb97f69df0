"""Floating-point operations of a training step, and what a device can do."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from vfjax.model import Batch, Model
from vfjax.nn.flash import kernel_flops
from vfjax.train.optim import named

PEAK: Mapping[str, float] = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 1153.5e12,  # a chip is two devices
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}
"""Dense bfloat16 operations a second of a device, by the start of its `device_kind`; vendors' data
sheets."""


def peak() -> float | None:
    """Operations a second of all devices together, None for a kind that is not in `PEAK`."""
    kind = jax.devices()[0].device_kind
    names = [name for name in PEAK if kind.startswith(name)]
    return PEAK[max(names, key=len)] * jax.device_count() if names else None


def step_flops(graph: nnx.GraphDef, params: nnx.State, frozen: nnx.State, batches: Batch) -> float:
    """What a step computes without rematerialisation, for model FLOPs utilisation.

    The head counts for all positions, as is usual, though the loss leaves out those without a
    label.

    XLA counts the forward passes of the encoders, E, and of the LLM, L, attention included (all of
    its square, masked or not). A backward pass is as much for the gradients of the inputs and, of
    the share of the matrices that trains, as much for theirs; an encoder of which nothing trains
    has none. Nothing is compiled or run.

    Args:
        graph: of `split`.
        params: what trains; arrays or shapes.
        frozen: the rest.
        batches: a step's, every array with a leading axis of parts.
    """
    parts = len(batches.tokens)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batches)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, frozen))
    model = nnx.merge(graph, *shapes)
    eyes = _forward(Model.memories, model, batch.images) if batch.images else 0.0
    whole = _forward(Model.__call__, model, batch)
    trained, total = _matrices(params, "llm/"), _matrices(shapes, "llm/")
    towers = {
        ("branches", branch.name, encoder)
        for branch in model.config.branches
        for encoder in branch.architecture.encoders
    }
    tuned = any(tuple(name.split("/")[:3]) in towers for name in named(params))
    return parts * (eyes * (3 if tuned else 1) + (whole - eyes) * (2 + trained / total))


def _forward(function: Callable[..., Any], *args: object) -> float:
    traced = jax.jit(function).trace(*args)
    cost = traced.lower().cost_analysis()
    # XLA does not look into attention's kernels, which leave out half of the square.
    return float((cost or {}).get("flops", math.nan)) + 2 * kernel_flops(traced.jaxpr)


def _matrices(tree: object, start: str) -> int:
    """Values of the matrices of a part."""
    return sum(x.size for name, x in named(tree).items() if start in name and x.ndim > 1)
