"""States as objects, on a store in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from jax.sharding import NamedSharding, PartitionSpec

from vfjax.sharding import make_mesh
from vfjax.train import objects
from vfjax.train.objects import Objects, chunk


@pytest.fixture
def store() -> tensorstore.KvStore:
    return tensorstore.KvStore.open("memory://states/").result()


def like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def names(store: tensorstore.KvStore) -> list[str]:
    return [key.decode() for key in store.list().result()]


def test_a_state_is_read_on_another_mesh(store, monkeypatch):
    monkeypatch.setattr(objects, "CHUNK", 128)
    values = np.arange(8 * 16, dtype=np.float32).reshape(8, 16)
    rows = NamedSharding(make_mesh(data=2, model=4), PartitionSpec("model", "data"))
    states = Objects(store, 2)
    state = {
        "a/w": jax.device_put(values, rows),
        "half": jnp.ones((3, 5), jnp.bfloat16),
        "zero": jnp.zeros(4),  # what zarr takes for absent
        "step": jnp.int32(9),
    }
    states.save(9, state)
    states.close()
    columns = NamedSharding(make_mesh(model=8), PartitionSpec(None, "model"))
    state["a/w"] = jax.device_put(values, columns)
    found = Objects(store, 2).restore({name: like(x) for name, x in state.items()})
    for name, x in state.items():
        assert found[name].sharding == x.sharding and found[name].dtype == x.dtype
        assert np.array_equal(found[name], x)


def test_what_is_not_whole_is_no_state(store):
    """Nor is it left: another run, of other processes, may write the same step."""
    states, arrays = Objects(store, 2), {"x": jnp.arange(4.0)}
    for step in (1, 2, 3):
        states.save(step, arrays)
    states.close()
    assert {name.split("/")[0] for name in names(store)} == {"2", "3"}
    store.write("3/done-0-of-1", None).result()
    for key in ("4/done-0-of-2", "5/done-0-of-2", "5/done-1-of-3", "others/x"):
        store.write(key, b"").result()
    assert Objects(store, 2).step == 2
    assert {name.split("/")[0] for name in names(store)} == {"2", "others"}


def test_a_state_that_does_not_fit_or_lacks_a_part(store):
    states = Objects(store, 1)
    states.save(1, {"x": jnp.arange(4.0)})
    states.close()
    states = Objects(store, 1)
    for name, x, said in (
        ("y", jnp.arange(4.0), "does not exist"),
        ("x", jnp.arange(5.0), "domain"),
        ("x", jnp.arange(4), "float32"),
    ):
        with pytest.raises(ValueError, match=said):
            states.restore({name: like(x)})
    store.write("1/x/0", None).result()
    with pytest.raises(ValueError, match="is missing"):
        states.restore({"x": like(jnp.arange(4.0))})


@pytest.mark.parametrize(
    ("shard", "expected"), [((), ()), ((6, 4), (3, 4)), ((7, 4), (1, 4)), ((2, 99), (1, 99))]
)
def test_objects_have_rows_that_divide_a_shard(monkeypatch, shard, expected):
    monkeypatch.setattr(objects, "CHUNK", 64)
    assert chunk(shard, 4) == expected
