"""Text generation: one compiled prefill, one compiled decode loop."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from vfjax.errors import InputError
from vfjax.model import AnyArray, Batch
from vfjax.sharding import mesh_of, place

if TYPE_CHECKING:
    from vfjax.modes import MemberProcessors
    from vfjax.processor import Processor

Array = jax.Array
Batches = Batch | tuple[Batch, ...]
"""What a model reads: one batch, or one a member."""


class Generator(Protocol):
    """What generates: a `Model`, or one of `vfjax.modes`; a pytree."""

    @property
    def context(self) -> int:
        """Tokens that it was made for."""

    def prefill(self, batch: Any, size: int) -> tuple[Array, Any]:
        """Reads a batch: logits float32[b, vocab] after it, and a cache of `size` slots."""

    def next(self, tokens: Array, cache: Any) -> tuple[Array, Any]:
        """Reads int32[b] tokens: logits float32[b, vocab] after them, and the cache."""


def generate(
    model: Generator,
    processor: "Processor | MemberProcessors",
    batch: Batches,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> list[str]:
    """One text a row, cut at the tokenizer's and the template's stops.

    Args:
        model: any model of `converters.load` or `converters.load_fused`.
        processor: the one that made `batch`.
        batch: b rows; a row may be shorter than another.
        max_new_tokens: tokens to write at most.
        temperature: 0 takes the likeliest token; above, samples.
        top_k: sample among the k likeliest only.
        top_p: sample among the likeliest whose probabilities sum to p.
        seed: of the sampling.

    Raises:
        InputError: the batch and the new tokens don't fit the context, or a sampling parameter is
            out of range.
    """
    ids = generate_ids(
        model,
        batch,
        max_new_tokens=max_new_tokens,
        stop=processor.stop_ids,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    return [processor.decode(row) for row in ids]


def generate_ids(
    model: Generator,
    batch: Batches,
    *,
    max_new_tokens: int = 64,
    stop: Sequence[int] = (),
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> list[list[int]]:
    """New token ids of each row, without the stop id that ended it; see `generate`."""
    batches = batch if isinstance(batch, tuple) else (batch,)
    _check(model, batches, max_new_tokens, temperature, top_k, top_p)
    steps = _round_up(max_new_tokens, 64)
    slots = max(each.tokens.shape[1] for each in batches)
    logits, cache = _prefill(model, place(batch, mesh_of(model)), size=slots + steps)
    out, count, _ = _decode(
        model,
        cache,
        logits,
        jnp.asarray(stop, jnp.int32),
        jnp.int32(max_new_tokens),
        jax.random.key(seed),
        jnp.float32(temperature or 1.0),
        jnp.float32(1.0 if top_p is None else top_p),
        steps=steps,
        greedy=temperature == 0,
        top_k=top_k,
    )
    return [row[:n].tolist() for row, n in zip(_fetch(out), _fetch(count), strict=True)]


def _check(
    model: Generator,
    batches: Sequence[Batch],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    def require(ok: bool, where: str, found: object, expected: str) -> None:
        if not ok:
            raise InputError(where, found=found, expected=expected, fix="change the argument")

    context = model.context
    longest = max(int(_fetch(batch.mask).sum(axis=1).max()) for batch in batches)
    require(max_new_tokens > 0, "max_new_tokens", max_new_tokens, "at least 1")
    require(
        longest + max_new_tokens <= context,
        "max_new_tokens",
        f"{longest} tokens in the longest row and {max_new_tokens} new ones",
        f"at most {context}, the LLM's context",
    )
    require(temperature >= 0, "temperature", temperature, "0 or more")
    require(top_k is None or top_k >= 1, "top_k", top_k, "None or at least 1")
    require(top_p is None or 0 < top_p <= 1, "top_p", top_p, "None or within (0, 1]")


@functools.partial(jax.jit, static_argnames="size")
def _prefill(model: Generator, batch: Batches, *, size: int) -> tuple[Array, Any]:
    return model.prefill(batch, size)


@functools.partial(jax.jit, static_argnames=("steps", "greedy", "top_k"), donate_argnames="cache")
def _decode(
    model: Generator,
    cache: Any,
    logits: Array,
    stop: Array,
    limit: Array,
    key: Array,
    temperature: Array,
    top_p: Array,
    *,
    steps: int,
    greedy: bool,
    top_k: int | None,
) -> tuple[Array, Array, Any]:
    """Decodes until every row has stopped or `limit` tokens are written.

    Returns:
        int32[b, steps] new ids; int32[b], how many of them belong to the row; the cache, which
        takes over the donated buffers.
    """
    b = logits.shape[0]

    def pick(i: Array, logits: Array) -> Array:
        if greedy:
            return logits.argmax(axis=-1).astype(jnp.int32)
        return sample(jax.random.fold_in(key, i), logits, temperature, top_k, top_p)

    def stops(token: Array) -> Array:
        return (token[:, None] == stop[None]).any(axis=1)

    def running(state: tuple) -> Array:
        i, _, done, *_ = state
        return (i < limit) & ~done.all()

    def step(state: tuple) -> tuple:
        i, token, done, count, out, cache = state
        logits, cache = model.next(token, cache)
        token = pick(i, logits)
        done = done | stops(token)
        return i + 1, token, done, count + ~done, out.at[:, i].set(token), cache

    token = pick(jnp.int32(0), logits)
    done = stops(token)
    out = jnp.zeros((b, steps), jnp.int32).at[:, 0].set(token)
    state = (jnp.int32(1), token, done, (~done).astype(jnp.int32), out, cache)
    _, _, _, count, out, cache = jax.lax.while_loop(running, step, state)
    return out, count, cache


def sample(key: Array, logits: Array, temperature: Array, top_k: int | None, top_p: Array) -> Array:
    """One token a row from float32[b, v] logits: temperature, then top-k, then top-p.

    Row i draws with its own key, so a row's draw does not depend on the other rows. The likeliest
    token always stays (nucleus sampling, arXiv 1904.09751).
    """
    logits = logits / temperature
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    if top_k is not None:
        ranked = jnp.where(jnp.arange(ranked.shape[-1]) < top_k, ranked, -jnp.inf)
    p = jax.nn.softmax(ranked, axis=-1)
    ranked = jnp.where(jnp.cumsum(p, axis=-1) - p < top_p, ranked, -jnp.inf)
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(len(logits)))
    drawn = jax.vmap(jax.random.categorical)(keys, ranked)
    return jnp.take_along_axis(order, drawn[:, None], axis=-1)[:, 0].astype(jnp.int32)


def _fetch(x: AnyArray) -> np.ndarray:
    """A global array on every host."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
