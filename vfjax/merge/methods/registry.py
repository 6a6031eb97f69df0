"""The registry of merge formulas: pure functions on arrays, found by name, with typed parameters.

A method takes `base` (only if it reads the base) and `members`, arrays of one shape and any float
dtype, then its parameters by keyword. It accumulates in float32 and returns float32; the caller
rounds once. A NaN or infinity in a source must reach the result. There are three kinds:

* elementwise: a function whose slice of the result is the result of the slices;
* multi-pass: a generator that yields a request (`vfjax.merge.methods.requests`) for each number it
  needs of the whole tensor, is sent the answer, and returns the result, elementwise given the
  answers;
* whole: a function of full tensors, for those that decompose matrices.

The first two see a tensor a block at a time, which bounds the engine's memory; the keyword `block`,
if they have it, is the `Block` that they see.
"""

import dataclasses
import inspect
import numbers
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from vfjax.errors import InputError, counted

Array = jax.Array | np.ndarray
Weights = Sequence[float]
"""One number a member, in the members' order."""
Each = Sequence[float] | float
"""One number a member, or one for all of them."""
Params = Mapping[str, Any]
"""Checked parameters: numbers (float32, `Weights` and `Each` as float32[K]) and switches."""
Numbers = dict[str, np.ndarray]
Flags = tuple[tuple[str, bool | str], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
    """A registered formula.

    Attributes:
        name: of the function, as recipes spell it.
        fn: the formula.
        base: whether it takes the base before the members: "required", "optional" (then it may be
            None) or "unread".
        params: its keyword parameters, with type and default.
        whole: it takes full tensors.
        averages: parts of the names of tensors that its authors' code leaves to the mean delta.
        rows: it compares the elements of a row, so that its blocks are [rows, width].
        random: it draws random numbers.
        takes: fewest and most members.
        check: raises InputError for parameters that do not go together.
    """

    name: str
    fn: Callable[..., Any]
    base: Literal["required", "optional", "unread"]
    params: Mapping[str, inspect.Parameter]
    whole: bool = False
    averages: tuple[str, ...] = ()
    rows: bool = False
    random: bool = False
    takes: tuple[int, int | None] = (1, None)
    check: Callable[[Params], None] | None = None

    @property
    def multipass(self) -> bool:
        """It asks for numbers of the whole tensor, and so reads it more than once."""
        return inspect.isgeneratorfunction(self.fn)

    def leaves(self, tensor: str) -> bool:
        """It gives the tensor of this name the mean delta."""
        return any(part in tensor for part in self.averages)

    # Any: an array, or of a multi-pass method a generator, as `multipass` says.
    def __call__(self, base: Array | None, members: Sequence[Array], **params: object) -> Any:
        """The formula; the base is dropped if it reads none."""
        if self.base == "unread":
            return self.fn(members, **params)
        return self.fn(base, members, **params)


METHODS: dict[str, Method] = {}
"""Name -> method."""


def register(
    *,
    whole: bool = False,
    averages: tuple[str, ...] = (),
    rows: bool = False,
    random: bool = False,
    takes: tuple[int, int | None] = (1, None),
    check: Callable[[Params], None] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds a formula to `METHODS`; its signature is its schema. See `Method` for the arguments.

    Raises:
        ValueError: of the decorator, where there is a method of that name.
    """

    def add(fn: Callable[..., Any]) -> Callable[..., Any]:
        if fn.__name__ in METHODS:
            known = METHODS[fn.__name__].fn.__module__
            raise ValueError(f"{fn.__module__}: {known} has a method {fn.__name__!r}, too")
        signature = inspect.signature(fn).parameters
        params = {
            name: p for name, p in signature.items() if p.kind is p.KEYWORD_ONLY and name != "block"
        }
        for p in params.values():
            assert p.annotation in (Weights, Each, float, bool) or _choices(p), (fn.__name__, p)
        base: Any = "required" if "base" in signature else "unread"
        if base == "required" and signature["base"].annotation == Array | None:
            base = "optional"
        METHODS[fn.__name__] = Method(
            fn.__name__, fn, base, params, whole, averages, rows, random, takes, check
        )
        return fn

    return add


SHARES = ("density", "gamma", "select_topk")
"""Parameters that are a share of a tensor's elements."""


def find(
    name: str, params: Mapping[str, Any], count: int, words: Mapping[str, str] | None = None
) -> tuple[Method, Numbers, Flags]:
    """Looks a method up and checks its parameters.

    Args:
        name: key of `METHODS`.
        params: what the user gave, by parameter name.
        count: number of members.
        words: what the user calls parameters, where that is not our name.

    Returns:
        The method, its numbers by name (float32, `Weights` and `Each` as float32[K]), its switches.

    Raises:
        InputError: unknown method; unknown, missing, wrongly typed or non-finite parameter; wrong
            number of weights or of members.
    """
    if name not in METHODS:
        raise InputError(
            "method", found=repr(name), expected=", ".join(METHODS), fix="choose one of these"
        )
    method = METHODS[name]
    _check_count(method, count)
    if unknown := sorted(set(params) - set(method.params)):
        raise InputError(
            f"method {name}",
            found=f"parameter {unknown[0]!r}",
            expected=", ".join(method.params),
            fix="remove or rename it",
        )
    values: dict[str, Any] = {}
    for key, param in method.params.items():
        word = (words or {}).get(key, key)
        if key not in params and param.default is param.empty:
            raise InputError(
                f"method {name}", found=f"no {word!r}", expected=_wants(param, count), fix="set it"
            )
        values[key] = _typed(f"{name}.{word}", param, params.get(key, param.default), count)
        if key in SHARES and np.any((values[key] < 0) | (values[key] > 1)):
            raise InputError(
                f"{name}.{word}",
                found=f"{np.asarray(params[key]).tolist()}",
                expected="a share, 0 to 1",
                fix="divide per cent by 100",
            )
    if method.check:
        method.check(values)
    flags = tuple((key, value) for key, value in values.items() if isinstance(value, bool | str))
    return method, {key: values[key] for key in values if key not in dict(flags)}, flags


def _choices(param: inspect.Parameter) -> tuple[str, ...]:
    is_literal = typing.get_origin(param.annotation) is Literal
    return typing.get_args(param.annotation) if is_literal else ()


def _check_count(method: Method, count: int) -> None:
    low, high = method.takes
    if count < low or (high is not None and count > high):
        wanted = f"{low}" if low == high else f"{low} or more"
        raise InputError(
            f"method {method.name}",
            found=counted(count, "member"),
            expected=wanted,
            fix="change the members or the method",
        )


def _wants(param: inspect.Parameter, count: int) -> str:
    if param.annotation == Weights:
        return f"{counted(count, 'finite number')}, one a member"
    if param.annotation == Each:
        return f"a finite number, or {count} of them, one a member"
    if choices := _choices(param):
        return " or ".join(map(repr, choices))
    return "True or False" if param.annotation is bool else "a finite number"


def _typed(
    where: str, param: inspect.Parameter, value: object, count: int
) -> np.ndarray | bool | str:
    """The value as its parameter's type, or InputError."""
    kind, choices = param.annotation, _choices(param)
    items: list[object] = [value]
    is_list = False
    if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str):
        items, is_list = list(value), True
    if choices or kind is bool:
        good = value in choices if choices else isinstance(value, bool)
        result: Any = value
    else:
        many = kind == Weights or (kind == Each and is_list)
        good = is_list == many and len(items) == (count if many else 1) and all(map(_finite, items))
        result = items * count if kind == Each and not many else value
    if not good:
        raise InputError(where, found=repr(value), expected=_wants(param, count), fix="correct it")
    return result if choices or kind is bool else np.asarray(result, np.float32)


def _finite(x: object) -> bool:
    """A number, finite in float32 too."""
    if isinstance(x, bool) or not isinstance(x, numbers.Real):
        return False
    return abs(float(x)) <= float(np.finfo(np.float32).max)
