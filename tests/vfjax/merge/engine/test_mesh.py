import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.vfjax.merge.families import BF16, arguments, family
from vfjax import InputError
from vfjax.merge import METHODS, merge, merge_arrays
from vfjax.merge import tensors as lazy

pytestmark = pytest.mark.usefixtures("optimised")

VARIANTS = [
    ("ties", {"trim": "model", "vote": "plain"}),
    ("ties", {"rescale": "norm", "density": (0.3, 0.8)}),
    ("breadcrumbs", {"trim": "model", "gamma": 0.1}),
    ("dare_ties", {"rescale": "norm"}),
    ("della", {"rescale": "norm"}),
    ("nuslerp", {"flatten": False}),
    ("nuslerp", {"flatten": False, "row_wise": True}),
    ("model_stock", {"filter_wise": True}),
]


@pytest.mark.parametrize("method,options", [*((name, {}) for name in METHODS), *VARIANTS])
def test_sharded_arrays_under_jit_give_the_bytes_of_the_stream(method, options, monkeypatch):
    monkeypatch.setattr(lazy, "BLOCK", 256)  # more blocks than devices, the last one shorter
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    over = NamedSharding(mesh, PartitionSpec("data", "model"))
    count, params = arguments(method)
    params |= options
    shapes = {"w": (104, 24)}
    if options.get("trim") == "model":
        shapes["z"] = (16, 24)  # jax.tree.map sorts names
    models = [{} for _ in range(count + 1)]
    for seed, (name, shape) in enumerate(shapes.items()):
        base, members = family(count, n=shape[0] * shape[1], seed=seed)
        for model, x in zip(models, [base, *members], strict=True):
            model[name] = x.reshape(shape)
    base, *members = models
    named = {f"m{i}": member for i, member in enumerate(members)}
    arrays = jax.tree.map(lambda x: jax.device_put(x, over), (base, named))
    expected = merge(base, named, method, params)
    result = merge_arrays(*arrays, method, params, mesh)
    for name in shapes:
        assert result[name].sharding == over
        assert np.asarray(result[name]).tobytes() == expected[name][...].tobytes()
        assert result[name].dtype == BF16 and not np.array_equal(result[name], base[name])


def test_arrays_that_do_not_merge():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    one = {"w": jax.numpy.ones((8, 2)), "steps": jax.numpy.arange(3)}
    nan = one | {"w": one["w"].at[3, 1].set(np.nan)}
    with pytest.raises(InputError, match="member 'b': w: found 1 NaN or infinite of 16"):
        merge_arrays(None, {"a": one, "b": nan}, "linear", {"weights": (1, 1)}, mesh)
    other = one | {"steps": one["steps"] + 1}
    with pytest.raises(InputError, match="member 'b': steps: found int32 values that differ"):
        merge_arrays(None, {"a": one, "b": other}, "linear", {"weights": (1, 1)}, mesh)
