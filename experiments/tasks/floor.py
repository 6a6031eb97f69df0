"""What a perfect program would take, from its shapes; and where a compiled one spends its time."""

import collections
import math
import re
from collections.abc import Iterator, Sequence

import jax
from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

LAST = 10
"""Lines of source that are listed."""


def operations(jaxpr: Jaxpr | ClosedJaxpr, devices: int) -> float:
    """Operations a device of the products and convolutions, shared by all devices alike.

    Args:
        jaxpr: of the program; what `remat` computes again counts again.
        devices: of the mesh.
    """
    return sum(times * each for times, each in _products(jaxpr, 1.0)) / devices


def _products(jaxpr: Jaxpr | ClosedJaxpr, times: float) -> Iterator[tuple[float, float]]:
    """How often, and with how many operations, each product of a program runs on all devices."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            (over, _), _ = eqn.params["dimension_numbers"]
            shared = math.prod(_array(eqn.invars[0]).shape[i] for i in over)
            yield times, 2.0 * _array(eqn.outvars[0]).size * shared
        elif name == "conv_general_dilated":
            kernel = _array(eqn.invars[1])
            outputs = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
            yield times, 2.0 * _array(eqn.outvars[0]).size * kernel.size / outputs
        elif name != "pallas_call":  # `vfjax.nn.flash.kernel_flops` counts those
            runs = eqn.params["length"] if name == "scan" else 1
            runs *= eqn.params["mesh"].size if name == "shard_map" else 1
            for inner in jax.tree.leaves(tuple(eqn.params.values()), is_leaf=_is_jaxpr):
                if _is_jaxpr(inner):
                    yield from _products(inner, times * runs)


def moved(
    jaxpr: Jaxpr | ClosedJaxpr,
    given: Sequence[jax.sharding.Sharding],
    made: Sequence[jax.sharding.Sharding],
) -> float:
    """Bytes a device of what a program has to read and to write, each once.

    Of a table that is read by rows alone, those rows; of a buffer that is written in part, that
    part; nothing of what is ignored, or handed on.

    Args:
        jaxpr: of the program.
        given: where each of its inputs lies.
        made: where each of its results lies.
    """
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    readers: dict[Var, list[JaxprEqn]] = collections.defaultdict(list)
    makers: dict[Var, JaxprEqn] = {}
    for eqn in inner.eqns:
        for var in {x for x in eqn.invars if isinstance(x, Var)}:
            readers[var].append(eqn)
        makers |= dict.fromkeys(eqn.outvars, eqn)
    total = 0.0
    for var, at in zip(inner.invars, given, strict=True):
        whole, found = _bytes(var, at), readers[var]
        if found and all(x.primitive.name == "gather" and x.invars[0] is var for x in found):
            whole = min(whole, sum(_bytes(x.outvars[0]) for x in found))
        total += whole if found else 0.0
    for var, at in zip(inner.outvars, made, strict=True):
        maker = makers.get(var) if isinstance(var, Var) else None
        if maker is not None and maker.primitive.name == "dynamic_update_slice":
            _, part = (_array(x).size for x in maker.invars[:2])
            total += _bytes(var, at) * part / _array(var).size
        elif maker is not None:
            total += _bytes(var, at)
    return total


def _bytes(var: Var, at: jax.sharding.Sharding | None = None) -> float:
    """Of a variable, on a device where it lies `at`, or whole."""
    array = _array(var)
    shape = array.shape if at is None else at.shard_shape(array.shape)
    return float(math.prod(shape) * array.dtype.itemsize)


def _array(var: Var | Literal) -> ShapedArray:
    """Shape and dtype of a variable."""
    assert isinstance(var.aval, ShapedArray)
    return var.aval


def _is_jaxpr(x: object) -> bool:
    return hasattr(getattr(x, "jaxpr", x), "eqns")


def costliest(text: str, package: str = "vfjax/") -> list[tuple[str, int]]:
    """Lines of source with the cycles that the TPU's compiler expects of them, the most first.

    Args:
        text: of the compiled program; the body of a loop counts once, a Pallas kernel not at all.
        package: part of the files' names that lines are sought in, from the innermost call out.

    Returns:
        ("llama.py:165 dot_general", cycles), at most `LAST`; none where the compiler gives none.
    """
    names = dict(re.findall(r'^(\d+) "(.*)"$', _table(text, "FileNames"), re.M))
    places = {
        number: f"{names[file]}:{line}"
        for number, file, line in re.findall(
            r"^(\d+) \{file_name_id=(\d+) .*?\bline=(\d+)", _table(text, "FileLocations"), re.M
        )
    }
    frames = {
        int(number): (places[at], int(parent or 0) - 1)
        for number, at, parent in re.findall(
            r"^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?",
            _table(text, "StackFrames"),
            re.M,
        )
    }
    cycles: collections.Counter[str] = collections.Counter()
    for line in text.splitlines():
        if found := re.search(r'"estimated_cycles":"(\d+)"', line):
            frame = re.search(r"stack_frame_id=(\d+)", line)
            op = re.search(r'op_name="(?:[^"]*/)?([^"/]*)"', line)
            kind = op[1] if op else "made by the compiler"
            place = _place(frames, int(frame[1]) if frame else 0, package)
            cycles[f"{place} {kind}".strip()] += int(found[1])
    return cycles.most_common(LAST)


def _table(text: str, name: str) -> str:
    """A numbered table at the head of a compiled program's text."""
    found = re.search(rf"^{name}\n((?:\d+ .*\n)*)", text, re.M)
    return found[1] if found else ""


def _place(frames: dict[int, tuple[str, int]], frame: int, package: str) -> str:
    """The innermost line of the package that a frame was called from."""
    while frame in frames:
        place, outer = frames[frame]
        if package in place:
            return place[place.rindex(package) :]
        frame = outer if outer < frame else 0
    return ""
