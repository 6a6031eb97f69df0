"""Merge formulas: pure functions on arrays, and the registry that finds them by name.

A method takes `base` (only if it reads the base) and `members`, arrays of one shape and any float
dtype, then its parameters by keyword. `Weights` is one number a member, `float` a number, `bool` a
switch fixed at compile time. It accumulates in float32 and returns float32; the caller rounds once.
Methods are elementwise: a slice of the result is the result of the slices, which is what lets the
engine stream. A NaN or infinity in a source must reach the result.
"""

import dataclasses
import inspect
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vfjax.errors import InputError

Array = jax.Array | np.ndarray
Weights = Sequence[float]
"""One number a member, in the members' order."""
Numbers = dict[str, np.ndarray]
Flags = tuple[tuple[str, bool], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
    """A registered formula.

    Attributes:
        name: of the function, as recipes spell it.
        fn: the formula.
        needs_base: it takes the base before the members.
        params: its keyword parameters, with type and default.
    """

    name: str
    fn: Callable[..., jax.Array]
    needs_base: bool
    params: Mapping[str, inspect.Parameter]

    def __call__(self, sources: Sequence[Array], **params: Any) -> jax.Array:
        """The formula on [base, *members], or on the members alone if it reads no base."""
        if self.needs_base:
            return self.fn(sources[0], sources[1:], **params)
        return self.fn(sources, **params)


METHODS: dict[str, Method] = {}
"""Name -> method."""


def register(fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Adds a formula to `METHODS`; its signature is its schema."""
    signature = inspect.signature(fn).parameters
    params = {name: p for name, p in signature.items() if p.kind is p.KEYWORD_ONLY}
    assert all(p.annotation in (Weights, float, bool) for p in params.values()), fn.__name__
    METHODS[fn.__name__] = Method(fn.__name__, fn, "base" in signature, params)
    return fn


@register
def linear(members: Sequence[Array], *, weights: Weights, normalize: bool = True) -> jax.Array:
    """sum_i w_i x_i, over sum_i w_i if `normalize`.

    Model soups, arXiv 2203.05482, section 2 (the uniform soup has equal weights).

    Args:
        members: K float arrays of one shape.
        weights: K numbers.
        normalize: divide by the weights' sum.

    Returns:
        float32 array of that shape.
    """
    scaled = jnp.asarray(weights, jnp.float32)
    if not normalize:
        return _weighted_sum(members, scaled)
    # Relative to the largest, equal weights are exactly 1 whatever their value, and the midpoint of
    # two members is exact.
    scaled = scaled / jnp.abs(scaled).max()
    return _weighted_sum(members, scaled) / scaled.sum()


@register
def task_arithmetic(
    base: Array, members: Sequence[Array], *, weights: Weights, scale: float = 1.0
) -> jax.Array:
    """Base + scale * sum_i w_i (x_i - base).

    Task arithmetic, arXiv 2212.04089, section 2; what VisionFuse, arXiv 2412.01289, merges its
    members' LLMs with.

    Args:
        base: float array, the pretrained weights.
        members: K arrays of its shape, fine-tuned from it.
        weights: K numbers.
        scale: multiplies the summed deltas.

    Returns:
        float32 array of that shape.
    """
    start = jnp.asarray(base, jnp.float32)
    deltas = [jnp.asarray(x, jnp.float32) - start for x in members]
    return start + scale * _weighted_sum(deltas, jnp.asarray(weights, jnp.float32))


def _weighted_sum(arrays: Sequence[Array], weights: jax.Array) -> jax.Array:
    terms = [w * jnp.asarray(x, jnp.float32) for w, x in zip(weights, arrays, strict=True)]
    return sum(terms[1:], terms[0])


def find(name: str, params: Mapping[str, Any], count: int) -> tuple[Method, Numbers, Flags]:
    """Looks a method up and checks its parameters.

    Args:
        name: key of `METHODS`.
        params: what the user gave, by parameter name.
        count: number of members.

    Returns:
        The method, its numbers by name (float32, `Weights` as float32[K]), its switches.

    Raises:
        InputError: unknown method; unknown, missing, wrongly typed or non-finite parameter; wrong
            number of weights.
    """
    if name not in METHODS:
        raise InputError(
            "method", found=repr(name), expected=", ".join(METHODS), fix="choose one of these"
        )
    method = METHODS[name]
    if unknown := sorted(set(params) - set(method.params)):
        raise InputError(
            f"method {name}",
            found=f"parameter {unknown[0]!r}",
            expected=", ".join(method.params),
            fix="remove or rename it",
        )
    values: dict[str, Any] = {}
    for key, param in method.params.items():
        if key not in params and param.default is param.empty:
            raise InputError(
                f"method {name}", found=f"no {key!r}", expected=_wants(param, count), fix="set it"
            )
        values[key] = _typed(f"{name}.{key}", param, params.get(key, param.default), count)
    flags = tuple((key, value) for key, value in values.items() if isinstance(value, bool))
    return method, {key: values[key] for key in values if key not in dict(flags)}, flags


def _wants(param: inspect.Parameter, count: int) -> str:
    if param.annotation == Weights:
        return f"{count} finite numbers, one a member"
    return "True or False" if param.annotation is bool else "a finite number"


def _typed(where: str, param: inspect.Parameter, value: Any, count: int) -> Any:
    """The value as its parameter's type, or InputError."""
    many = param.annotation == Weights
    good = isinstance(value, bool)
    if param.annotation is not bool:
        is_list = isinstance(value, Sequence | np.ndarray) and not isinstance(value, str)
        items = list(value) if is_list else [value]
        good = is_list == many and len(items) == (count if many else 1) and all(map(_finite, items))
    if not good:
        raise InputError(where, found=repr(value), expected=_wants(param, count), fix="correct it")
    if param.annotation is bool:
        return value
    return np.asarray(value, np.float32)


def _finite(x: Any) -> bool:
    """A number, finite in float32 too."""
    number = isinstance(x, numbers.Real) and type(x) is not bool
    return number and abs(float(x)) <= float(np.finfo(np.float32).max)
