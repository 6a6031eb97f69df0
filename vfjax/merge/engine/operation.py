"""A merge method with its parameters bound, which the tensors that use both share."""

import dataclasses
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vfjax.merge.engine import kernels
from vfjax.merge.engine.reductions import Blockwise, RankGroup
from vfjax.merge.methods.registry import Array, Flags, Method, Numbers, Params
from vfjax.merge.methods.requests import SORTED, Answer, Request


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
        params: numbers and switches together.
    """

    method: Method
    values: Numbers
    flags: Flags
    seed: int
    has_base: bool
    accounts: bool
    group: RankGroup

    def __post_init__(self) -> None:
        self.params: Params = {**self.values, **dict(self.flags)}
        self.lock = threading.RLock()
        self._recent: OrderedDict[str, np.ndarray] = OrderedDict()
        self._requests: dict[tuple[object, ...], Request | None] = {}
        cpu = jax.local_devices(backend="cpu")[0]
        self._values = jax.device_put(self.values, cpu)

    def run(
        self, arrays: Sequence[np.ndarray], answers: Sequence[Answer], start: int, tensor: Blockwise
    ) -> np.ndarray:
        """The formula on a block of a tensor that starts at a flat index, or on all of it."""
        if self.method.whole:
            return np.asarray(kernels.whole_kernel(arrays, self._values, **self.static(tensor)))
        first, size = np.uint32(start), arrays[0].size
        words = (
            kernels.draw(first, self.keys(tensor.name), size=size) if self.method.random else None
        )
        known = tuple(answers)
        return np.asarray(
            kernels.block_kernel(arrays, self._values, known, first, words, **self.static(tensor))
        )

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
        jax.eval_shape(look, arrays, [rows if each is SORTED else each for each in answers])
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
