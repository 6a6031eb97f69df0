"""From logits to a row's next token: penalties, filters, draws and log-probabilities."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from vfjax.errors import counted, require
from vfjax.model import AnyArray
from vfjax.settings import NONE, Settings

Array = jax.Array
T = TypeVar("T")
ALL = np.iinfo(np.int32).max
"""A top-k that keeps every token."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """How each of b rows is written; a pytree.

    Attributes:
        stop: int32[s] ids that end a row.
        limit: int32[b] tokens of a row at most.
        keys: key[b] of the draws.
        salt: int32[b], folded into the keys.
        temperature: float32[b, 1].
        top_k: int32[b, 1].
        top_p: float32[b, 1].
        min_p: float32[b, 1].
        penalty: float32[b, 1], of repetitions.
        allowed: bool[b, vocab], the tokens that may come next; None: all.
        greedy: no row samples; a constant of the program.
        penalised: whether any row's repetitions are; another.
        prompt: whether those of the prompt are, too.
        likeliest: tokens whose log-probabilities are told at each step beside the chosen one's;
            None: none at all; another constant.
    """

    stop: AnyArray
    limit: AnyArray
    keys: Array
    salt: AnyArray
    temperature: AnyArray
    top_k: AnyArray
    top_p: AnyArray
    min_p: AnyArray
    penalty: AnyArray
    allowed: AnyArray | None
    greedy: bool = dataclasses.field(metadata={"static": True})
    penalised: bool = dataclasses.field(metadata={"static": True})
    prompt: bool = dataclasses.field(metadata={"static": True})
    likeliest: int | None = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; each value is one for all rows, or a sequence of one a row.

    Attributes:
        temperature: 0 takes the likeliest token; above, samples. A folder's `do_sample`,
            `temperature`, `top_k` and `top_p` are not read: answers are greedy unless asked.
        top_k: sample among the k likeliest only, and those as likely as the k-th. None: among all
            (transformers' own default is 50).
        top_p: sample among the likeliest whose probabilities sum to p.
        min_p: sample among those at least p times as likely as the likeliest.
        repetition_penalty: above 1, divides what speaks for tokens that a row has; None: the
            folder's generation_config.json.
        seed: of the sampling; a row with a seed of its own draws what it would alone.
    """

    temperature: float | Sequence[float] = 0.0
    top_k: int | None | Sequence[int | None] = None
    top_p: float | None | Sequence[float | None] = None
    min_p: float | Sequence[float] = 0.0
    repetition_penalty: float | None | Sequence[float | None] = None
    seed: int | Sequence[int] = 0

    @classmethod
    def stack(cls, rows: Sequence["Sampling"]) -> "Sampling":
        """That of a batch, from those of its rows."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: [getattr(row, name) for row in rows] for name in names})

    def rows(
        self,
        limit: np.ndarray,
        *,
        stop: Sequence[int] = (),
        settings: Settings = NONE,
        logprobs: int | None = None,
    ) -> Rows:
        """It for b rows, checked.

        Args:
            limit: int32[b] tokens of a row at most.
            stop: ids that end a row.
            settings: of the folder.
            logprobs: see `vfjax.stream_ids`.

        Raises:
            InputError: a value is out of range, or there are not as many as rows.
        """
        b = len(limit)
        temperatures = by_row("temperature", self.temperature, b)
        ks = [ALL if value is None else value for value in by_row("top_k", self.top_k, b)]
        ps = [1.0 if value is None else value for value in by_row("top_p", self.top_p, b)]
        least = by_row("min_p", self.min_p, b)
        penalties = [
            settings.repetition_penalty if value is None else value
            for value in by_row("repetition_penalty", self.repetition_penalty, b)
        ]
        seeds = by_row("seed", self.seed, b)
        for value in temperatures:
            require(value >= 0, "temperature", value, "0 or more")
        for value in ks:
            require(value >= 1, "top_k", value, "None or at least 1")
        for value in ps:
            require(0 < value <= 1, "top_p", value, "None or within (0, 1]")
        for value in least:
            require(0 <= value <= 1, "min_p", value, "within [0, 1]")
        for value in penalties:
            require(value > 0, "repetition_penalty", value, "more than 0")
        require(logprobs is None or logprobs >= 0, "logprobs", logprobs, "None or at least 0")
        alone = isinstance(self.seed, Sequence)
        return Rows(
            stop=np.asarray(stop, np.int32),
            limit=np.asarray(limit, np.int32),
            keys=jnp.stack([jax.random.key(value) for value in seeds]),
            salt=np.zeros(b, np.int32) if alone else np.arange(b, dtype=np.int32),
            temperature=_column(temperatures, np.float32),
            top_k=_column([min(value, ALL) for value in ks], np.int32),
            top_p=_column(ps, np.float32),
            min_p=_column(least, np.float32),
            penalty=_column(penalties, np.float32),
            allowed=None,
            greedy=not any(temperatures),
            penalised=any(value != 1 for value in penalties),
            prompt=settings.penalise_prompt,
            likeliest=logprobs,
        )


GREEDY = Sampling()
"""The likeliest tokens."""


def _column(values: list[float], dtype: DTypeLike) -> np.ndarray:
    return np.asarray(values, dtype)[:, None]


def by_row(name: str, value: T | Sequence[T], b: int) -> list[T]:
    """One value for each of b rows.

    Raises:
        InputError: there are others.
    """
    if not isinstance(value, Sequence):
        return [value] * b
    require(len(value) == b, name, counted(len(value), "value"), f"one, or {b}, one a row")
    return list(value)


def pick(i: Array, logits: Array, rows: Rows, seen: Array) -> Array:
    """The i-th token of each row, int32[b], from float32[b, v] logits.

    Args:
        i: int32[].
        logits: of each row.
        rows: how each is written.
        seen: bool[b, v] tokens that a row has; not looked at where none is penalised.
    """
    if rows.allowed is not None:
        logits = jnp.where(rows.allowed, logits, -jnp.inf)
    if rows.penalised:
        logits = penalise(logits, seen, rows.penalty)
    likeliest = logits.argmax(axis=-1).astype(jnp.int32)
    if rows.greedy:
        return likeliest
    fold = jax.vmap(lambda key, salt: jax.random.fold_in(jax.random.fold_in(key, i), salt))
    samples = jnp.asarray(rows.temperature) > 0
    temperature = jnp.where(samples, rows.temperature, 1)
    keys = fold(rows.keys, rows.salt)
    drawn = _draw(keys, logits, temperature, rows.top_k, rows.top_p, rows.min_p)
    return jnp.where(samples[:, 0], drawn, likeliest)


def penalise(logits: Array, seen: AnyArray, penalty: AnyArray) -> Array:
    """As transformers' RepetitionPenaltyLogitsProcessor (arXiv 1909.05858)."""
    lower = jnp.where(logits > 0, logits / penalty, logits * penalty)
    return jnp.where(seen, lower, logits)


