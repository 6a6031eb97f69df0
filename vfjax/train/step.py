"""One compiled training step: loss of the answers, gradients of what trains, update."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Wrapped
from jax.typing import DTypeLike

from vfjax.errors import InputError
from vfjax.model import Batch, Model
from vfjax.text.prompts import IGNORE
from vfjax.train.optim import Group, name_of, trains

Array = jax.Array
T = TypeVar("T")
Sums = tuple[Array, Array, nnx.State]
"""A loss, of how many tokens, and its gradients."""
LOGITS = 2**28
"""Logits, of all rows, that are in memory at once."""
CHUNKS = 8
"""Parts of a row that logits are computed of, where each still has `ROWS` positions in all rows."""
ROWS = 256
"""Positions that reading the head's weights once is worth."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What changes from step to step.

    Attributes:
        step: int32[], updates so far.
        params: float32 masters of what trains.
        opt: the optimiser's state, sharded as the parameters.
    """

    step: Array
    params: nnx.State
    opt: optax.OptState


def split(model: Model, groups: Sequence[Group]) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """A model as structure, what trains (float32) and what is frozen (as it is).

    The model must not be used any more: its arrays are deleted, or given to the step.

    Raises:
        InputError: a group that matches no parameter of its own.
    """
    parts: Any = nnx.split(model, lambda path, _: trains(groups, name_of(path)), ...)
    graph, params, frozen = parts
    check_groups(groups, [name_of(path) for path, _ in nnx.to_flat_state(params)])
    masters = cast(params, jnp.float32)
    for old, new in zip(jax.tree.leaves(params), jax.tree.leaves(masters), strict=True):
        if isinstance(old, jax.Array) and old.dtype != new.dtype:
            old.delete()  # whoever still holds the model
    return graph, masters, frozen


def check_groups(groups: Sequence[Group], names: Sequence[str], where: str = "train") -> None:
    """Passes if each group has a parameter that no earlier one has.

    Args:
        groups: in their order.
        names: of the model's parameters.
        where: of the groups, for the message.

    Raises:
        InputError: one has none, or its pattern is no regular expression.
    """
    for i, group in enumerate(groups):
        try:
            found = any(trains([group], n) and not trains(groups[:i], n) for n in names)
        except re.error as error:
            raise InputError(
                f"{where}[{i}].pattern",
                found=f"{group.pattern!r} ({error})",
                expected="a regular expression",
                fix="correct it",
            ) from None
        if not found:
            raise InputError(
                f"{where}[{i}].pattern",
                found=f"{group.pattern!r}, which names no parameter that is left to it",
                expected="names such as branches/clip/connector/projector/layers/0/kernel",
                fix="correct it, or remove the group",
            )


def cast(tree: T, dtype: DTypeLike) -> T:
    """Floating arrays, or shapes of arrays, in `dtype`."""

    def one(x: Array | jax.ShapeDtypeStruct) -> Array | jax.ShapeDtypeStruct:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)
        return x.astype(dtype)

    return jax.tree.map(one, tree)


def init(params: nnx.State, tx: optax.GradientTransformation, mesh: Mesh | None) -> State:
    """The state before the first step; the optimiser's lies where its parameters lie."""
    state = State(jnp.zeros((), jnp.int32), params, tx.init(params))  # jit would replicate it
    return state if mesh is None else jax.device_put(state, shardings(state, mesh))


def shardings(state: State, mesh: Mesh) -> State:
    """Where each array of the state lies: as it does; scalars on all devices."""
    everywhere = NamedSharding(mesh, PartitionSpec())

    def of(x: Array) -> NamedSharding:
        at = getattr(x, "sharding", None)
        return at if isinstance(at, NamedSharding) and at.mesh == mesh else everywhere

    return jax.tree.map(of, state)


