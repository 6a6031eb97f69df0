"""How likely a model holds given tokens: for perplexity, and to choose among written answers."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vfjax.errors import require
from vfjax.model import Batch, Model
from vfjax.processor import Processor


def log_likelihoods(
    model: Model,
    processor: Processor,
    rows: Sequence[Sequence[int]],
    *,
    batch: int = 8,
    progress: Callable[[int], object] = lambda n: None,
) -> list[np.ndarray]:
    """Each token's log p(token | the tokens before it), but for a row's first.

    Rows of like length are read together, so few shapes compile, and models of one config share
    what is compiled. Logits are made a row at a time: [t, vocab] at most is in memory.

    Args:
        model: any; rows are words alone.
        processor: the model's.
        rows: token ids of each text.
        batch: rows read together.
        progress: called with the number of rows that were read.

    Returns:
        float32[n - 1], natural logarithms, of each row of n tokens, in the order of `rows`.

    Raises:
        InputError: a row of no or one token, one longer than the context, or an id outside the
            vocabulary.
    """
    require(batch >= 1, "batch", batch, "at least 1")
    for number, row in enumerate(rows):
        require(len(row) >= 2, f"row {number}", f"{len(row)} tokens", "at least 2")
    out: list[np.ndarray] = [np.zeros(0, np.float32)] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), batch):
        picks = order[start : start + batch]
        filled = picks + picks[:1] * (batch - len(picks))
        found = np.asarray(_logs(model, processor(input_ids=[rows[i] for i in filled])))
        for i, logs in zip(picks, found, strict=False):
            out[i] = logs[: len(rows[i]) - 1]
        progress(len(picks))
    return out


@jax.jit
def _logs(model: Model, batch: Batch) -> jax.Array:
    """float32[b, t - 1]."""
    hidden = model.read(batch)[0][:, :-1]
    following = jnp.asarray(batch.tokens)[:, 1:]

    def of_row(row: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, ids = row
        logs = jax.nn.log_softmax(model.llm.logits(x), axis=-1)
        return jnp.take_along_axis(logs, ids[:, None], axis=-1)[:, 0]

    return jax.lax.map(of_row, (hidden, following))
