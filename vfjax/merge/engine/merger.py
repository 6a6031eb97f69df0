"""The merge engine: a method over named tensors, lazily, in bounded memory.

`merge` returns tensors that are computed when sliced, so whoever writes or places them decides how
much is in memory, in which order and on how many threads, and a merge of merges needs no file
between. Arithmetic runs on the CPU backend even where there is an accelerator: a stream is bound by
reading and writing. The formulas themselves run anywhere under `jax.jit`.
"""

from __future__ import annotations

import functools
import math
import operator
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import EllipsisType
from typing import Any, NoReturn

import jax.numpy as jnp
import numpy as np

from vfjax.errors import InputError
from vfjax.merge.account import Account, account
from vfjax.merge.compatibility import REMEDY, check_shape, check_tensors
from vfjax.merge.engine import stream
from vfjax.merge.engine.rule import Model, Rule
from vfjax.merge.engine.tensors import (
    EXPONENTS,
    LazyTensor,
    Tensors,
    blocks,
    count_nonfinite,
    has_nonfinite,
    nonfinite_error,
    padded,
)
from vfjax.merge.methods.registry import METHODS, Numbers, find

_SMALLEST = 1 << 12


def merge(
    base: Tensors | None,
    members: Mapping[str, Tensors],
    method: str,
    params: Mapping[str, Any],
    *,
    dtype: Any = None,
    seed: int = 0,
) -> dict[str, LazyTensor]:
    """Merges named tensors by a method of `METHODS`.

    Sums are in float32 and rounded once, to nearest even. XLA's CPU backend reads and writes
    float32 and bfloat16 values below 1.2e-38 as zero. A slice is computed `BLOCK` elements at a
    time (at least one row), so memory beyond the slice itself is bounded by the sources' blocks.

    Args:
        base: name -> tensor of the base LLM; the reference for names, shapes and dtypes. None if
            the method reads no base: the first member is the reference then.
        members: label -> name -> tensor, in the order of the method's weights.
        method: key of `METHODS`.
        params: the method's parameters.
        dtype: of the float results, bfloat16, float16 or float32; the reference's by default.
        seed: of the methods that draw random numbers, from it, the tensor's name and the index.

    Returns:
        The reference's names, in its order, each with a tensor computed when sliced. Slicing raises
        InputError if a source holds NaN or infinity, if the result leaves the dtype's range, or if
        tensors that are not float (which are not merged) differ.

    Raises:
        InputError: no members, a wrong parameter, no base for a method that reads it, sources of
            different families (names, shapes), or a dtype that cannot be merged.
    """
    if not members:
        raise InputError("members", found="none", expected="at least one", fix="name a member")
    listed = [(f"member {label!r}", tensors) for label, tensors in members.items()]
    everything = listed if base is None else [("base", base), *listed]
    find(method, params, len(members))
    if METHODS[method].base == "required" and base is None:
        raise InputError(
            f"method {method}", found="no base", expected="the base LLM", fix="set base"
        )
    check_tensors(everything)
    merger = Merger(dtype, seed)
    return {
        name: merger.add(
            name,
            method,
            params,
            [(label, tensors[name]) for label, tensors in listed],
            None if base is None else ("base", base[name]),
        )
        for name in everything[0][1]
    }


Find = Callable[["Merged", Any, list[Any]], Any]
Labelled = tuple[str, LazyTensor]
"""A tensor with the name that errors give its source."""