def answer_loss(model: Model, batch: Batch) -> tuple[Array, Array]:
    """Summed cross-entropy of the labelled tokens, float32[], and their number, float32[].

    Position i predicts label i + 1, as in transformers' LlamaForCausalLM. Logits are computed a
    chunk at a time and again in the backward pass, so that [b, t, vocab] never exists. Positions
    with a label come first in their row, and a chunk without any is skipped: pictures, questions
    and padding cost no logits.

    Args:
        model: any.
        batch: with labels, int32[b, t], -100 where nothing is learnt.
    """
    hidden, mask, _ = model.read(batch)
    t = mask.shape[1] - 1
    # What predicts a token is the last one that was read before it: a connector may leave some out.
    last = jax.lax.cummax(jnp.where(mask, jnp.arange(t + 1), 0), axis=1)[:, :-1]
    labels = jnp.asarray(batch.labels)[:, 1:]
    order = jnp.argsort(labels == IGNORE, axis=1, stable=True)
    last, labels = (jnp.take_along_axis(x, order, axis=1) for x in (last, labels))
    hidden = jnp.take_along_axis(hidden, last[..., None], axis=1)
    b, vocab = len(labels), model.config.llm.vocab
    size = max(-(-t // CHUNKS), -(-ROWS // b))
    size = max(1, min(t, size, LOGITS // (b * vocab)))
    rest = -t % size
    hidden = jnp.pad(hidden, ((0, 0), (0, rest), (0, 0)))
    labels = jnp.pad(labels, ((0, 0), (0, rest)), constant_values=IGNORE)

    def summed(x: Array, y: Array) -> Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(
            model.llm.logits(x), jnp.maximum(y, 0)
        )
        return jnp.where(y == IGNORE, 0.0, losses).sum()

    @jax.checkpoint
    def add(total: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
        some = (part[1] != IGNORE).any()
        return total + jax.lax.cond(some, summed, lambda *_: jnp.zeros(()), *part), None

    def chunks(x: Array) -> Array:
        """Along the sequence: rows stay where the mesh has them."""
        return x.reshape(b, -1, size, *x.shape[2:]).swapaxes(0, 1)

    total, _ = jax.lax.scan(add, jnp.zeros(()), (chunks(hidden), chunks(labels)))
    return total, (labels != IGNORE).sum().astype(jnp.float32)


def noisy(batch: Batch, key: Array | None) -> Batch:
    """A batch with a key of random numbers beside each branch's pictures, for connectors that add
    noise in training (SliME's); without a key, as it is.
    """
    if key is None:
        return batch
    images = {
        name: dataclasses.replace(batch.images[name], key=jax.random.fold_in(key, i))
        for i, name in enumerate(sorted(batch.images))
    }
    return dataclasses.replace(batch, images=images)


def gradients(
    graph: nnx.GraphDef,
    params: nnx.State,
    frozen: nnx.State,
    batches: Batch,
    dtype: DTypeLike,
    key: Array | None = None,
) -> tuple[Array, nnx.State]:
    """Mean loss of all labelled tokens, and its gradients in float32.

    Args:
        graph: the model's structure.
        params: float32 masters; computed with in `dtype`.
        frozen: the rest, in any dtype; computed with in `dtype` too.
        batches: every array with a leading axis of accumulated parts, one after another; each
            token counts the same, whatever part it is in.
        dtype: of the computation.
        key: of the noise that connectors add in training; None: they add none.
    """

    def loss(params: nnx.State, batch: Batch, part: Array | int) -> tuple[Array, Array]:
        model = nnx.merge(graph, cast(params, dtype), cast(frozen, dtype))
        return answer_loss(
            model, noisy(batch, None if key is None else jax.random.fold_in(key, part))
        )

    grad = jax.value_and_grad(loss, has_aux=True)

    def add(sums: Sums, each: tuple[Batch, Array]) -> tuple[Sums, None]:
        (total, count), found = grad(params, *each)
        return jax.tree.map(jnp.add, sums, (total, count, found)), None

    parts = len(batches.tokens)
    if parts == 1:
        (total, count), grads = grad(params, jax.tree.map(lambda x: x[0], batches), 0)
    else:
        zeros = (jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        (total, count, grads), _ = jax.lax.scan(add, zeros, (batches, jnp.arange(parts)))
    count = jnp.maximum(count, 1.0)
    return total / count, jax.tree.map(lambda g: g / count, grads)


def make_step(
    graph: nnx.GraphDef,
    tx: optax.GradientTransformation,
    state: State,
    *,
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    seed: int | None = None,
) -> Wrapped:
    """The compiled step: (state, frozen, batches) -> (state, metrics).

    Args:
        graph: of `split`.
        tx: of `Optim.build`.
        state: whose shardings the new one gets; given to the step, which may overwrite it.
        dtype: of the computation.
        mesh: that everything lies on.
        seed: of the noise that connectors add, another in each step; None: they add none.

    Returns:
        A jitted function. Metrics are float32[]: "loss", the mean of all labelled tokens;
        "grad_norm", before clipping; "answers", labelled tokens; "tokens" read.
    """

    def step(state: State, frozen: nnx.State, batches: Batch) -> tuple[State, dict[str, Array]]:
        key = None if seed is None else jax.random.fold_in(jax.random.key(seed), state.step)
        loss, grads = gradients(graph, state.params, frozen, batches, dtype, key)
        updates, opt = tx.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "answers": (jnp.asarray(batches.labels)[..., 1:] != IGNORE).sum().astype(jnp.float32),
            "tokens": batches.mask.sum().astype(jnp.float32),
        }
        return State(state.step + 1, params, opt), metrics

    if mesh is None:
        return jax.jit(step, donate_argnums=0)
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings(state, mesh), everywhere))
