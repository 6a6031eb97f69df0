"""Text generation: one compiled prefill, one compiled decode loop, run at once or in pieces."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.tree_util import PyTreeDef

from vfjax.errors import InputError, require
from vfjax.model import AnyArray, Batch
from vfjax.processes import agreeing, digest, owners
from vfjax.sampling import GREEDY, Rows, Sampling, by_row, log_probabilities, pick
from vfjax.settings import NONE, Settings
from vfjax.sharding import mesh_of, place

if TYPE_CHECKING:
    from vfjax.fusion.modes import MemberProcessors
    from vfjax.processor import Processor

Array = jax.Array
Batches = Batch | tuple[Batch, ...]
"""What a model reads: one batch, or one a member."""


B = TypeVar("B", bound=Batches, contravariant=True)
C = TypeVar("C")


class Generator(Protocol[B, C]):
    """What generates: a `Model`, or one of `vfjax.fusion.modes`; a pytree.

    B is what it reads, C its cache.
    """

    @property
    def context(self) -> int:
        """Tokens that it was made for."""

    def prefill(self, batch: B, size: int) -> tuple[Array, C]:
        """Reads a batch: logits float32[b, vocab] after it, and a cache of `size` slots."""

    def next(self, tokens: Array, cache: C) -> tuple[Array, C]:
        """Reads int32[b] tokens: logits float32[b, vocab] after them, and the cache."""


def generate(
    model: Generator,
    processor: "Processor | MemberProcessors",
    batch: Batches,
    *,
    max_new_tokens: int | Sequence[int] = 64,
    sampling: Sampling = GREEDY,
) -> list[str]:
    """One text a row, cut at the tokenizer's and the template's stops.

    Args:
        model: any model of `converters.load` or `converters.load_fused`.
        processor: the one that made `batch`.
        batch: b rows; a row may be shorter than another.
        max_new_tokens: tokens to write at most; one number, or one a row.
        sampling: how they are chosen; by default the likeliest.

    Raises:
        InputError: the batch and the new tokens don't fit the context, a sampling parameter is out
            of range, the prompt's logits are NaN, or generation_config.json has a setting that
            would change the answers and is not supported.
    """
    ids = generate_ids(
        model,
        batch,
        max_new_tokens=max_new_tokens,
        stop=processor.stops,
        sampling=sampling,
        settings=processor.settings,
    )
    return [processor.decode(row) for row in ids]


def generate_ids(
    model: Generator,
    batch: Batches,
    *,
    max_new_tokens: int | Sequence[int] = 64,
    stop: Sequence[int] = (),
    sampling: Sampling = GREEDY,
    settings: Settings = NONE,
) -> list[list[int]]:
    """New token ids of each row, without the stop id that ended it; see `generate`.

    `stop`: ids that end a row; `settings`: of the model's folder.
    """
    rows = rows_of(model, batch, max_new_tokens, stop, sampling, settings)
    (state,) = _pieces(model, batch, rows, None, None)
    return [row[:n].tolist() for row, n in zip(_fetch(state.out), _fetch(state.count), strict=True)]


class Logs(NamedTuple):
    """Log-probabilities of a row's n new tokens; see `vfjax.sampling.log_probabilities`.

    Attributes:
        chosen: float32[n].
        top: float32[n, k], the likeliest first.
        ids: int32[n, k], their tokens.
    """

    chosen: np.ndarray
    top: np.ndarray
    ids: np.ndarray


class Written(NamedTuple):
    """What is new of b rows.

    Attributes:
        ids: token ids of each.
        ended: whether it has.
        logs: their log-probabilities, if they were asked for.
    """

    ids: list[list[int]]
    ended: list[bool]
    logs: list[Logs] | None


class Guide(Protocol):
    """Says which tokens a row may take, one after another."""

    def allowed(self, vocab: int) -> np.ndarray:
        """bool[vocab], the ids that may come next; at least one."""

    def take(self, token: int) -> None:
        """The next one, which has been chosen; a stop is not told."""


def stream_ids(
    model: Generator,
    batch: Batches,
    *,
    every: int = 8,
    max_new_tokens: int | Sequence[int] = 64,
    room: int | None = None,
    stop: Sequence[int] = (),
    sampling: Sampling = GREEDY,
    settings: Settings = NONE,
    logprobs: int | None = None,
    guides: Sequence[Guide | None] = (),
) -> Iterator[Written]:
    """What is new of each row, as it is written.

    Joined, the ids are those of `generate_ids`, by the same compiled programs. Closing the iterator
    ends the work.

    Args:
        model: a model, or members side by side.
        batch: of the model's processor.
        every: tokens from one time to the next.
        max_new_tokens: for all rows, or one number a row.
        room: slots for new tokens, at least `max_new_tokens`; None: these, rounded up to 64.
        stop: ids that end a row.
        sampling: how tokens are chosen.
        settings: of generation, by the model's folder.
        logprobs: how many of the likeliest tokens' log-probabilities are told beside the chosen
            one's; None: no log-probabilities.
        guides: one a row, None for one that is free; with any, `every` is 1.

    Raises:
        InputError: what `generate_ids` raises, at the call; or `every` or `room` is too small.
    """
    require(every >= 1, "every", every, "at least 1")
    asked = rows_of(model, batch, max_new_tokens, stop, sampling, settings, logprobs)
    limit = np.asarray(asked.limit)
    require(room is None or room >= limit.max(), "room", room, f"at least {limit.max()}")
    require(
        len(guides) in (0, len(limit)), "guides", len(guides), f"none, or {len(limit)}, one a row"
    )

    def pieces() -> Iterator[Written]:
        seen = np.zeros_like(limit)
        for state in _pieces(model, batch, asked, every, room, guides):
            out, count, done = (_fetch(x) for x in (state.out, state.count, state.done))
            rows = list(zip(range(len(out)), seen, count, strict=True))
            ended = done | (int(_fetch(state.i)) >= limit)
            logs = None
            if state.logs is not None:
                arrays = [_fetch(x) for x in state.logs]
                logs = [Logs(*(x[i, first:last] for x in arrays)) for i, first, last in rows]
            ids = [out[i, first:last].tolist() for i, first, last in rows]
            yield Written(ids, ended.tolist(), logs)
            seen = count

    return pieces()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What is written so far, beside the cache.

    Attributes:
        i: int32[] tokens picked for each row.
        token: int32[b] the last ones.
        done: bool[b], where a stop was met.
        count: int32[b] tokens that belong to a row.
        out: int32[b, steps] all tokens; undefined from a row's count on.
        seen: bool[b, vocab], the tokens that a row has; [b, 0] where none is penalised.
        logs: of all tokens, as in `Logs`: float32[b, steps], float32[b, steps, k] and
            int32[b, steps, k]; None where they are not asked for.
    """

    i: Array
    token: Array
    done: Array
    count: Array
    out: Array
    seen: Array
    logs: tuple[Array, Array, Array] | None