class Merger:
    """Makes merged tensors one at a time, each by a method of its own; `merge` in small steps.

    Args:
        dtype: of the float results; the reference's by default.
        seed: of random methods.
        accounts: count what members did to the base while merging, see `Merged.account`.

    Raises:
        InputError: a dtype that cannot be merged.
    """

    def __init__(self, dtype: Any = None, seed: int = 0, accounts: bool = False):
        self.accounts = accounts
        self.dtype = None if dtype is None else _checked("dtype", dtype)
        self.seed = seed
        self._rules: dict[Any, Rule] = {}
        self._models: dict[Any, tuple[dict[str, bytes], Model]] = {}

    def add(
        self,
        name: str,
        method: str,
        params: Mapping[str, Any],
        members: Sequence[Labelled],
        base: Labelled | None = None,
        dtype: Any = None,
    ) -> Merged:
        """One more tensor.

        Args:
            name: of the result; random numbers depend on it.
            method: key of `METHODS`.
            params: its parameters.
            members: in the order of the method's weights, of one shape.
            base: of that shape; the reference for the dtype, even if the method reads none.
            dtype: of this result, where the merger has none.

        Raises:
            InputError: a wrong parameter, no base for a method that reads it, different shapes, a
                dtype that cannot be merged, or a share of the whole model that varies.
        """
        found, values, flags = find(method, params, len(members))
        if found.leaves(name):
            method, even = "task_arithmetic", [1 / len(members)] * len(members)
            mean = {"weights": even, "scale": float(values["scale"])}
            found, values, flags = find(method, mean, len(members))
        everything = [*members] if base is None else [base, *members]
        if found.base == "required" and base is None:
            raise InputError(
                f"{name}: method {method}", found="no base", expected="the base LLM", fix="set base"
            )
        (first, like), *others = everything
        for label, tensor in others:
            check_shape(f"{label}: {name}", tensor.shape, first, like.shape)
        if all(_is_exact(tensor.dtype) for _, tensor in everything):
            return Merged(name, like.dtype, everything, None)
        for label, tensor in everything:
            _checked(f"{label}: {name}", tensor.dtype)
        key = (method, flags, len(members), *((k, v.tobytes()) for k, v in values.items()))
        has_base = base is not None and found.base != "unread"
        key += (has_base,)
        if key not in self._rules:
            model = self._model(name, (method, flags, len(members), has_base), values)
            self._rules[key] = Rule(
                found, values, flags, self.seed, has_base, self.accounts and has_base, model
            )
        rule = self._rules[key]
        sources = everything if has_base else members
        target = self.dtype or (like.dtype if dtype is None else _checked("dtype", dtype))
        rule.model.tensors.append(Merged(name, target, sources, rule))
        return rule.model.tensors[-1]

    def _model(self, name: str, method: Any, values: Numbers) -> Model:
        """What a method ranks as one: a rule's tensors, or all that differ in weights and scale."""
        if ("trim", "model") not in method[1]:
            return Model()
        shares = {k: v.tobytes() for k, v in values.items() if k not in ("weights", "scale")}
        known, model = self._models.setdefault(method, (shares, Model()))
        for key in shares:
            if shares[key] != known[key]:
                raise InputError(
                    f"{name}: trim",
                    found=f"'model', and {key} varies over the tensors",
                    expected=f"one {key} for all that are ranked together",
                    fix="set trim='tensor', or one number",
                )
        return model


def _is_exact(dtype: np.dtype) -> bool:
    """Integers and booleans: counters and indices, which must be equal everywhere."""
    return dtype.kind in "iub"


def _checked(where: str, dtype: Any) -> np.dtype:
    try:
        known = np.dtype(dtype) in EXPONENTS
    except TypeError:  # no numpy dtype at all
        known = False
    if not known:
        raise InputError(
            where,
            found=f"dtype {dtype}",
            expected=", ".join(map(str, EXPONENTS)),
            fix="convert to one of these first (dequantise what is quantised)",
        )
    return np.dtype(dtype)


