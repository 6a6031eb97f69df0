"""A checkpoint's tensors -> sharded arrays, by blocks of rows that threads read."""

import functools
import math
import os
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from types import EllipsisType

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from converters.files import paths
from converters.files.reader import FileTensor, TorchTensor
from converters.params.table import Rule
from vfjax.merge import LazyTensor, aligned
from vfjax.merge.tensors import count_nonfinite, has_nonfinite, nonfinite_error
from vfjax.nn.int8 import quantize
from vfjax.sharding import Overrides, param_sharding

THREADS = min(8, os.cpu_count() or 1)
"""That read weights and lay them out."""

BLOCK = 4 << 20
"""Bytes that a thread reads at a time, and at least `ROWS` rows."""

ROWS = 256

FAR_ROWS = 32
"""The same of a bucket's file: of a bfloat16, as many as a line of the processor's cache has."""

TILE = 512
"""Rows and columns that are transposed at a time: they stay in the processor's cache."""

LINE = 64
"""Bytes of a line of it."""

AHEAD = 16 << 20
"""Bytes of parameters that are read at a time, and at least two of them."""

MANY = 64
"""Parameters that are at most: where a read waits for a bucket, small ones do so together."""

Spans = tuple[tuple[int, int], ...]
"""Of a shard, on each axis: the first index, and the one behind the last."""

Shards = Mapping[Spans, np.ndarray]


def fill(
    params: dict[str, nnx.Variable],
    tensors: Mapping[str, tuple[Mapping[str, LazyTensor], Rule]],
    mesh: Mesh | None,
    dtype: np.dtype | None,
    progress: Callable[[int], object] = lambda nbytes: None,
    narrow: Collection[str] = (),
    shard: Overrides = (),
) -> None:
    """Puts each parameter on the devices, by its component's tensors and its rule.

    Threads copy rows to where they lie in this process's shards, which become the arrays. Rows that
    no shard of this process has are not read, the others once. Besides the arrays the host holds a
    block a thread and, on their way to the devices, two parameters or `AHEAD` bytes of small ones;
    on CPU they are there already.

    Args:
        params: by their paths; what they hold are shapes.
        tensors: path -> tensors by name, and the rule that makes the parameter of them.
        mesh: where parameters are sharded; None: the default device.
        dtype: of the parameters; None keeps the stored ones.
        progress: called with the bytes of each parameter.
        narrow: paths of those that become int8, and a scale beside them.
        shard: see `vfjax.sharding.Overrides`.
    """
    pending: deque[tuple[str, Callable[[], jax.Array]]] = deque()

    def finish() -> None:
        name, array = pending.popleft()
        value = array() if dtype is None else array().astype(dtype)
        if name in narrow:
            value, scale = quantize(value)
            axes = params[name].axes[1:]
            params[name.removesuffix("kernel") + "scale"] = nnx.Param(scale, axes=axes)
        params[name] = params[name].replace(value)
        progress(value.nbytes)

    def ahead() -> int:
        return sum(math.prod(params[name].shape) * 4 for name, _ in pending)

    files = [
        x.path for found, _ in tensors.values() for x in found.values() if isinstance(x, FileTensor)
    ]
    with ThreadPoolExecutor(paths.threads(files, THREADS)) as pool:
        for name, (sources, rule) in tensors.items():
            sharding = None if mesh is None else param_sharding(name, params[name], mesh, shard)
            pending.append((name, start(pool, sources, rule, params[name].shape, sharding)))
            while len(pending) > 1 and (len(pending) > MANY or ahead() > AHEAD):
                finish()
        while pending:
            finish()


