"""What the tests of merging share: a base with fine-tunes, and one tensor through the engine."""

import ml_dtypes
import numpy as np

from vfjax.merge import METHODS, merge

BF16 = np.dtype(ml_dtypes.bfloat16)

F16 = np.dtype(np.float16)

F32 = np.dtype(np.float32)

EPS32 = 2.0**-24


class Spy:
    """A lazy tensor that notes which rows were read."""

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.reads = array, array.shape, array.dtype, []

    def __getitem__(self, rows):
        self.reads.append(rows)
        return self.array[rows]


def family(k=2, n=1 << 17, dtype=BF16, spread=1e-3, seed=0):
    """A base of 0.02 deviation and k fine-tunes of it, as flat arrays."""
    rng = np.random.default_rng(seed)
    base = (0.02 * rng.standard_normal(n)).astype(dtype)
    deltas = spread * rng.standard_normal((k, n))
    return base, [(base.astype(np.float64) + delta).astype(dtype) for delta in deltas]


def run(method, base, members, dtype=None, **params):
    """One tensor through the engine."""
    named = {f"m{i}": {"w": x} for i, x in enumerate(members)}
    named_base = None if base is None else {"w": base}
    return merge(named_base, named, method, params, dtype=dtype)["w"][...]


def arguments(method):
    """Number of members and parameters for any method."""
    found = METHODS[method]
    count = found.takes[1] or 2
    known = {"weights": (0.4, 0.7)[:count], "density": 0.5, "select_topk": 0.5, "t": 0.3}
    return count, {key: value for key, value in known.items() if key in found.params}
