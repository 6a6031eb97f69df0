"""Configs as plain JSON, with the names of their classes, so that nothing else need be read."""

import dataclasses
import types
import typing
from collections.abc import Mapping

from vfjax.atomic import JSON
from vfjax.errors import InputError

CLASS = "class"
"""Key of the name of a dataclass, beside its fields."""


def to_plain(value: object, where: str) -> JSON:
    """A frozen dataclass, or what stands in one, as JSON has it; tuples are lists.

    Args:
        value: the config.
        where: what to call it in errors.

    Raises:
        InputError: a value that JSON would not give back.
    """
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        given = {key: to_plain(each, f"{where}.{key}") for key, each in fields.items()}
        return {CLASS: type(value).__name__, **given}
    if isinstance(value, tuple):
        return [to_plain(each, f"{where}[{i}]") for i, each in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(k, str) and k != CLASS for k in value):
        return {key: to_plain(each, f"{where}.{key}") for key, each in value.items()}
    if value is None or type(value) in (bool, int, float, str):
        return value  # type: ignore[return-value]
    raise InputError(
        where,
        found=type(value).__name__,
        expected="numbers, texts, tuples, mappings and dataclasses",
        fix="keep it in one of these",
    )


def classes_of(value: object) -> dict[str, type]:
    """The dataclasses that a config is made of, by their names."""
    if isinstance(value, tuple):
        return {name: own for each in value for name, own in classes_of(each).items()}
    if not dataclasses.is_dataclass(value):
        return {}
    found: dict[str, type] = {type(value).__name__: type(value)}
    for field in dataclasses.fields(value):
        found |= classes_of(getattr(value, field.name))
    return found


def from_plain(value: JSON, classes: Mapping[str, type], where: str) -> object:
    """What `to_plain` was given.

    Args:
        value: JSON.
        classes: dataclasses by their names.
        where: what to call it in errors.

    Raises:
        InputError: a class that is none of these; a field that it lacks or does not have, or one of
            another type than the class says.
    """
    if isinstance(value, list):
        return tuple(from_plain(each, classes, f"{where}[{i}]") for i, each in enumerate(value))
    if not isinstance(value, Mapping):
        return value
    if CLASS not in value:
        return {key: from_plain(each, classes, f"{where}.{key}") for key, each in value.items()}
    name = value[CLASS]
    if not isinstance(name, str) or name not in classes:
        raise _error(where, f"class {name!r}", f"one of {', '.join(sorted(classes))}")
    own = classes[name]
    fields = [field.name for field in dataclasses.fields(own)]
    given = [key for key in value if key != CLASS]
    if set(given) != set(fields):
        raise _error(where, f"the fields {', '.join(given)}", f"those of {name}: {fields}")
    found = {key: from_plain(value[key], classes, f"{where}.{key}") for key in fields}
    hints = typing.get_type_hints(own)
    for key, each in found.items():
        if not fits(each, hints[key]):
            raise _error(f"{where}.{key}", f"{value[key]!r}", f"{hints[key]}")
    return own(**found)


def fits(value: object, kind: object) -> bool:
    """Whether a value is of a type, as far as annotations of configs say it."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, each) for each in args)
    if isinstance(value, dict):
        return origin is Mapping
    if origin is typing.Literal:
        return value in args
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if args[-1] is Ellipsis:
            return all(fits(each, args[0]) for each in value)
        return len(value) == len(args) and all(map(fits, value, args))
    if kind is float:
        return type(value) in (int, float)
    if kind in (bool, int, str, types.NoneType):
        return type(value) is kind
    if dataclasses.is_dataclass(kind):
        return isinstance(value, kind)  # type: ignore[arg-type]
    return True


def _error(where: str, found: str, expected: str) -> InputError:
    fix = "export the model again by the vfjax that reads it"
    return InputError(where, found=found, expected=expected, fix=fix)
