"""A merge method with its parameters bound, which the tensors that use both share."""

import dataclasses
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vfjax.merge.engine import kernels
from vfjax.merge.engine.reductions import Blockwise, RankGroup
from vfjax.merge.methods.registry import Array, Flags, Method, Numbers, Params
from vfjax.merge.methods.requests import KEPT, SORTED, Answer, Request


class Masks:
    """Answers to `Kept`, as bits, from a tensor's first pass to its last; the oldest go first.

    Attributes:
        room: elements whose bits are held; 32 MiB by default.
    """

    def __init__(self, room: int = 1 << 28) -> None:
        self.room = room
        self._bits: OrderedDict[Hashable, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> np.ndarray | None:
        """The masks of a block, if they are still there."""
        with self._lock:
            bits = self._bits.get(key)
        return None if bits is None else np.unpackbits(bits, axis=-1).view(np.bool_)

    def put(self, key: Hashable, masks: np.ndarray) -> None:
        """Holds a block's masks, bool[m, size], if their size is a multiple of 8."""
        if masks.shape[-1] % 8:
            return
        bits = np.packbits(masks, axis=-1)
        with self._lock:
            self._bits[key] = bits
            self.room -= 8 * bits.size
            while self.room < 0:
                self._free(next(iter(self._bits)))

    def drop(self, key: Hashable) -> None:
        """Forgets a block."""
        with self._lock:
            if key in self._bits:
                self._free(key)

    def _free(self, key: Hashable) -> None:
        self.room += 8 * self._bits.pop(key).size


@dataclasses.dataclass(eq=False)
class Operation:
    """A method with its parameters, shared by the tensors of a merge that use both.

    Attributes:
        method: what to compute.
        values: its numbers.
        flags: its switches.
        seed: of random methods.
        has_base: the first source is the base.
        accounts: its tensors count what their sources did to the base, as they are merged.
        group: its tensors, and those of other operations that are ranked with them.
        masks: of all tensors of the merge.
        params: numbers and switches together.
    """

    method: Method
    values: Numbers
    flags: Flags
    seed: int
    has_base: bool
    accounts: bool
    group: RankGroup
    masks: Masks

    def __post_init__(self) -> None:
        self.params: Params = {**self.values, **dict(self.flags)}
        self.lock = threading.RLock()
        self._recent: OrderedDict[str, np.ndarray] = OrderedDict()
        self._requests: dict[tuple[object, ...], Request | None] = {}
        cpu = jax.local_devices(backend="cpu")[0]
        self._values = jax.device_put(self.values, cpu)

    def run(
        self,
        arrays: Sequence[np.ndarray],
        answers: Sequence[Answer | None],
        start: int,
        tensor: Blockwise,
        draws: bool = True,
    ) -> np.ndarray:
        """The formula on a block of a tensor that starts at a flat index, or on all of it.

        Args:
            arrays: the sources' blocks, flat.
            answers: to its first requests; None for those that are needed no more.
            start: the flat index.
            tensor: whose block it is.
            draws: what is computed may be random.
        """
        if self.method.whole:
            return np.asarray(kernels.whole_kernel(arrays, self._values, **self.static(tensor)))
        first, known, words = np.uint32(start), tuple(answers), None
        if self.method.random and draws:
            words = kernels.draw(first, self.keys(tensor.name), size=arrays[0].size)
        found = kernels.block_kernel(
            arrays, self._values, known, first, words, **self.static(tensor)
        )
        return np.stack(found) if isinstance(found, tuple) else np.asarray(found)

    @property
    def is_joint(self) -> bool:
        """The tensors of its group are ranked as one."""
        return ("trim", "model") in self.flags

    def static(self, tensor: Blockwise) -> dict[str, Any]:
        """What a kernel is compiled for."""
        return {
            "method": self.method,
            "flags": self.flags,
            "has_base": self.has_base,
            "dtype": tensor.dtype,
            "width": tensor.width if self.method.rows else None,
            "is_vector": len(tensor.shape) < 2,
        }

    def keys(self, name: str) -> np.ndarray:
        """A tensor's keys of random numbers, uint32[ceil(K / 2), 2]; see `kernels.draw`."""
        count = len(self.group.tensors[0].sources) - self.has_base
        words = (f"{self.seed}/{i}/{name}".encode() for i in range((count + 1) // 2))
        digests = [hashlib.sha256(word).digest() for word in words]
        return np.stack([np.frombuffer(digest[:8], np.uint32) for digest in digests])

    def request(self, tensor: Blockwise, answers: Sequence[Answer]) -> Request | None:
        """What the method asks for after `answers`, None at its end; nothing is computed.

        Its arrays are left out, as they depend on the block. What is left depends on the step and
        on what the kernel is compiled for.
        """
        static = self.static(tensor)
        del static["dtype"]
        key = (len(answers), *static.values())
        with self.lock:
            if key not in self._requests:
                self._requests[key] = self._trace(tensor, answers, static)
            return self._requests[key]

    def _trace(
        self, tensor: Blockwise, answers: Sequence[Answer], static: Mapping[str, Any]
    ) -> Request | None:
        found: list[Request | jax.Array] = []

        def look(arrays: Sequence[Array], known: Sequence[Answer]) -> int:
            words = jnp.zeros((len(arrays), size), jnp.uint32)
            found.append(kernels.advance(arrays, self.values, known, 0, words, **static))
            return 0

        size = tensor.padded_size(tensor.width)
        arrays = [jax.ShapeDtypeStruct((size,), each.dtype) for _, each in tensor.sources]
        members = len(arrays) - self.has_base
        rows = jax.ShapeDtypeStruct((members, size // tensor.width, tensor.width), np.float32)
        masks = jax.ShapeDtypeStruct((members, size), np.bool_)
        known = [rows if x is SORTED else masks if x is KEPT else x for x in answers]
        jax.eval_shape(look, arrays, known)
        return kernels.bare(found[0])

    def recent(self, name: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """The last two whole results, as their slices are taken one after another."""
        with self.lock:
            known = self._recent.get(name)
        if known is None:
            known = compute()
            with self.lock:
                self._recent[name] = known
                while len(self._recent) > 2:
                    self._recent.popitem(last=False)
        return known