def _agree(model: Generator, batch: Batches, same: dict[str, object]) -> None:
    """Raises InputError if the processes of the model's mesh have other batches or arguments."""
    if jax.process_count() == 1:
        return
    with agreeing("generate", owners(mesh_of(model))) as facts:
        batches = batch if isinstance(batch, tuple) else (batch,)
        facts["prompt's ids"] = digest(*(each.tokens for each in batches))
        facts["places of pictures"] = digest(*(each.visual for each in batches))
        facts["pictures"] = digest(*jax.tree.leaves([each.images for each in batches]))
        facts |= {key: str(value) for key, value in same.items()}


def rows_of(
    model: Generator,
    batch: Batches,
    max_new_tokens: int | Sequence[int],
    stop: Sequence[int],
    sampling: Sampling,
    settings: Settings,
    logprobs: int | None = None,
) -> Rows:
    """The arguments of `stream_ids`, checked, one value a row."""
    same = {"max_new_tokens": max_new_tokens, "stop": stop, "logprobs": logprobs}
    _agree(model, batch, {**same, **vars(sampling), **vars(settings)})
    settings.check()
    batches = batch if isinstance(batch, tuple) else (batch,)
    lengths = np.max([_fetch(each.mask).sum(axis=1) for each in batches], axis=0)
    limit = by_row("max_new_tokens", max_new_tokens, len(lengths))
    for value in limit:
        require(value > 0, "max_new_tokens", value, "at least 1")
    row = int((lengths + limit).argmax())
    require(
        lengths[row] + limit[row] <= model.context,
        "max_new_tokens",
        f"{lengths[row]} tokens in the longest row and {limit[row]} new ones",
        f"at most {model.context}, the LLM's context",
    )
    limits = np.asarray(limit, np.int32)
    return sampling.rows(limits, stop=stop, settings=settings, logprobs=logprobs)


def _pieces(
    model: Generator,
    batch: Batches,
    rows: Rows,
    every: int | None,
    room: int | None,
    guides: Sequence[Guide | None] = (),
) -> Iterator[State]:
    """The state after each `every` tokens, until every row has ended; None: at the end alone."""
    guided = any(guide is not None for guide in guides)
    every = 1 if guided else every
    batches = batch if isinstance(batch, tuple) else (batch,)
    most = int(np.max(rows.limit))
    steps = _round_up(most, 64) if room is None else room
    slots = max(each.read for each in batches)
    leaves, tree = jax.tree.flatten(model)  # once: some 20 microseconds an array
    logits, cache = prefill(leaves, tree, place(batch, mesh_of(leaves)), size=slots + steps)
    vocab = logits.shape[-1]
    if guided:
        rows = dataclasses.replace(
            rows, allowed=_allowed(guides, np.zeros(len(logits), bool), vocab)
        )
    state = first_tokens(logits, rows, _seen(batches, rows, logits.shape[-1]), steps=steps)
    until = 0
    while True:
        start, until = until, most if every is None else min(until + every, most)
        state, cache = decode(leaves, tree, cache, state, rows, jnp.int32(until))
        if start == 0 and (broken := np.flatnonzero(_fetch(state.out)[:, 0] == NOTHING)).size:
            raise InputError(
                f"row {broken[0]}",
                found="logits that are NaN",
                expected="numbers",
                fix="look for NaN in the weights, or load them with another dtype",
            )
        yield state
        if guided:
            done = _fetch(state.done)
            for guide, token, ended in zip(guides, _fetch(state.token), done, strict=True):
                if guide is not None and not ended:
                    guide.take(int(token))
            rows = dataclasses.replace(rows, allowed=_allowed(guides, done, vocab))
        if until == most or not _active(_fetch(state.done), until, np.asarray(rows.limit)).any():
            return


