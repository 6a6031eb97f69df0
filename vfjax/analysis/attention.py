"""What the words of a prompt look at: attention from text to the visual tokens, by branch.

The convention of LLaVA's visualisers (zjysteven/VLM-Visualizer): weights of every layer, the mean
over heads, without the sink. Attention says where a layer reads from, not why a model answers.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vfjax.llm.llama import Attention, Step
from vfjax.llm.watch import watched, weights
from vfjax.model import AnyArray, Batch, Model

Array = jax.Array


def readers(batch: Batch) -> dict[str, np.ndarray]:
    """Whose attention is looked at, bool[b, t].

    Returns:
        "question": the text after a row's pictures, with what the template puts there; "last": the
        last token of all, which chooses the first word of the answer.
    """
    mask, visual = np.asarray(batch.mask), np.asarray(batch.segments) > 0
    after = np.cumsum(visual[:, ::-1], axis=1)[:, ::-1] == 0
    later = np.cumsum(mask[:, ::-1], axis=1)[:, ::-1] - mask
    return {"question": mask & after, "last": mask & (later == 0)}


@jax.jit
def attention(
    model: Model, batch: Batch, readers: Mapping[str, AnyArray]
) -> tuple[dict[str, Array], Array]:
    """Attention of a forward pass, a row a layer, without the sink.

    The mean over heads; a row's first token, on which attention that is not needed rests (the sink,
    arXiv 2309.17453), is set to zero and each reader's weights are divided by their sum; then the
    mean over the readers. Sinks among the visual tokens stay. The model runs as it is, at its
    positions and under its mask; memory grows with heads * t * t of one layer.

    Args:
        model: any `Model`.
        batch: b rows.
        readers: name -> bool[b, t], tokens of which each row has at least one, not its first alone.

    Returns:
        Name -> float32[b, layers, t], each row's sum is one; and the segments int32[b, t] of
        `Batch.segments`: 0 for text, k + 1 for branch k.
    """
    first = (jnp.cumsum(batch.mask, axis=1) == 1) & batch.mask
    rows: dict[str, list[Array]] = {name: [] for name in readers}

    def show(attn: Attention, x: Array, k: Array, step: Step) -> None:
        kept = jnp.where(first[:, None], 0, weights(attn, x, k, step).mean(axis=1))
        kept = kept / jnp.maximum(kept.sum(axis=-1, keepdims=True), 1e-30)
        for name, mine in readers.items():
            total = jnp.where(mine[..., None], kept, 0).sum(axis=1)
            rows[name].append(total / mine.sum(axis=1)[:, None])

    other: Any = jax.tree.map(lambda x: x, model)  # another model of the same arrays
    other.llm = watched(model.llm, show)
    other.read(batch)
    return {name: jnp.stack(found, axis=1) for name, found in rows.items()}, jnp.asarray(
        batch.segments
    )


def shares(rows: np.ndarray, segments: np.ndarray, count: int) -> np.ndarray:
    """Share of attention by segment.

    Args:
        rows: float[b, layers, t] of `attention`.
        segments: int[b, t] of `attention`.
        count: of the branches.

    Returns:
        float64[b, layers, 1 + count]: of the text, then of each branch; their sum is one.
    """
    owners = np.asarray(segments)[:, :, None] == np.arange(count + 1)
    return np.asarray(rows, np.float64) @ owners


def entropy(weights: np.ndarray) -> np.ndarray:
    """Entropy over the last axis, as a share of the largest there is: 1 looks everywhere alike.

    Args:
        weights: float[..., k] not negative, k above one; normalised here.
    """
    p = np.asarray(weights, np.float64)
    p = p / np.maximum(p.sum(axis=-1, keepdims=True), 1e-30)
    logs = np.log(p, out=np.zeros_like(p), where=p > 0)
    return -(p * logs).sum(axis=-1) / np.log(p.shape[-1])


def divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence over the last axis in bits: 0 for equal maps, 1 for disjoint ones.

    Lin, IEEE Transactions on Information Theory 37, 1991, equation 4.1 with equal weights.

    Args:
        p: float[..., k] not negative; normalised here.
        q: the same.
    """
    p, q = (np.maximum(a, 1e-300) / np.maximum(a, 1e-300).sum(-1, keepdims=True) for a in (p, q))
    middle = (p + q) / 2
    return ((p * np.log2(p / middle)).sum(-1) + (q * np.log2(q / middle)).sum(-1)) / 2
