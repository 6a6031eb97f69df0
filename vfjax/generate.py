"""Text generation: one compiled prefill, one compiled decode loop, run at once or in pieces."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
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
    max_new_tokens: int | Sequence[int] = 64,
    temperature: float | Sequence[float] = 0.0,
    top_k: int | None = None,
    top_p: float | Sequence[float] | None = None,
    repetition_penalty: float | Sequence[float] | None = None,
    seed: int | Sequence[int] = 0,
) -> list[str]:
    """One text a row, cut at the tokenizer's and the template's stops.

    Args:
        model: any model of `converters.load` or `converters.load_fused`.
        processor: the one that made `batch`.
        batch: b rows; a row may be shorter than another.
        max_new_tokens: tokens to write at most; one number, or, as those below, one a row.
        temperature: 0 takes the likeliest token; above, samples. A folder's `do_sample`,
            `temperature`, `top_k` and `top_p` are not read: answers are greedy unless asked.
        top_k: sample among the k likeliest only, and those as likely as the k-th; one number. None:
            among all (transformers' own default is 50).
        top_p: sample among the likeliest whose probabilities sum to p.
        repetition_penalty: above 1, divides what speaks for tokens that a row has; None: the
            folder's generation_config.json.
        seed: of the sampling; a row with a seed of its own draws what it would alone.

    Raises:
        InputError: the batch and the new tokens don't fit the context, a sampling parameter is out
            of range, the prompt's logits are NaN, or generation_config.json has a setting that
            would change the answers and is not supported.
    """
    settings = processor.settings
    settings.check()
    ids = generate_ids(
        model,
        batch,
        max_new_tokens=max_new_tokens,
        stop=processor.stops,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=(
            settings.repetition_penalty if repetition_penalty is None else repetition_penalty
        ),
        penalise_prompt=settings.penalise_prompt,
        seed=seed,
    )
    return [processor.decode(row) for row in ids]


def generate_ids(
    model: Generator,
    batch: Batches,
    *,
    max_new_tokens: int | Sequence[int] = 64,
    stop: Sequence[int] = (),
    temperature: float | Sequence[float] = 0.0,
    top_k: int | None = None,
    top_p: float | Sequence[float] | None = None,
    repetition_penalty: float | Sequence[float] = 1.0,
    penalise_prompt: bool = True,
    seed: int | Sequence[int] = 0,
) -> list[list[int]]:
    """New token ids of each row, without the stop id that ended it; see `generate`.

    `penalise_prompt`: whether the repetition penalty is for the prompt's words, too.
    """
    penalty = (repetition_penalty, penalise_prompt)
    how = _how(model, batch, stop, max_new_tokens, temperature, top_k, top_p, seed, penalty)
    (state,) = _pieces(model, batch, how, None, None)
    return [row[:n].tolist() for row, n in zip(_fetch(state.out), _fetch(state.count), strict=True)]


def stream_ids(
    model: Generator,
    batch: Batches,
    *,
    every: int = 8,
    max_new_tokens: int | Sequence[int] = 64,
    room: int | None = None,
    stop: Sequence[int] = (),
    temperature: float | Sequence[float] = 0.0,
    top_k: int | None = None,
    top_p: float | Sequence[float] | None = None,
    repetition_penalty: float | Sequence[float] = 1.0,
    penalise_prompt: bool = True,
    seed: int | Sequence[int] = 0,
) -> Iterator[tuple[list[list[int]], list[bool]]]:
    """Each row's new ids since the last time, and whether it has ended, as they are written.

    Joined, they are the ids of `generate_ids`, by the same compiled programs. Closing the iterator
    ends the work. Arguments that are not named here are as there.

    Args:
        model: as in `generate`.
        batch: as there.
        every: tokens from one time to the next.
        max_new_tokens: as there.
        room: slots for new tokens, at least `max_new_tokens`; None: these, rounded up to 64.
        stop: ids that end a row.
        temperature: as there.
        top_k: as there.
        top_p: as there.
        repetition_penalty: as there.
        penalise_prompt: as there.
        seed: as there.

    Raises:
        InputError: as there, at the call; or `every` or `room` is too small.
    """
    _require(every >= 1, "every", every, "at least 1")
    penalty = (repetition_penalty, penalise_prompt)
    how = _how(model, batch, stop, max_new_tokens, temperature, top_k, top_p, seed, penalty)
    limit = np.asarray(how.limit)
    _require(room is None or room >= limit.max(), "room", room, f"at least {limit.max()}")

    def pieces() -> Iterator[tuple[list[list[int]], list[bool]]]:
        seen = np.zeros_like(limit)
        for state in _pieces(model, batch, how, every, room):
            out, count, done = (_fetch(x) for x in (state.out, state.count, state.done))
            rows = zip(out, seen, count, strict=True)
            ended = done | (int(_fetch(state.i)) >= limit)
            yield [row[first:last].tolist() for row, first, last in rows], ended.tolist()
            seen = count

    return pieces()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _How:
    """How each of b rows is written.

    Attributes:
        stop: int32[s] ids that end a row.
        limit: int32[b] tokens of a row at most.
        keys: key[b] of the draws.
        salt: int32[b], folded into the keys.
        temperature: float32[b, 1].
        top_p: float32[b, 1].
        penalty: float32[b, 1], of repetitions.
        greedy: no row samples; a constant of the program.
        top_k: another.
        penalised: whether any row's repetitions are; another.
        prompt: whether those of the prompt are, too.
    """

    stop: AnyArray
    limit: AnyArray
    keys: Array
    salt: AnyArray
    temperature: AnyArray
    top_p: AnyArray
    penalty: AnyArray
    greedy: bool = dataclasses.field(metadata={"static": True})
    top_k: int | None = dataclasses.field(metadata={"static": True})
    penalised: bool = dataclasses.field(metadata={"static": True})
    prompt: bool = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """What is written so far, beside the cache.

    Attributes:
        i: int32[] tokens picked for each row.
        token: int32[b] the last ones.
        done: bool[b], where a stop was met.
        count: int32[b] tokens that belong to a row.
        out: int32[b, steps] all tokens; undefined from a row's count on.
        seen: bool[b, vocab], the tokens that a row has; [b, 0] where none is penalised.
    """

    i: Array
    token: Array
    done: Array
    count: Array
    out: Array
    seen: Array


def _how(
    model: Generator,
    batch: Batches,
    stop: Sequence[int],
    max_new_tokens: int | Sequence[int],
    temperature: float | Sequence[float],
    top_k: int | None,
    top_p: float | Sequence[float] | None,
    seed: int | Sequence[int],
    penalty: tuple[float | Sequence[float], bool] = (1.0, True),
) -> _How:
    """The arguments of `generate_ids`, checked, one value a row."""
    batches = batch if isinstance(batch, tuple) else (batch,)
    lengths = np.max([_fetch(each.mask).sum(axis=1) for each in batches], axis=0)
    b = len(lengths)
    limit = _by_row("max_new_tokens", max_new_tokens, b)
    temperatures = _by_row("temperature", temperature, b)
    top_ps = _by_row("top_p", 1.0 if top_p is None else top_p, b)
    penalties = _by_row("repetition_penalty", penalty[0], b)
    seeds = _by_row("seed", seed, b)
    for value in limit:
        _require(value > 0, "max_new_tokens", value, "at least 1")
    row = int((lengths + limit).argmax())
    _require(
        lengths[row] + limit[row] <= model.context,
        "max_new_tokens",
        f"{lengths[row]} tokens in the longest row and {limit[row]} new ones",
        f"at most {model.context}, the LLM's context",
    )
    for value in temperatures:
        _require(value >= 0, "temperature", value, "0 or more")
    _require(top_k is None or top_k >= 1, "top_k", top_k, "None or at least 1")
    for value in top_ps:
        _require(0 < value <= 1, "top_p", value, "None or within (0, 1]")
    for value in penalties:
        _require(value > 0, "repetition_penalty", value, "more than 0")
    alone = isinstance(seed, Sequence)
    return _How(
        stop=np.asarray(stop, np.int32),
        limit=np.asarray(limit, np.int32),
        keys=jnp.stack([jax.random.key(value) for value in seeds]),
        salt=np.zeros(b, np.int32) if alone else np.arange(b, dtype=np.int32),
        temperature=np.asarray(temperatures, np.float32)[:, None],
        top_p=np.asarray(top_ps, np.float32)[:, None],
        penalty=np.asarray(penalties, np.float32)[:, None],
        greedy=not any(temperatures),
        top_k=top_k,
        penalised=any(value != 1 for value in penalties),
        prompt=penalty[1],
    )


def _by_row(name: str, value: Any, b: int) -> list[Any]:
    if not isinstance(value, Sequence):
        return [value] * b
    _require(len(value) == b, name, f"{len(value)} values", f"one, or one for each of {b} rows")
    return list(value)


def _require(ok: bool, where: str, found: object, expected: str) -> None:
    if not ok:
        raise InputError(where, found=found, expected=expected, fix="change the argument")


def _pieces(
    model: Generator, batch: Batches, how: _How, every: int | None, room: int | None
) -> Iterator[_State]:
    """The state after each `every` tokens, until every row has ended; None: at the end alone."""
    batches = batch if isinstance(batch, tuple) else (batch,)
    most = int(np.max(how.limit))
    steps = _round_up(most, 64) if room is None else room
    slots = max(each.read for each in batches)
    leaves, tree = jax.tree.flatten(model)  # once: some 20 microseconds an array
    logits, cache = _prefill(leaves, tree, place(batch, mesh_of(leaves)), size=slots + steps)
    state = _first(logits, how, _seen(batches, how, logits.shape[-1]), steps=steps)
    until = 0
    while True:
        start, until = until, most if every is None else min(until + every, most)
        state, cache = _decode(leaves, tree, cache, state, how, jnp.int32(until))
        if start == 0 and (broken := np.flatnonzero(_fetch(state.out)[:, 0] == NOTHING)).size:
            raise InputError(
                f"row {broken[0]}",
                found="logits that are NaN",
                expected="numbers",
                fix="look for NaN in the weights, or load them with another dtype",
            )
        yield state
        if until == most or not _active(_fetch(state.done), until, np.asarray(how.limit)).any():
            return


@functools.partial(jax.jit, static_argnames=("tree", "size"))
def _prefill(leaves: list[Array], tree: Any, batch: Batches, *, size: int) -> tuple[Array, Any]:
    return jax.tree.unflatten(tree, leaves).prefill(batch, size)


NOTHING = -1
"""In place of a row's first token where NaN is all that was computed."""


def _seen(batches: tuple[Batch, ...], how: _How, vocab: int) -> np.ndarray | None:
    """The words of each row's prompt, bool[b, vocab]; None where none is penalised."""
    if not how.penalised:
        return None
    seen = np.zeros((len(how.limit), vocab), bool)
    for each in batches if how.prompt else ():
        words = _fetch(each.mask) & (_fetch(each.visual) < 0)
        row, place = np.nonzero(words)
        seen[row, _fetch(each.tokens)[row, place]] = True
    return seen


@functools.partial(jax.jit, static_argnames="steps")
def _first(logits: Array, how: _How, seen: AnyArray | None = None, *, steps: int) -> _State:
    """The state with each row's first token, or `NOTHING`."""
    seen = jnp.zeros((len(logits), 0), bool) if seen is None else jnp.asarray(seen)
    picked = _pick(jnp.int32(0), logits, how, seen)
    token = jnp.where(jnp.isnan(logits).any(axis=-1), NOTHING, picked)
    done = _stops(token, how)
    out = jnp.zeros((len(token), steps), jnp.int32).at[:, 0].set(token)
    return _State(jnp.int32(1), token, done, (~done).astype(jnp.int32), out, seen)


@functools.partial(jax.jit, static_argnames="tree", donate_argnames="cache")
def _decode(
    leaves: list[Array], tree: Any, cache: Any, state: _State, how: _How, until: Array
) -> tuple[_State, Any]:
    """Decodes until every row has ended or `until` tokens are written.

    Returns:
        The state, and the cache, which takes over the donated buffers.
    """
    model = jax.tree.unflatten(tree, leaves)

    def running(carry: tuple[_State, Any]) -> Array:
        state, _ = carry
        return (state.i < until) & _active(state.done, state.i, how.limit).any()

    def step(carry: tuple[_State, Any]) -> tuple[_State, Any]:
        state, cache = carry
        logits, cache = model.next(state.token, cache)
        seen = state.seen
        if how.penalised:
            seen = seen.at[jnp.arange(len(seen)), state.token].set(True)
        token = _pick(state.i, logits, how, seen)
        done = state.done | _stops(token, how)
        count = state.count + _active(done, state.i, how.limit)
        out = state.out.at[:, state.i].set(token)
        return _State(state.i + 1, token, done, count, out, seen), cache

    return jax.lax.while_loop(running, step, (state, cache))


def _active(done: AnyArray, i: AnyArray | int, limit: AnyArray) -> Any:
    """bool[b]: rows that take an i-th token, counted from 0."""
    return ~done & (i < limit)


def _stops(token: Array, how: _How) -> Array:
    return (token[:, None] == how.stop[None]).any(axis=1)


def _pick(i: Array, logits: Array, how: _How, seen: Array) -> Array:
    """The i-th token of each row, int32[b], from float32[b, v] logits; `seen` as in `_State`."""
    if how.penalised:  # transformers' RepetitionPenaltyLogitsProcessor (arXiv 1909.05858)
        lower = jnp.where(logits > 0, logits / how.penalty, logits * how.penalty)
        logits = jnp.where(seen, lower, logits)
    likeliest = logits.argmax(axis=-1).astype(jnp.int32)
    if how.greedy:
        return likeliest
    fold = jax.vmap(lambda key, salt: jax.random.fold_in(jax.random.fold_in(key, i), salt))
    samples = jnp.asarray(how.temperature) > 0
    temperature = jnp.where(samples, how.temperature, 1)
    drawn = _draw(fold(how.keys, how.salt), logits, temperature, how.top_k, how.top_p)
    return jnp.where(samples[:, 0], drawn, likeliest)


def sample(key: Array, logits: Array, temperature: Array, top_k: int | None, top_p: Array) -> Array:
    """One token a row from float32[b, v] logits: temperature, then top-k, then top-p.

    Row i draws with its own key, so a row's draw does not depend on the other rows. The likeliest
    token always stays (nucleus sampling, arXiv 1904.09751).
    """
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(len(logits)))
    return _draw(keys, logits, temperature, top_k, top_p)


def _draw(
    keys: Array, logits: Array, temperature: AnyArray, top_k: int | None, top_p: AnyArray
) -> Array:
    """`sample` with key[b]; temperature and top-p scalars or [b, 1]."""
    logits = logits / temperature
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    if top_k is not None:  # whatever is as likely as the k-th stays, as in transformers
        last = min(top_k, ranked.shape[-1]) - 1
        ranked = jnp.where(ranked >= ranked[:, last : last + 1], ranked, -jnp.inf)
    p = jax.nn.softmax(ranked, axis=-1)
    ranked = jnp.where(jnp.cumsum(p, axis=-1) - p < top_p, ranked, -jnp.inf)
    drawn = jax.vmap(jax.random.categorical)(keys, ranked)
    return jnp.take_along_axis(order, drawn[:, None], axis=-1)[:, 0].astype(jnp.int32)


def _fetch(x: AnyArray) -> np.ndarray:
    """A global array on every host."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
