"""Meshes, and where parameters and batches lie on them.

Parameters name logical axes; `RULES` maps those to mesh axes. A strategy is a mesh's shape: `data`
devices hold copies and share the rows of a batch, `fsdp` devices share the rows and each parameter,
which is gathered where it is used, `model` devices share each product (tensor parallelism). Meshes
are `Auto`: the compiler propagates shardings and inserts the collectives.
"""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from vfjax.errors import InputError, counted

T = TypeVar("T")

Rules = Mapping[str, str | tuple[str, ...] | None]
"""Logical axis of a parameter -> mesh axis, or several; None, or one that the mesh lacks, keeps it
whole."""

RULES: Rules = {
    "embed": "fsdp",
    "heads": "model",
    "mlp": "model",
    "vocab": "model",
}

ODD_VOCAB: Rules = {"embed": ("model", "fsdp")}
"""For a vocabulary that the mesh does not divide, as where tokens were added: tables are divided by
features, which holds as little on each device as padding the vocabulary would."""

AXES = ("data", "fsdp", "model")

Overrides = Sequence[tuple[str, Rules]]
"""(Regular expression found in a parameter's name, rules in place of `RULES`), the first that fits:
(("^branches/", {}),) keeps all encoders and connectors whole on every device."""


def make_mesh(data: int = 1, model: int = 1, fsdp: int = 1) -> Mesh:
    """A mesh of data x fsdp x model devices, of all processes.

    Raises:
        InputError: the product is not the number of devices.
    """
    if data * fsdp * model != jax.device_count():
        raise InputError(
            "mesh",
            found=f"data={data} x model={model} x fsdp={fsdp}",
            expected=counted(jax.device_count(), "device"),
            fix="choose axes whose product is the number of devices",
        )
    types, processes = (AxisType.Auto,) * len(AXES), jax.process_count()
    across = math.gcd(data, processes)
    if processes > 1 and across in (data, processes) and fsdp % (processes // across) == 0:
        # A process's devices are a block of the rows' axes, so that it reads its own rows alone; on
        # a pod the devices' own order follows the torus.
        devices = mesh_utils.create_hybrid_device_mesh(
            (data // across, fsdp // (processes // across), model),
            (across, processes // across, 1),
            process_is_granule=True,
            allow_split_physical_axes=True,
        )
        return Mesh(devices, AXES, axis_types=types)
    grid = mesh_utils.create_device_mesh((data, fsdp, model), allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=types)


def row_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """The mesh axes that share a batch's rows: all but `model`."""
    return tuple(axis for axis in mesh.axis_names if axis != "model")


def row_shards(mesh: Mesh | AbstractMesh) -> int:
    """How many devices, or groups of them, share a batch's rows."""
    return math.prod(mesh.shape[axis] for axis in row_axes(mesh))


def rows_over(mesh: Mesh | AbstractMesh, n: int) -> tuple[str, ...] | None:
    """The mesh axes that n rows lie on: `row_axes` where they divide them, or none."""
    return row_axes(mesh) if n % row_shards(mesh) == 0 else None


def by_row(x: jax.Array) -> jax.Array:
    """Activations [b, ...] with rows over `row_axes`, where these share parameters and divide b.

    Without being told, the compiler may divide features as the parameters are, and reduce each
    product over the devices in place of gathering its parameter.
    """
    mesh = jax.typeof(x).sharding.mesh
    over = rows_over(mesh, len(x))
    if mesh.shape.get("fsdp", 1) == 1 or over is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(over)))


def by_token(mesh: Mesh) -> NamedSharding:
    """Activations [b, t, d] with rows over `row_axes` and tokens over `model`.

    Sequence parallelism (arXiv 2205.05198): between an LLM's blocks a device of a product's group
    keeps its share of the tokens, which counts where rows are long and the backward pass needs
    them.
    """
    return NamedSharding(mesh, PartitionSpec(row_axes(mesh), "model"))


def divides(sharding: NamedSharding, shape: Sequence[int]) -> bool:
    """Whether a shape can lie so: every axis a multiple of its devices."""
    axes = [(x,) if isinstance(x, str) else x or () for x in sharding.spec]
    parts = [math.prod(sharding.mesh.shape[axis] for axis in each) for each in axes]
    return all(n % part == 0 for n, part in zip(shape, parts, strict=False))


def param_sharding(
    name: str,
    variable: nnx.Variable,
    mesh: Mesh,
    overrides: Overrides = (),
) -> NamedSharding:
    """Where a parameter lies, by its `axes` metadata.

    Args:
        name: of the parameter, such as "branches/clip/encoder/blocks/0/attn/q/kernel".
        variable: its shape and axes.
        mesh: where.
        overrides: see `Overrides`.

    Raises:
        InputError: an axis does not divide, named with the parameter, or an override names a mesh
            axis that no mesh has, or one mesh axis for two axes of the parameter.
    """
    pattern, rules = next(((p, each) for p, each in overrides if re.search(p, name)), ("", RULES))
    for named in itertools.chain(*map(_several, rules.values())):
        if named not in AXES:
            raise InputError(
                f"shard {pattern!r}",
                found=f"mesh axis {named!r}",
                expected=", ".join(AXES),
                fix="correct it; {} keeps parameters whole",
            )
    spec: list[str | tuple[str, ...] | None] = []
    for size, axis in zip(variable.shape, variable.axes, strict=True):
        over = tuple(each for each in _several(rules.get(axis)) if each in mesh.shape)
        parts = math.prod(mesh.shape[each] for each in over)
        if size % parts:
            if axis == "vocab":
                return param_sharding(name, variable, mesh, [("", ODD_VOCAB)])
            raise InputError(
                name,
                found=f"axis {axis!r} of size {size}",
                expected=f"a multiple of {parts}, the mesh's {' x '.join(over)}",
                fix="choose a mesh that divides it",
            )
        spec.append(over[0] if len(over) == 1 else over or None)
    used = [each for over in spec for each in _several(over)]
    if twice := next((each for each in used if used.count(each) > 1), None):
        raise InputError(
            f"shard {pattern!r}: {name}",
            found=f"mesh axis {twice!r} for two of the axes {', '.join(map(str, variable.axes))}",
            expected="one of the parameter's axes for each of the mesh's",
            fix="leave one out",
        )
    return NamedSharding(mesh, PartitionSpec(*spec))


def _several(over: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """A rule's mesh axes."""
    return (over,) if isinstance(over, str) else over or ()


def mesh_of(tree: object) -> Mesh | None:
    """The mesh that a tree's arrays lie on; None on a single device without one."""
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding):
            assert isinstance(sharding.mesh, Mesh)
            return sharding.mesh
    return None


def place(tree: T, mesh: Mesh | None) -> T:
    """Puts a tree of host arrays on the mesh, first axis over `row_axes` where they divide it.

    Every process passes the same whole arrays. Arrays that lie on a mesh already stay as they are.
    Without a mesh all go to the default device.
    """
    if mesh is None:
        return jax.device_put(tree)

    def put(x: np.ndarray | jax.Array) -> jax.Array:
        if isinstance(x, jax.Array) and isinstance(x.sharding, NamedSharding):
            return x
        over = rows_over(mesh, x.shape[0]) if x.ndim else None
        sharding = NamedSharding(mesh, PartitionSpec(over) if x.ndim else PartitionSpec())
        host = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree)


def nbytes(tree: object) -> int:
    """Bytes of all arrays of a tree, as if unsharded."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