class Merged:
    """A tensor computed from its sources, block by block, when sliced.

    Attributes:
        name: of the tensor.
        shape: of it and its sources.
        dtype: of the result.
        sources: (label, tensor), the base first if it is read.
        rule: how; None where the sources must be equal.
        known: answers to the first requests of its method.
    """

    def __init__(
        self,
        name: str,
        dtype: np.dtype,
        sources: Sequence[tuple[str, LazyTensor]],
        rule: Rule | None,
    ):
        self.name, self.dtype, self.sources, self.rule = name, dtype, tuple(sources), rule
        self.shape = sources[0][1].shape
        self.known: list[Any] = []
        self._lock = rule.model.lock if rule and rule.is_joint else threading.RLock()
        self._accounts: dict[int, Account] = {}

    def __getitem__(self, rows: slice | EllipsisType, /) -> np.ndarray:
        if self.rule is None:
            return self._equal(rows)
        if self.rule.method.whole:
            with self._lock:
                return self.rule.recent(self.name, self._whole)[rows]
        answers = self.answers()
        if self.one_row:
            return self._finished(..., answers)[rows]
        parts = list(blocks(self.shape, rows))
        if len(parts) == 1:
            return self._finished(parts[0], answers)
        start, stop = parts[0].start, parts[-1].stop
        result = np.empty((stop - start, *self.shape[1:]), self.dtype)
        for part in parts:
            result[part.start - start : part.stop - start] = self._finished(part, answers)
        return result

    def _finished(self, rows: slice | EllipsisType, answers: Sequence[Any]) -> np.ndarray:
        assert self.rule is not None
        arrays, count = self._read(rows), self.row_count(rows)
        result = self._run(arrays, rows, answers)[:count]
        if has_nonfinite(result):
            self.blame()
        if self.rule.accounts:  # while the arrays are in the cache
            self._accounts[_first(rows)] = account(arrays, count)
        return result.reshape(-1, *self.shape[1:]) if self.shape else result.reshape(())

    def account(self) -> Account | None:
        """What its sources did to the base; None if the method reads none.

        The blocks that have been merged were counted then, if the `Merger` was told to.
        """
        if self.rule is None or not self.rule.has_base:
            return None
        each = [
            self._accounts.get(_first(rows)) or account(self._read(rows), self.row_count(rows))
            for rows in self.blocks()
        ]
        return functools.reduce(operator.add, each)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def one_row(self) -> bool:
        """It is a vector that must not be cut."""
        return self.rule is not None and self.rule.method.rows and len(self.shape) < 2

    def blocks(self) -> Iterator[slice | EllipsisType]:
        """All blocks in order, as sums are taken over them."""
        return iter([...]) if self.one_row else blocks(self.shape)

    def row_count(self, rows: slice | EllipsisType) -> int:
        """Elements in a slice."""
        if rows is ... or not self.shape:
            return self.size
        return (rows.stop - rows.start) * math.prod(self.shape[1:])

    def answers(self, count: int | None = None, find: Find = stream.answer) -> list[Any]:
        """Answers to the first `count` requests of the method, to all by default; found once.

        Args:
            count: how many.
            find: (this tensor, request, earlier answers) -> its answer.
        """
        assert self.rule is not None
        if not self.rule.method.in_passes:
            return []
        with self._lock:
            while count is None or len(self.known) < count:
                request = self.rule.request(self, self.known)
                if request is None:
                    break
                self.known.append(find(self, request, list(self.known)))
            return self.known[:count]

    def evaluate(self, rows: slice | EllipsisType, answers: Sequence[Any]) -> np.ndarray:
        """The formula on some rows, up to the request after `answers` or to its end.

        Returns:
            What that request reduces (`passes.partial`), or the flat result; with padding.
        """
        return self._run(self._read(rows), rows, answers)

    def _read(self, rows: slice | EllipsisType) -> list[np.ndarray]:
        size = self.padded_size(self.row_count(rows))
        return [padded(np.asarray(tensor[rows]), size) for _, tensor in self.sources]

    def _run(
        self, arrays: Sequence[np.ndarray], rows: slice | EllipsisType, answers: Sequence[Any]
    ) -> np.ndarray:
        assert self.rule is not None
        start = _first(rows) * math.prod(self.shape[1:])
        known: list[Any] = []
        for each in answers:
            if each is stream.SORTED:
                values = self.rule.run(arrays, known, start, self)
                known.append(np.sort(values.reshape(len(values), -1, self.width), axis=-1))
            else:
                known.append(each)
        return self.rule.run(arrays, known, start, self)

    def padded_size(self, count: int) -> int:
        """Elements that the kernel is run on: powers of two, so that few are compiled."""
        if self.rule is not None and self.rule.method.rows:
            height = count // self.width
            return self.width << max(0, height - 1).bit_length()
        return max(_SMALLEST, 1 << max(0, count - 1).bit_length())

    @property
    def width(self) -> int:
        """Elements in a row: along the last axis."""
        return self.shape[-1] if self.shape else 1

    def _whole(self) -> np.ndarray:
        assert self.rule is not None
        arrays = [np.asarray(tensor[...]) for _, tensor in self.sources]
        result = self.rule.run(arrays, [], 0, self)
        if has_nonfinite(result):
            self.blame()
        return result

    def _equal(self, rows: slice | EllipsisType) -> np.ndarray:
        arrays = [np.asarray(tensor[rows]) for _, tensor in self.sources]
        for i, array in enumerate(arrays):
            if not np.array_equal(array, arrays[0]):
                raise self.unequal(i)
        return arrays[0]

    def unequal(self, source: int) -> InputError:
        """What to raise when a source's values, which are not merged, are not the first's."""
        return InputError(
            f"{self.sources[source][0]}: {self.name}",
            found=f"{self.dtype} values that differ from those of {self.sources[0][0]}",
            expected="equal values, as only float tensors are merged",
            fix=REMEDY,
        )

    def blame(self, counts: Sequence[int] | None = None) -> NoReturn:
        """Raises InputError that names the source of a NaN or infinity, with their number.

        Args:
            counts: how many each source has, if it is known.
        """
        for i, (label, tensor) in enumerate(self.sources):
            if count := count_nonfinite(tensor) if counts is None else counts[i]:
                raise nonfinite_error(f"{label}: {self.name}", tensor, count)
        raise InputError(
            self.name,
            found=f"finite sources, but a merged value that is not finite in {self.dtype}",
            expected=f"values up to {jnp.finfo(self.dtype).max}",
            fix="choose smaller weights (not summing to 0 if normalised) or a wider dtype",
        )


def _first(rows: slice | EllipsisType) -> int:
    return rows.start if isinstance(rows, slice) else 0