def _allowed(guides: Sequence[Guide | None], done: np.ndarray, vocab: int) -> np.ndarray:
    """bool[b, vocab]."""
    free = np.ones(vocab, bool)
    rows = zip(guides, done, strict=True)
    return np.stack([free if end or g is None else g.allowed(vocab) for g, end in rows])


@functools.partial(jax.jit, static_argnames=("tree", "size"))
def prefill(
    leaves: list[Array], tree: PyTreeDef, batch: Batches, *, size: int
) -> tuple[Array, object]:
    """`Generator.prefill`, compiled, of a model's leaves and structure; see `Model.prefill`."""
    return jax.tree.unflatten(tree, leaves).prefill(batch, size)


NOTHING = -1
"""In place of a row's first token where NaN is all that was computed."""


def _seen(batches: tuple[Batch, ...], rows: Rows, vocab: int) -> np.ndarray | None:
    """The words of each row's prompt, bool[b, vocab]; None where none is penalised."""
    if not rows.penalised:
        return None
    seen = np.zeros((len(rows.limit), vocab), bool)
    for each in batches if rows.prompt else ():
        words = _fetch(each.mask) & (_fetch(each.visual) < 0)
        row, place = np.nonzero(words)
        seen[row, _fetch(each.tokens)[row, place]] = True
    return seen


@functools.partial(jax.jit, static_argnames="steps")
def first_tokens(logits: Array, rows: Rows, seen: AnyArray | None = None, *, steps: int) -> State:
    """The state with each row's first token, or `NOTHING`."""
    seen = jnp.zeros((len(logits), 0), bool) if seen is None else jnp.asarray(seen)
    picked = pick(jnp.int32(0), logits, rows, seen)
    token = jnp.where(jnp.isnan(logits).any(axis=-1), NOTHING, picked)
    done = _stops(token, rows)
    out = jnp.zeros((len(token), steps), jnp.int32).at[:, 0].set(token)
    logs = None
    if rows.likeliest is not None:
        new = log_probabilities(logits, picked, rows.likeliest)
        logs = jax.tree.map(
            lambda x: jnp.zeros((len(x), steps, *x.shape[1:]), x.dtype).at[:, 0].set(x), new
        )
    return State(jnp.int32(1), token, done, (~done).astype(jnp.int32), out, seen, logs)


@functools.partial(jax.jit, static_argnames="tree", donate_argnames="cache")
def decode(
    leaves: list[Array], tree: PyTreeDef, cache: C, state: State, rows: Rows, until: Array
) -> tuple[State, C]:
    """Decodes until every row has ended or `until` tokens are written.

    Returns:
        The state, and the cache, which takes over the donated buffers.
    """
    model = jax.tree.unflatten(tree, leaves)

    def running(carry: tuple[State, C]) -> Array:
        state, _ = carry
        return (state.i < until) & _active(state.done, state.i, rows.limit).any()

    def step(carry: tuple[State, C]) -> tuple[State, C]:
        state, cache = carry
        logits, cache = model.next(state.token, cache)
        seen = state.seen
        if rows.penalised:
            seen = seen.at[jnp.arange(len(seen)), state.token].set(True)
        token = pick(state.i, logits, rows, seen)
        done = state.done | _stops(token, rows)
        count = state.count + _active(done, state.i, rows.limit)
        out, logs = state.out.at[:, state.i].set(token), state.logs
        if rows.likeliest is not None:
            new = log_probabilities(logits, token, rows.likeliest)
            logs = jax.tree.map(lambda old, x: old.at[:, state.i].set(x), logs, new)
        return State(state.i + 1, token, done, count, out, seen, logs), cache

    return jax.lax.while_loop(running, step, (state, cache))


def _active(done: AnyArray, i: AnyArray | int, limit: AnyArray) -> AnyArray:
    """bool[b]: rows that take an i-th token from 0."""
    return ~done & (i < limit)


def _stops(token: Array, rows: Rows) -> Array:
    return (token[:, None] == rows.stop[None]).any(axis=1)


def _fetch(x: AnyArray) -> np.ndarray:
    """A global array on every host."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