def sample(
    key: Array,
    logits: Array,
    temperature: AnyArray | float,
    top_k: AnyArray | int | None,
    top_p: AnyArray | float,
    min_p: AnyArray | float = 0.0,
) -> Array:
    """One token a row from float32[b, v] logits: temperature, top-k, top-p, min-p, in that order.

    It is the order of transformers' `_get_logits_processor`. Row i draws with its own key, so a
    row's draw does not depend on the other rows. The likeliest token always stays (nucleus
    sampling, arXiv 1904.09751; min-p, arXiv 2407.01082).
    """
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(len(logits)))
    return _draw(keys, logits, temperature, ALL if top_k is None else top_k, top_p, min_p)


def _draw(
    keys: Array,
    logits: Array,
    temperature: AnyArray | float,
    top_k: AnyArray | int,
    top_p: AnyArray | float,
    min_p: AnyArray | float,
) -> Array:
    """`sample` with key[b]; the others scalars or [b, 1]."""
    kept = filtered(logits, temperature, top_k, top_p, min_p)
    return jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)


def filtered(
    logits: Array,
    temperature: AnyArray | float,
    top_k: AnyArray | int,
    top_p: AnyArray | float,
    min_p: AnyArray | float,
) -> Array:
    """Scaled logits float32[b, v], -inf for tokens that are filtered out.

    Tokens that are as likely as the last one kept are kept with it. Nothing is sorted, and a filter
    that no row asks for costs nothing.
    """
    logits = logits / temperature
    shape = (len(logits), 1)
    k, p = (jnp.broadcast_to(jnp.asarray(x), shape) for x in (top_k, top_p))
    logits = _where_any(
        k < logits.shape[-1],
        lambda x: _least(x, jnp.ones_like(x, jnp.int32), k),
        logits,
    )
    logits = _where_any(p < 1, lambda x: _least(x, jax.nn.softmax(x, axis=-1), p), logits)
    least = logits.max(axis=-1, keepdims=True) + jnp.log(jnp.asarray(min_p, jnp.float32))
    return jnp.where(logits >= least, logits, -jnp.inf)


def _where_any(asked: Array, least: Callable[[Array], Array], logits: Array) -> Array:
    """The logits of rows that ask, bool[b, 1], cut below `least` of them, [b, 1]."""
    cut = jax.lax.cond(asked.any(), least, lambda x: jnp.full_like(x[:, :1], -jnp.inf), logits)
    return jnp.where(~asked | (logits >= cut), logits, -jnp.inf)


def _least(x: Array, weights: Array, bound: Array) -> Array:
    """The least number that has less than `bound` [b, 1] of weight above it in x: float32[b, 1].

    Found by bisecting the bits of float32 numbers, which are ordered as the numbers are: 32 sums of
    a row, where a sort of it takes ten times as long.
    """

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low & high) + ((low ^ high) >> 1)  # low + high may overflow
        above = jnp.where(x > _number(middle), weights, 0).sum(axis=-1, keepdims=True)
        fits = above < bound
        return jnp.where(fits, low, middle + 1), jnp.where(fits, middle, high)

    ends = jnp.full((len(x), 1), -jnp.inf), x.max(axis=-1, keepdims=True)
    return _number(jax.lax.fori_loop(0, 32, halve, tuple(_bits(end) for end in ends))[1])


def _bits(x: Array) -> Array:
    """int32 of float32, in the same order."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _number(bits: Array) -> Array:
    """float32 of `_bits`."""
    return jax.lax.bitcast_convert_type(bits ^ ((bits >> 31) & 0x7FFFFFFF), jnp.float32)


def log_probabilities(logits: Array, token: Array, likeliest: int) -> tuple[Array, Array, Array]:
    """Of the model itself, before penalties, temperature and filters.

    Args:
        logits: float32[b, v].
        token: int32[b], the chosen ones.
        likeliest: k of them, or v where that is fewer.

    Returns:
        float32[b] of the chosen, float32[b, k] of the likeliest from the first down, and their ids,
        int32[b, k].
    """
    logs = jax.nn.log_softmax(logits, axis=-1)
    top, ids = jax.lax.top_k(logs, min(likeliest, logs.shape[-1]))
    return jnp.take_along_axis(logs, token[:, None], axis=-1)[:, 0], top, ids.astype(jnp.int32)
