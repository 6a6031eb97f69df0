import inspect

import jax.numpy as jnp
import numpy as np
import pytest

from tests.vfjax.merge.families import run
from vfjax import InputError
from vfjax.merge import Merger
from vfjax.merge.methods.requests import Block
from vfjax.merge.methods.sparse import Sparsifier, add, combine, elect


def test_a_model_is_trimmed_as_one_whatever_its_weights():
    """By a gradient of weights the same elements are kept; one of densities is refused."""
    rng = np.random.default_rng(0)
    spread = {"first": 10.0, "second": 1.0}
    member = {n: (s * rng.normal(size=(4, 8))).astype(np.float32) for n, s in spread.items()}

    def kept(weights, densities=(0.5, 0.5)):
        merger, out = Merger(), []
        for name, w, density in zip(member, weights, densities, strict=True):
            params = {"weights": (w,), "density": density, "trim": "model", "normalize": False}
            base = "base", np.zeros((4, 8), np.float32)
            out.append(merger.add(name, "ties", params, [("m", member[name])], base))
        return [tensor[...] != 0 for tensor in out]

    expected = kept((1.0, 1.0))
    assert sum(mask.sum() for mask in expected) == 32 and expected[0].sum() > expected[1].sum()
    np.testing.assert_array_equal(kept((1.0, 0.9)), expected)
    with pytest.raises(InputError, match="^second: trim: found 'model', and density varies"):
        kept((1.0, 1.0), (0.5, 0.4))


def test_a_share_is_of_the_decimal_number():
    """0.7 of 10 are 7, though float32's 0.7 is less."""
    base, up = np.zeros(10, np.float32), np.arange(1, 11, dtype=np.float32)
    assert np.count_nonzero(run("sce", base, [up, -up / 2], select_topk=0.7)) == 7


def test_a_new_sparsifier_is_one_entry():
    """Here one that keeps every other element, with each consensus."""

    def every_other(deltas, block, *, odd: bool = False):
        yield from ()
        return [(block.index % 2 == 1) == odd for _ in deltas], [0.5 for _ in deltas]

    shares = {"add": np.float32([1 - 1 / 2, 3 + 1 / 2]), "elect": np.float32([1, 3.5 / 1.5])}
    start, x, y = np.float32([[1, 1, 1, 1], [2, 2, 4, 3], [0, 0, 2, 5]])
    block = Block(jnp.uint32(0), None, 4)
    for consensus, extra in ((add, set()), (elect, {"vote"})):
        method = combine("halves", Sparsifier(every_other), consensus, consensus is elect)
        named = {"base", "members", "weights", "scale", "rescale", "odd", "normalize", "block"}
        assert set(inspect.signature(method).parameters) == named | extra
        for rescale, factor in (("none", 1), ("density", 2)):
            options = {"weights": (1.0, 0.5), "scale": 3.0, "rescale": rescale}
            with pytest.raises(StopIteration) as stop:  # it asks for nothing
                next(method(start, [x, y], block=block, **options))
            want = start.copy()
            want[::2] += 3 * factor * shares[consensus.__name__]
            np.testing.assert_allclose(stop.value.value, want, rtol=1e-6)
        with pytest.raises(TypeError, match="halves.*'density'"):
            next(method(start, [x, y], block=block, weights=(1.0, 1.0), density=0.5))