def start(
    pool: Executor,
    tensors: Mapping[str, LazyTensor],
    rule: Rule,
    shape: tuple[int, ...],
    sharding: NamedSharding | None,
) -> Callable[[], jax.Array]:
    """Lets threads read a parameter; what it returns waits for it."""
    sources = [(tensors[one.source], one) for one in rule.each(shape)]
    dtype = np.result_type(*(tensor.dtype for tensor, _ in sources))
    if sharding is None:
        places = {spans((slice(None),) * len(shape), shape)}
    else:
        indices = sharding.addressable_devices_indices_map(shape).values()
        places = {spans(index, shape) for index in indices}
    shards = {place: empty(place, dtype) for place in places}
    jobs = [pool.submit(job) for tensor, one in sources for job in copies(tensor, one, shards)]

    def array() -> jax.Array:
        for job in jobs:
            job.result()
        if sharding is None:
            (whole,) = shards.values()
            return jax.block_until_ready(jax.device_put(whole))
        value = jax.make_array_from_callback(
            shape, sharding, lambda index: shards[spans(index, shape)]
        )
        return jax.block_until_ready(value)

    return array


def spans(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> Spans:
    """Where a shard lies."""
    assert index is not None, "which only its type allows"
    return tuple(one.indices(size)[:2] for one, size in zip(index, shape, strict=True))


def empty(place: Spans, dtype: np.dtype) -> np.ndarray:
    """An array for a shard, aligned so that JAX on CPU need not copy it."""
    shape = [high - low for low, high in place]
    return aligned(math.prod(shape), dtype).reshape(shape)


def copies(tensor: LazyTensor, rule: Rule, shards: Shards) -> Iterator[Callable[[], None]]:
    """The pieces of work that bring what the shards have of a tensor into them."""
    by_rows: dict[tuple[int, int], list[tuple[tuple[slice, ...], np.ndarray]]] = {}
    for place, array in shards.items():
        if rule.row is not None:
            low, high = place[0]
            if not low <= rule.row < high:
                continue
            place, array = place[1:], array[rule.row - low]
        if not tensor.shape:
            yield functools.partial(copy, tensor, rule.source, ..., [((), array)])
            continue
        rows, *rest = (place[i] for i in np.argsort(rule.perm)) if rule.perm else place
        columns = tuple(slice(*each) for each in rest)
        by_rows.setdefault(rows, []).append((columns, rule.to_source(array)))
    for (low, high), into in by_rows.items():
        part = tensor.shape[0] // rule.part[1] * rule.part[0]
        size = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
        far = isinstance(tensor, FileTensor) and paths.in_bucket(tensor.path)
        block, least = (paths.PIECE, FAR_ROWS) if far else (BLOCK, ROWS)
        count = max(block // max(size, 1), least)
        for start in range(low, high, count):
            stop = min(start + count, high)
            views = [(columns, array[start - low : stop - low]) for columns, array in into]
            span = slice(part + start, part + stop)
            yield functools.partial(copy, tensor, rule.source, span, views)


def copy(
    tensor: LazyTensor,
    name: str,
    rows: slice | EllipsisType,
    into: Collection[tuple[tuple[slice, ...], np.ndarray]],
) -> None:
    """Reads rows of a tensor, and copies of each the columns that an array takes.

    Raises:
        InputError: there is a NaN or infinity in them; it names the tensor.
    """
    block = tensor.peek(rows) if isinstance(tensor, FileTensor) else np.asarray(tensor[rows])
    if has_nonfinite(block):  # while it is in the processor's cache
        if isinstance(tensor, FileTensor | TorchTensor):
            name = f"{tensor.path}: {tensor.name}"
        raise nonfinite_error(name, tensor, count_nonfinite(tensor))
    for columns, array in into:
        part = block[:, *columns] if block.ndim else block
        if part.ndim == 2 and array.strides[0] < array.strides[1]:
            transpose(part, array)
        else:
            np.copyto(array, part)


def transpose(source: np.ndarray, into: np.ndarray) -> None:
    """Copies one matrix to another, in whose memory the columns are rows.

    By way of tiles whose rows are a line more apart than they are long: rows that are a power of
    two apart fall on the same lines of a cache, which takes twice the time.
    """
    pad = LINE // source.itemsize
    scratch = np.empty((TILE, TILE + pad), source.dtype)
    for i in range(0, source.shape[0], TILE):
        for j in range(0, source.shape[1], TILE):
            part = source[i : i + TILE, j : j + TILE]
            tile = scratch[: part.shape[0], : part.shape[1]]
            np.copyto(tile, part)
            np.copyto(into[i : i + TILE, j : j + TILE], tile)
