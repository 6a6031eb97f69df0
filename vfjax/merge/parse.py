"""Reading what a user wrote in a recipe; all but `is_members` raise InputError if it is wrong."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from vfjax.errors import InputError, cut
from vfjax.merge.methods.registry import METHODS, Each, Weights

Value = int | float | str
"""A number, a switch or a string."""
Setting = tuple[tuple[str, tuple[Value, ...]], ...]
"""A parameter as written: (filter, values over the layers) cases; a scalar is a list of one."""


MOST = 1e300
"""Numbers are smaller, so that they fit a float."""


def kind(where: str, key: str, method: str, known: Mapping[str, str]) -> object:
    """The annotation of a parameter by the name that `known` maps to ours."""
    if key not in known:
        wanted = ", ".join(known) or "none"
        fail(where, f"{key!r}", f"parameters of {method}: {wanted}", "remove or rename it")
    return METHODS[method].params[known[key]].annotation


def is_members(method: str, kind: object) -> bool:
    """A parameter that each member may have its own of; passthrough has but one member."""
    return kind in (Weights, Each) or method == "passthrough"


def setting(where: str, given: object, convert: Callable[[Value], Value] = lambda x: x) -> Setting:
    """A parameter as written, each of its values converted."""
    written: Sequence[object] = [{"value": given}]
    if isinstance(given, list | tuple) and any(isinstance(case, Mapping) for case in given):
        written = given
    cases = []
    for each in written:
        case = keys(where, each, ("filter", "value"))
        value = case.get("value")
        values = tuple(value) if isinstance(value, list | tuple) else (value,)
        if not values or not all(isinstance(x, int | float | str) for x in values):
            wanted = "a number, switch or string, a list of them, or a list of {filter, value}"
            fail(where, repr(value), wanted, "correct it")
        part = case.get("filter")
        if not isinstance(part, str | None):
            fail(f"{where}.filter", repr(part), "a part of a tensor's name", "quote it")
        values = tuple(map(convert, values))
        if not all(isinstance(x, str) or abs(x) < MOST for x in values):
            fail(where, repr(values), "finite numbers", "correct it")
        cases.append(("" if part in (None, "*") else part, values))
    return tuple(cases)


def method(name: object, where: str) -> str:
    """The name of a method."""
    if not isinstance(name, str) or name not in METHODS:
        fail(where, repr(name), ", ".join(METHODS), "choose one of these")
    return name


def one_of(where: str, given: Mapping[str, Any], keys: Sequence[str]) -> str:
    """The one of these keys that has a value."""
    held = [key for key in keys if given.get(key)]
    if len(held) != 1:
        wanted = f"exactly one of {', '.join(keys)}"
        fail(where, " and ".join(held) or "none", wanted, "keep one")
    return held[0]


def keys(where: str, given: object, known: Sequence[str]) -> Mapping[str, Any]:
    """The mapping; refuses another thing, and other keys."""
    if not isinstance(given, Mapping):
        fail(where, repr(given), f"a mapping with {', '.join(known)}", "correct it")
    if unknown := [key for key in given if key not in known]:
        fail(where, f"key {unknown[0]!r}", ", ".join(known), "remove or rename it")
    return given


def mapping(where: str, given: object) -> Mapping[str, Any]:
    """The mapping, empty for None."""
    if not isinstance(given, Mapping | None):
        fail(where, repr(given), "a mapping", "correct it")
    return given or {}


def items(where: str, given: object) -> list[Any]:
    """The elements of a list."""
    if not isinstance(given, list | tuple) or not given:
        fail(where, repr(given), "a list of one or more", "correct it")
    return list(given)


def text(given: Mapping[str, Any], key: str, where: str = "") -> str | None:
    """A string, or None."""
    value = given.get(key)
    if not isinstance(value, str | None):
        fail(f"{where}{key}", repr(value), "a string", "correct it")
    return value


def no_repeats(where: str, labels: Sequence[str]) -> None:
    """Refuses a label that is there twice."""
    if repeated := [label for label, count in Counter(labels).items() if count > 1]:
        fail(where, f"{repeated[0]} twice", "each model once", "remove one")


def fail(where: str, found: object, expected: object, fix: str) -> NoReturn:
    """Raises InputError."""
    raise InputError(where, found=cut(str(found), 300), expected=expected, fix=fix)
