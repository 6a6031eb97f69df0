"""Drawing a token a row, beside a draw that sorts the vocabulary and beside transformers.

python experiments/bench/sampling.py [--quick] --out=FILE.json
"""

import argparse
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.bench.common import Row, arguments, cores, interleaved, report, row
from vfjax.sampling import ALL, sample

SETTINGS = {"plain": (ALL, 1.0), "top-k": (50, 1.0), "top-p": (ALL, 0.9), "both": (50, 0.9)}
TEMPERATURE = 0.8


def main(args: argparse.Namespace) -> None:
    """Times every setting, prints the table, writes the file."""
    b, v, repeats = (2, 1024, 3) if args.quick else (8, 128 * 1024, 11)
    notes = {"rows": b, "vocabulary": v, "threads": cores(), "load before": os.getloadavg()[0]}
    logits = np.random.default_rng(0).normal(size=(b, v)).astype(np.float32) * 3
    rows = [one for name, (k, p) in SETTINGS.items() for one in bench(name, logits, k, p, repeats)]
    report(rows, notes, ("jax", "jaxlib", "torch", "transformers", "vfjax"), args.out)


def bench(name: str, logits: np.ndarray, k: int, p: float, repeats: int) -> list[Row]:
    """Milliseconds of a draw for all rows."""
    keys, x = iter(jax.random.split(jax.random.key(0), 2 * repeats + 2)), jnp.asarray(logits)
    ks, ps = (jnp.full((len(logits), 1), value) for value in (k, p))  # a row has its own

    def run(draw: Callable[..., jax.Array]) -> Callable[[], object]:
        return lambda: draw(next(keys), x, TEMPERATURE, ks, ps).block_until_ready()

    runs = {"ours": run(bisected), "sorted": run(by_sorting), "torch": in_torch(logits, k, p)}
    times = {key: [1e3 * s for s in t.rest] for key, t in interleaved(runs, repeats).items()}
    return [
        row(name, times["ours"], times["sorted"], "the vocabulary sorted", "ms"),
        row(name, times["ours"], times["torch"], "transformers", "ms"),
    ]


bisected = jax.jit(sample)


@jax.jit
def by_sorting(
    key: jax.Array, logits: jax.Array, temperature: float, top_k: jax.Array, top_p: jax.Array
) -> jax.Array:
    """What most JAX code does."""
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, axis=-1) / temperature
    ranked = jnp.where(jnp.arange(ranked.shape[-1]) < top_k, ranked, -jnp.inf)
    p = jax.nn.softmax(ranked, axis=-1)
    ranked = jnp.where(jnp.cumsum(p, axis=-1) - p < top_p, ranked, -jnp.inf)
    drawn = jax.random.categorical(key, ranked)
    return jnp.take_along_axis(order, drawn[:, None], axis=-1)[:, 0]


def in_torch(logits: np.ndarray, k: int, p: float) -> Callable[[], object]:
    """The processors of `GenerationMixin`, and its draw."""
    warpers = [transformers.TemperatureLogitsWarper(TEMPERATURE)]
    warpers += [transformers.TopKLogitsWarper(k)] if k < ALL else []
    warpers += [transformers.TopPLogitsWarper(p)] if p < 1 else []
    scores = torch.from_numpy(logits)

    def run() -> object:
        warped = functools.reduce(lambda x, warper: warper(None, x), warpers, scores)
        return torch.multinomial(warped.softmax(dim=-1), num_samples=1)

    return run


if __name__ == "__main__":
    main(arguments(str(__doc__).splitlines()[0]))
