"""Int8 weights: their error, and that they are all there is of a layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import converters
from tests import checkpoints
from vfjax import InputError, forward, generate_ids
from vfjax.llm.cache import Int8Rows
from vfjax.nn.int8 import Int8Linear, int8, quantize
from vfjax.sharding import make_mesh, nbytes

ROWS = [[1, 40, -200, 50, 60], [1, 42, 43]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llava")
    checkpoints.upstream_llava_folder(path / "m", 4, vision={"num_hidden_layers": 1})
    return path / "m"


def picture() -> list[np.ndarray]:
    return [np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)]


@given(
    arrays.arrays(
        np.float32, (7, 5), elements=st.floats(-100, 100, width=32, allow_subnormal=False)
    )
)
@settings(max_examples=50, deadline=None)
def test_error_is_half_a_step(kernel: np.ndarray):
    found, scale = quantize(jnp.asarray(kernel))
    assert found.dtype == jnp.int8 and scale.shape == (5,)
    error = np.abs(np.asarray(found, np.float32) * np.asarray(scale) - kernel)
    assert (error <= 0.5001 * np.asarray(scale)).all()


def test_while_it_is_read_or_after(folder):
    """The same model both ways, on one device and on eight; near the one that was stored."""
    plain, processor = converters.load(folder)
    batch = processor(picture(), input_ids=ROWS)
    expected = np.asarray(forward(plain, batch))[batch.mask]
    kernels = sum(isinstance(m, nnx.Linear) for _, m in nnx.iter_modules(plain.llm))
    after = np.asarray(forward(int8(plain), batch))[batch.mask]
    model, _ = converters.load(folder, int8=True)
    np.testing.assert_array_equal(np.asarray(forward(model, batch))[batch.mask], after)
    assert 0 < np.abs(after - expected).max() < 0.03 * np.abs(expected).max()
    found = [m for _, m in nnx.iter_modules(model.llm) if isinstance(m, Int8Linear)]
    assert len(found) == kernels
    assert not any(isinstance(m, nnx.Linear) for _, m in nnx.iter_modules(model.llm))
    assert all(m.kernel.dtype == jnp.int8 and m.scale.dtype == jnp.float32 for m in found)
    sharded, _ = converters.load(folder, int8=True, mesh=make_mesh(2, 4))
    same = jax.tree.map(lambda a, b: bool((a == b).all()), nnx.state(model), nnx.state(sharded))
    assert all(jax.tree.leaves(same))
    tokens = generate_ids(model, batch, max_new_tokens=4)
    assert generate_ids(sharded, batch, max_new_tokens=4) == tokens


@given(
    arrays.arrays(
        np.float32, (1, 2, 8, 3), elements=st.floats(-100, 100, width=32, allow_subnormal=False)
    )
)
@settings(max_examples=50, deadline=None)
def test_error_of_a_key_is_half_a_step(keys: np.ndarray):
    rows = Int8Rows.of(jnp.asarray(keys), 2)
    assert rows.rows.dtype == jnp.int8 and rows.scale.shape == (1, 2, 1, 3)
    error = np.abs(np.asarray(rows.wide(jnp.float32)) - keys)
    assert (error <= 0.5001 * np.asarray(rows.scale)).all()


def test_cache(folder):
    """What is read first is exact; what is read after it is near; on eight devices the same."""
    plain, processor = converters.load(folder)
    model, _ = converters.load(folder, int8_cache=True)
    batch = processor(picture(), input_ids=ROWS)
    logits, cache = model.prefill(batch, batch.read + 8)
    expected, exact = plain.prefill(batch, batch.read + 8)
    np.testing.assert_array_equal(logits, expected)
    assert nbytes(cache.k) < 0.4 * nbytes(exact.k)  # of float32, with heads of 8
    token = jnp.array([40, 41])
    for _ in range(3):
        found, cache = model.next(token, cache)
        expected, exact = plain.next(token, exact)
        off = np.abs(np.asarray(found - expected)).max()
        assert 0 < off < 0.02 * np.abs(np.asarray(expected)).max()
    tokens = generate_ids(model, batch, max_new_tokens=6)
    sharded, _ = converters.load(folder, int8_cache=True, mesh=make_mesh(2, 4))
    assert generate_ids(sharded, batch, max_new_tokens=6) == tokens


def test_is_not_written(folder, tmp_path):
    model, _ = converters.load(folder, int8=True)
    with pytest.raises(InputError, match="int8 weights"):
        converters.export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
