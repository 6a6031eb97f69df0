"""What the members did to the base: lengths of deltas, their angles, their conflicts of sign."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vfjax.merge.engine.kernels import lanes
from vfjax.merge.methods.registry import Array


@dataclasses.dataclass(frozen=True)
class Account:
    """Sums over some elements, of one tensor or of many; accounts add up.

    Attributes:
        count: number of elements.
        base: sum of the base's squares.
        gram: float64[K, K], inner products of the deltas.
        conflicts: elements that one member moves up and another down.
    """

    count: int
    base: float
    gram: np.ndarray
    conflicts: int

    def __add__(self, other: "Account") -> "Account":
        return Account(
            self.count + other.count,
            self.base + other.base,
            self.gram + other.gram,
            self.conflicts + other.conflicts,
        )

    @property
    def norms(self) -> np.ndarray:
        """float64[K]: lengths of the deltas."""
        return np.sqrt(np.diag(self.gram))

    @property
    def moved(self) -> np.ndarray:
        """float64[K]: lengths of the deltas, as shares of the base's length."""
        return self.norms / (math.sqrt(self.base) or 1.0)

    def cosine(self, i: int, j: int) -> float:
        """Cosine of the angle between two members' deltas; 0 if one of them is zero."""
        length = self.norms[i] * self.norms[j]
        return float(self.gram[i, j] / length) if length else 0.0


def account(arrays: Sequence[Array], count: int) -> Account:
    """Compares the members' deltas on a block.

    Args:
        arrays: base and K members, flat, of one size; zeros where they are padding.
        count: number of elements that are not.
    """
    sums = np.asarray(_sums(list(arrays))).astype(np.float64).sum(-1)
    members = len(arrays) - 1
    upper = np.triu_indices(members)
    gram = np.empty((members, members))
    gram[upper] = gram[upper[::-1]] = sums[2:]
    return Account(count, float(sums[0]), gram, int(sums[1]))


@jax.jit
def _sums(arrays: Sequence[Array]) -> jax.Array:
    base, *members = (jnp.asarray(x, jnp.float32) for x in arrays)
    deltas = [x - base for x in members]
    up = functools.reduce(jnp.logical_or, [d > 0 for d in deltas])
    down = functools.reduce(jnp.logical_or, [d < 0 for d in deltas])
    products = [deltas[i] * deltas[j] for i in range(len(deltas)) for j in range(i, len(deltas))]
    terms = [base * base, (up & down).astype(jnp.float32), *products]
    return lanes(jnp.stack(terms))
