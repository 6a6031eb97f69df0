"""The least that a program moves and computes, and its costliest lines."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from experiments.tasks.floor import costliest, moved, operations
from vfjax.sharding import make_mesh

TEXT = """HloModule jit_f, is_scheduled=true

FileNames
1 "/home/me/run.py"
2 "/home/me/vfjax/llm/llama.py"
3 "/home/me/flax/nnx/linear.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=26 end_line=26 column=2 end_column=2}
2 {file_name_id=2 function_name_id=1 line=165 end_line=165 column=23 end_column=23}
3 {file_name_id=3 function_name_id=1 line=400 end_line=400 column=23 end_column=23}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}

ENTRY %main {
  %a = f32[4] fusion(%x), metadata={op_name="jit(f)/dot_general" stack_frame_id=3}, \
backend_config={"estimated_cycles":"700"}
  %b = f32[4] fusion(%x), metadata={op_name="jit(f)/dot_general" stack_frame_id=2}, \
backend_config={"estimated_cycles":"50"}
  %c = f32[4] copy(%x), backend_config={"estimated_cycles":"900"}
  %d = f32[4] add(%x), metadata={op_name="jit(f)/add" stack_frame_id=1}, \
backend_config={"estimated_cycles":"3"}
}
"""


def test_costliest_lines():
    """A layer of another package counts to the line that calls it."""
    assert costliest(TEXT) == [
        ("made by the compiler", 900),
        ("vfjax/llm/llama.py:165 dot_general", 750),
        ("add", 3),
    ]
    assert costliest("HloModule jit_f") == []


def test_operations():
    """Products in loops and on each device of a `shard_map`; convolutions by their groups."""
    x, w = jnp.ones((4, 8)), jnp.ones((8, 8))
    once = 2 * 4 * 8 * 8
    assert operations(jax.make_jaxpr(lambda x, w: x @ w)(x, w), 1) == once
    looped = jax.make_jaxpr(lambda x, w: jax.lax.scan(lambda c, _: (c @ w, None), x, None, 3)[0])
    assert operations(looped(x, w), 2) == 3 * once / 2
    mesh, spec = make_mesh(8), PartitionSpec("data")
    shared = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(spec, None), out_specs=spec)
    assert operations(jax.make_jaxpr(shared)(jnp.ones((32, 8)), w), 8) == once
    picture, kernel = jnp.ones((1, 8, 8, 6)), jnp.ones((3, 3, 1, 6))

    def depthwise(x, k):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, k, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=6
        )

    assert operations(jax.make_jaxpr(depthwise)(picture, kernel), 1) == 2 * 64 * 6 * 9


def test_bytes_moved():
    """Rows of a table, the written part of a buffer, shards; nothing of what is not used."""
    mesh = make_mesh(8)
    whole, shared = (NamedSharding(mesh, PartitionSpec(*x)) for x in ((), ("data",)))

    def step(table, ids, weight, cache, unused, handed):
        row = table[ids] @ weight
        return jax.lax.dynamic_update_slice(cache, row, (0, 0)), row, handed

    shapes = ((100, 8), (2,), (8, 8), (64, 8), (50,), (50,))
    dtypes = ("float32", "int32", *("float32",) * 4)
    args = [jnp.zeros(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    given = [whole, whole, shared, whole, whole, whole]
    found = moved(jax.make_jaxpr(step)(*args), given, [whole] * 3)
    rows, ids, weight, cache, written, out = 64, 8, 256 / 8, 64 * 8 * 4, 64, 64
    assert found == rows + ids + weight + cache + written + out
