"""The merge engine: a method over named tensors, lazily, in bounded memory.

`merge` returns tensors that are computed when sliced, so whoever writes or places them decides how
much is in memory, in which order and on how many threads, and a merge of merges needs no file
between. Arithmetic runs on the CPU backend even where there is an accelerator: a merge by blocks is
bound by reading and writing. The formulas themselves run anywhere under `jax.jit`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from vfjax.errors import InputError
from vfjax.merge.compatibility import check_shape, check_tensors
from vfjax.merge.engine.merged import Computed, Labelled, Merged, Unmerged
from vfjax.merge.engine.operation import Masks, Operation
from vfjax.merge.engine.reductions import RankGroup
from vfjax.merge.methods.registry import METHODS, Flags, Numbers, find
from vfjax.merge.tensors import EXPONENTS, LazyTensor, Tensors

Kind = tuple[str, Flags, int, bool]
"""A method, its switches, its number of members, and whether it reads a base."""


def merge(
    base: Tensors | None,
    members: Mapping[str, Tensors],
    method: str,
    params: Mapping[str, Any],
    *,
    dtype: DTypeLike | None = None,
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


class Merger:
    """Makes merged tensors one at a time, each by a method of its own; `merge` in small steps.

    Args:
        dtype: of the float results; the reference's by default.
        seed: of random methods.
        accounts: count what members did to the base while merging, see `Merged.account`.

    Raises:
        InputError: a dtype that cannot be merged.
    """

    def __init__(self, dtype: DTypeLike | None = None, seed: int = 0, accounts: bool = False):
        self.accounts = accounts
        self.dtype = None if dtype is None else _checked("dtype", dtype)
        self.seed = seed
        self._operations: dict[tuple[object, ...], Operation] = {}
        self._masks = Masks()
        self._groups: dict[Kind, tuple[dict[str, bytes], RankGroup]] = {}

    def add(
        self,
        name: str,
        method: str,
        params: Mapping[str, Any],
        members: Sequence[Labelled],
        base: Labelled | None = None,
        dtype: DTypeLike | None = None,
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
            return Unmerged(name, like.dtype, everything)
        for label, tensor in everything:
            _checked(f"{label}: {name}", tensor.dtype)
        has_base = base is not None and found.base != "unread"
        kind = (method, flags, len(members), has_base)
        key = (*kind, *((k, v.tobytes()) for k, v in values.items()))
        if key not in self._operations:
            group = self._group(name, kind, values)
            self._operations[key] = Operation(
                found,
                values,
                flags,
                self.seed,
                has_base,
                self.accounts and has_base,
                group,
                self._masks,
            )
        operation = self._operations[key]
        sources = everything if has_base else members
        target = self.dtype or (like.dtype if dtype is None else _checked("dtype", dtype))
        tensor = Computed(name, target, sources, operation)
        operation.group.tensors.append(tensor)
        return tensor

    def _group(self, name: str, method: Kind, values: Numbers) -> RankGroup:
        """What is ranked as one: an operation's tensors, or all but for their weights and scale."""
        if ("trim", "model") not in method[1]:
            return RankGroup()
        shares = {k: v.tobytes() for k, v in values.items() if k not in ("weights", "scale")}
        known, group = self._groups.setdefault(method, (shares, RankGroup()))
        for key in shares:
            if shares[key] != known[key]:
                raise InputError(
                    f"{name}: trim",
                    found=f"'model', and {key} varies over the tensors",
                    expected=f"one {key} for all that are ranked together",
                    fix="set trim='tensor', or one number",
                )
        return group


def _is_exact(dtype: np.dtype) -> bool:
    """Integers and booleans: counters and indices, which must be equal everywhere."""
    return dtype.kind in "iub"


def _checked(where: str, dtype: DTypeLike) -> np.dtype:
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
