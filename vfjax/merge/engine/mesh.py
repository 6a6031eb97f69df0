"""The merge engine on sharded arrays: the same formulas, under jit, to the same bits.

A tensor is cut into the blocks that `merge` reads one after another, which are spread over the
devices: each runs the same kernel on its blocks. What a formula asks of the whole tensor is found
to the same bits as in `reductions`: sums by the lanes of each block, the rest exactly, by counting.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import DTypeLike

from vfjax.merge.engine.kernels import block_kernel, draw, whole_kernel
from vfjax.merge.engine.merged import Computed, Unmerged
from vfjax.merge.engine.merger import merge
from vfjax.merge.engine.reductions import ALL, Blockwise, order_answer, solve_sum
from vfjax.merge.methods.registry import Array
from vfjax.merge.methods.requests import KEPT, SORTED, Answer, Kept, Request, Sorted, Sum
from vfjax.merge.tensors import block_rows

Arrays = Mapping[str, jax.Array]


def merge_arrays(
    base: Arrays | None,
    members: Mapping[str, Arrays],
    method: str,
    params: Mapping[str, Any],
    mesh: Mesh,
    *,
    dtype: DTypeLike | None = None,
    seed: int = 0,
) -> dict[str, jax.Array]:
    """Merges arrays that lie on a mesh; what `merge` gives, bit for bit on the same platform.

    Random numbers, rows and the order of equal elements are those of the names and axes given
    here: for the bytes of a checkpoint, use its names and shapes. A tensor at a time is spread
    over all devices in float32; methods on whole tensors are run by one device.

    Args:
        base: name -> array on the mesh, or None; see `merge`.
        members: label -> name -> array of that shape.
        method: key of `METHODS`.
        params: the method's parameters.
        mesh: of all the arrays.
        dtype: of the float results; the reference's by default.
        seed: of methods that draw random numbers.

    Returns:
        Name -> array, sharded as the reference's.

    Raises:
        InputError: as `merge`, and what slicing its tensors raises.
    """
    first: Any = base  # arrays can be sliced too, which is all that `merge` asks for
    others: Any = members
    lazy: Any = merge(first, others, method, params, dtype=dtype, seed=seed)
    like = next(iter(members.values())) if base is None else base
    return {
        name: _unmerged(tensor)
        if isinstance(tensor, Unmerged)
        else _Sharded(tensor, mesh).result(like[name].sharding)
        for name, tensor in lazy.items()
    }


def _unmerged(tensor: Unmerged) -> jax.Array:
    arrays: list[Any] = [array for _, array in tensor.sources]
    for i, x in enumerate(arrays):
        if not bool(jnp.array_equal(x, arrays[0])):
            raise tensor.unequal(i)
    return arrays[0]


class _Sharded:
    """A tensor of the result, computed on a mesh."""

    def __init__(self, tensor: Computed, mesh: Mesh):
        self.tensor, self.mesh = tensor, mesh
        self.over = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self.everywhere = NamedSharding(mesh, PartitionSpec())
        self.sources: list[Any] = [array for _, array in tensor.sources]

    def result(self, sharding: jax.sharding.Sharding) -> jax.Array:
        tensor = self.tensor
        if tensor.operation.method.whole:
            out = np.asarray(self._whole())
        else:
            out = _unblocked(self.evaluate(self.answers()), shape=tensor.shape, rows=self.height)
        if not bool(jnp.isfinite(out).all()):
            self._blame()
        return jax.device_put(out, sharding)

    def _whole(self) -> jax.Array:
        """By one device of every process, as SVDs are not spread."""
        operation = self.tensor.operation
        arrays = [jax.device_put(x, self.everywhere).addressable_data(0) for x in self.sources]
        return whole_kernel(arrays, operation.values, **operation.static(self.tensor))

    @property
    def height(self) -> int:
        """Rows of a block."""
        if self.tensor.one_row or not self.tensor.shape:
            return 1
        return block_rows(self.tensor.shape)

    @property
    def _rows(self) -> int:
        one = self.tensor.one_row or not self.tensor.shape
        return 1 if one else self.tensor.shape[0]

    @property
    def count(self) -> int:
        """Number of blocks."""
        return max(1, math.ceil(self._rows / self.height))

    def answers(self, count: int | None = None) -> list[Answer]:
        """As `Computed.answers`."""
        return self.tensor.answers(count, self._answer)

    def _answer(self, tensor: Computed, request: Request, earlier: list[Answer]) -> Answer:
        if isinstance(request, Sorted):
            return SORTED
        if isinstance(request, Kept):
            return KEPT
        if isinstance(request, Sum):
            parts = jax.device_put(self.evaluate(earlier), self.everywhere)
            return solve_sum(request, list(np.asarray(parts)[: self.count]), tensor)
        return order_answer(tensor, request, earlier, self._cuts)

    def _cuts(
        self, tensors: Sequence[Blockwise], step: int, ranks: np.ndarray
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """The answers to `Largest`, found bit by bit by counting what is not smaller."""
        each = [_Sharded(cast(Computed, tensor), self.mesh) for tensor in tensors]
        values = [(one.evaluate(one.answers(step)), one) for one in each]

        def count(bits: np.ndarray, equal: bool, ends: np.ndarray) -> np.ndarray:
            return np.stack(
                [
                    np.asarray(_count(x, one.starts(), bits, ends[i], equal=equal)).astype(np.int64)
                    for i, (x, one) in enumerate(values)
                ]
            )

        total = sum(tensor.size for tensor in tensors)
        everything = np.full((len(tensors), *ranks.shape), ALL)
        found = _bisect(31, ranks, lambda x: count(x, False, everything).sum(0) >= ranks)
        ties = ranks - count(found + np.uint32(1), False, everything).sum(0)
        counts = count(found, True, everything)
        before = np.cumsum(counts, axis=0) - counts
        wanted = ties - before  # of each tensor's equal values, how many lie above the cut
        inside = (wanted > 0) & (wanted < counts)
        last = _bisect(32, wanted, lambda x: count(found, True, x) < wanted)
        ends = np.where(inside, last + np.uint32(1), np.where(wanted > 0, ALL, 0))
        out = found.view(np.float32)
        ends = np.where(found == 0, ALL, ends).astype(np.uint32)
        none = ranks <= 0
        out, ends = np.where(none, np.float32(np.inf), out), np.where(none, np.uint32(0), ends)
        full = ranks >= total
        out, ends = np.where(full, np.float32(0), out), np.where(full, ALL, ends)
        return [(out, ends[i]) for i in range(len(tensors))]

    def starts(self) -> np.ndarray:
        """uint32[blocks]: flat indices of the blocks' first elements."""
        row = self.tensor.size // max(1, self._rows)
        return (np.arange(self._padded_count) * (self.height * row)).astype(np.uint32)

    @property
    def _padded_count(self) -> int:
        return -(-self.count // self.mesh.size) * self.mesh.size

    def evaluate(self, answers: Sequence[Answer]) -> jax.Array:
        """As `Computed.evaluate`, for all blocks: [blocks, ...], with padding."""
        tensor, operation = self.tensor, self.tensor.operation
        block = self.height * (tensor.size // max(1, self._rows))
        return _evaluate(
            self.sources,
            operation.values,
            [each for each in answers if not isinstance(each, Sorted | Kept)],
            self.starts(),
            operation.keys(tensor.name),
            found=tuple(each if isinstance(each, Sorted | Kept) else None for each in answers),
            blocked=(self._padded_count, self.height, self._rows, tensor.padded_size(block)),
            width=tensor.width,
            over=self.over,
            static=tuple(operation.static(tensor).items()),
        )

    def _blame(self) -> None:
        counts = [int(jnp.sum(~jnp.isfinite(x))) for x in self.sources]
        self.tensor.blame(counts)


def _bisect(bits: int, like: np.ndarray, keep: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The largest uint32 for which `keep` holds, bit by bit; 0 if it holds for none."""
    found = np.zeros(like.shape, np.uint32)
    for bit in reversed(range(bits)):
        tried = found | np.uint32(1 << bit)
        found = np.where(keep(tried), tried, found)
    return found


@functools.partial(jax.jit, static_argnames=("found", "blocked", "width", "over", "static"))
def _evaluate(
    sources: Sequence[jax.Array],
    values: Mapping[str, Array],
    answers: Sequence[Answer],
    starts: jax.Array,
    keys: jax.Array,
    *,
    found: tuple[Sorted | Kept | None, ...],
    blocked: tuple[int, int, int, int],
    width: int,
    over: NamedSharding,
    static: tuple[tuple[str, Any], ...],
) -> jax.Array:
    count, height, rows, size = blocked

    def cut(x: jax.Array) -> jax.Array:
        x = x.reshape(rows, -1)
        x = jnp.pad(x, ((0, count * height - rows), (0, 0))).reshape(count, -1)
        return jnp.pad(x, ((0, 0), (0, size - x.shape[1])))

    def one(
        block: tuple[list[jax.Array], jax.Array],
        values: Mapping[str, Array],
        answers: Sequence[Answer],
        keys: jax.Array,
    ) -> jax.Array:
        arrays, start = block
        words = draw(start, keys, arrays[0].size) if dict(static)["method"].random else None
        known: list[Answer] = []
        rest = iter(answers)
        for each in found:
            if each is None:
                known.append(next(rest))
                continue
            x: Any = block_kernel(arrays, values, known, start, words, **dict(static))
            is_sorted = isinstance(each, Sorted)
            known.append(jnp.sort(x.reshape(len(x), -1, width), axis=-1) if is_sorted else x)
        return cast(jax.Array, block_kernel(arrays, values, known, start, words, **dict(static)))

    def local(
        arrays: list[jax.Array],
        starts: jax.Array,
        values: Mapping[str, Array],
        answers: Sequence[Answer],
        keys: jax.Array,
    ) -> jax.Array:
        return jax.lax.map(lambda block: one(block, values, answers, keys), (arrays, starts))

    cuts = [jax.lax.with_sharding_constraint(cut(x), over) for x in sources]
    none = PartitionSpec()
    return jax.shard_map(
        local,
        mesh=over.mesh,
        in_specs=(over.spec, over.spec, none, none, none),
        out_specs=over.spec,
        check_vma=False,
    )(cuts, starts, values, answers, keys)


@functools.partial(jax.jit, static_argnames=("shape", "rows"))
def _unblocked(x: jax.Array, *, shape: tuple[int, ...], rows: int) -> jax.Array:
    """[blocks, size] -> the tensor."""
    row = math.prod(shape) if rows == 1 and len(shape) < 2 else math.prod(shape[1:])
    return x[:, : rows * row].reshape(-1)[: math.prod(shape)].reshape(shape)


@functools.partial(jax.jit, static_argnames=("equal",))
def _count(
    values: jax.Array, starts: jax.Array, bits: jax.Array, ends: jax.Array, *, equal: bool
) -> jax.Array:
    """uint32[m, j]: how many values are at least (or are equal to) each cut and before its end."""
    found = jax.lax.bitcast_convert_type(values, jnp.uint32)  # [blocks, m, size]
    index = starts[:, None] + jnp.arange(values.shape[-1], dtype=jnp.uint32)

    def one(m: int, j: int) -> jax.Array:
        x, bit = found[:, m], bits[m, j]
        there = (x == bit if equal else x >= bit) & (index < ends[m, j])
        return there.sum(dtype=jnp.uint32)

    return jnp.stack(
        [jnp.stack([one(m, j) for j in range(bits.shape[1])]) for m in range(len(bits))]
    )
