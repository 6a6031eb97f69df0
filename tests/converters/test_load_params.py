"""Tensors by blocks of rows: what lands where, what is read, and how much the host holds."""

import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import converters
from converters import load_params
from converters.files.reader import FileTensor
from converters.params.table import CONV, TRANSPOSE, Rule
from tests.checkpoints import llama_folder
from vfjax import InputError
from vfjax.sharding import make_mesh

MESHES = [None, (4, 2, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]

ARRAYS = {
    "dense": np.arange(24 * 40, dtype=np.float32).reshape(24, 40),
    "both": np.arange(48 * 16, dtype=np.float32).reshape(48, 16),
    "conv": np.arange(16 * 3 * 2 * 5, dtype=np.float32).reshape(16, 3, 2, 5),
    "bias": np.arange(24, dtype=np.float32),
    "scale": np.float32(2.5)[...],
    **{f"expert.{i}": np.arange(8 * 24, dtype=np.float32).reshape(8, 24) + i for i in range(8)},
}

PARAMS: dict[str, tuple[Rule, tuple[str | None, ...], np.ndarray]] = {
    "kernel": (Rule("dense", "kernel", TRANSPOSE), ("embed", "heads"), ARRAYS["dense"].T),
    "back": (Rule("dense", "back", TRANSPOSE), ("mlp", "embed"), ARRAYS["dense"].T),
    "embed": (Rule("dense", "embed"), ("vocab", "embed"), ARRAYS["dense"]),
    "half": (Rule("both", "half", TRANSPOSE, (1, 3)), ("embed", "mlp"), ARRAYS["both"][16:32].T),
    "conv": (Rule("conv", "conv", CONV), (None, None, None, "mlp"), ARRAYS["conv"].transpose(CONV)),
    "bias": (Rule("bias", "bias"), ("heads",), ARRAYS["bias"]),
    "scale": (Rule("scale", "scale"), (), ARRAYS["scale"]),
    "experts": (
        Rule("expert.{}", "experts", TRANSPOSE, stack=True),
        ("mlp", "embed", None),
        np.stack([ARRAYS[f"expert.{i}"].T for i in range(8)]),
    ),
}
"""Path -> rule, axes, values; sizes that no tile or block divides."""


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and tiles of which these tensors have several."""
    for name, value in {"BLOCK": 64, "ROWS": 7, "TILE": 5}.items():
        monkeypatch.setattr(load_params, name, value)


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_each_value_is_where_it_belongs(small: None, sizes: Any, dtype: Any):
    mesh = None if sizes is None else make_mesh(*sizes)
    params = {
        name: nnx.Param(jnp.zeros(values.shape), axes=axes)
        for name, (_, axes, values) in PARAMS.items()
    }
    seen: list[int] = []
    tensors = {name: (ARRAYS, rule) for name, (rule, *_) in PARAMS.items()}
    load_params.fill(params, tensors, mesh, dtype and np.dtype(dtype), seen.append)
    for name, (_, _, values) in PARAMS.items():
        array = params[name][...]
        assert array.dtype == (dtype or np.float32)
        np.testing.assert_array_equal(array, values.astype(array.dtype), err_msg=name)
        assert len(array.sharding.device_set) == (8 if mesh else 1)
    assert seen == [params[name][...].nbytes for name in PARAMS]


def spy(monkeypatch: pytest.MonkeyPatch, see: Callable[[np.ndarray], object]) -> None:
    """Shows what is read of files."""
    get = FileTensor.__getitem__

    def seen(tensor: FileTensor, index: Any) -> np.ndarray:
        found = get(tensor, index)
        see(found)
        return found

    monkeypatch.setattr(FileTensor, "__getitem__", seen)


@pytest.mark.parametrize("sizes", MESHES)
def test_each_byte_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None, sizes: Any
):
    llama_folder(tmp_path)
    read: list[int] = []
    spy(monkeypatch, lambda block: read.append(block.nbytes))
    mesh = None if sizes is None else make_mesh(*sizes)
    model, _ = converters.load(tmp_path, mesh=mesh)
    assert len(read) > 100
    assert sum(read) == sum(x.nbytes for x in jax.tree.leaves(nnx.state(model)))


def test_a_shard_reads_its_rows_alone(small: None):
    """Of a process that has one of eight devices."""
    mesh = make_mesh(model=8)
    tensor, read = ARRAYS["dense"], []

    class Seen:
        shape, dtype = tensor.shape, tensor.dtype

        def __getitem__(self, rows: slice) -> np.ndarray:
            read.append((rows.start, rows.stop))
            return tensor[rows]

    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "model"))
    index = sharding.devices_indices_map((40, 24))[mesh.devices.flat[2]]
    place = load_params.spans(index, (40, 24))
    shard = load_params.empty(place, tensor.dtype)
    for copy in load_params.copies(Seen(), Rule("dense", "kernel", TRANSPOSE), {place: shard}):
        copy()
    np.testing.assert_array_equal(shard, tensor[6:9].T)
    assert read == [(6, 9)]


@pytest.mark.parametrize(("ahead", "held"), [(0, 2), (1 << 30, 21)])
def test_the_host_holds_two_parameters_or_small_ones_and_a_block_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None, ahead: int, held: int
):
    monkeypatch.setattr(load_params, "AHEAD", ahead)
    llama_folder(tmp_path)
    live: list[weakref.ref[np.ndarray]] = []
    blocks, waiting, most = [], 0, []

    def see(block: np.ndarray) -> None:
        live.append(weakref.ref(block))
        blocks.append(sum(ref() is not None for ref in live))

    start = load_params.start

    def started(*args: Any) -> Callable[[], jax.Array]:
        nonlocal waiting
        wait, waiting = start(*args), waiting + 1
        most.append(waiting)

        def array() -> jax.Array:
            nonlocal waiting
            found, waiting = wait(), waiting - 1
            return found

        return array

    spy(monkeypatch, see)
    monkeypatch.setattr(load_params, "start", started)
    converters.load(tmp_path, dtype="bfloat16", mesh=make_mesh(4, 2))
    assert len(most) == 21
    assert max(most) == held
    assert max(blocks) <= load_params.THREADS


def test_a_file_cut_short_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Is an error, not a bus error as of a mapped file."""
    llama_folder(tmp_path)
    check = load_params.param_sharding

    def cut(*args: Any) -> Any:
        os.truncate(tmp_path / "model.safetensors", 4096)
        return check(*args)

    monkeypatch.setattr(load_params, "param_sharding", cut)
    with pytest.raises(InputError, match="found 4096 bytes, expected .*copy it"):
        converters.load(tmp_path, mesh=make_mesh(4, 2))
