"""What `fuse` and its kin are asked for."""

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ParamSpec, TypeVar

from jax.typing import DTypeLike

from converters.files.output import check_new
from converters.files.paths import stand_in
from converters.vocabulary import BASE
from vfjax import InputError
from vfjax.atomic import JSON
from vfjax.errors import check, one_of
from vfjax.fusion.segments import check_arrangement
from vfjax.merge import METHODS
from vfjax.text.chat import known

ROUTERS = ("merged", "member")
"""Whose embeddings of the prompt a connector reads."""


EXPORTS = ("model", "whole", "llm")
"""What may be made of the members, see `converters.fuse`."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What to fuse, and how; see the arguments of `converters.fuse`."""

    members: Mapping[str, str | Path]
    out: str | Path
    base: str | Path | None = None
    method: str = "task_arithmetic"
    params: Mapping[str, JSON] | None = None
    rules: Sequence[tuple[str, Mapping[str, JSON]]] = ()
    recipe: str | Path | None = None
    export: str = "model"
    template: str | None = None
    dtype: DTypeLike | None = None
    positions: str = "running"
    mask: str = "causal"
    router: str = "merged"
    towers: Mapping[str, str | Path] | None = None
    vocab: str | None = None
    family: bool = True
    seed: int = 0
    shard_bytes: float = 5e9
    checksums: bool = True
    account: bool = True


P = ParamSpec("P")
R = TypeVar("R")


def by_name(function: Callable[P, R]) -> Callable[P, R]:
    """The function; a keyword that it lacks is said in one line with those that it has."""
    names = {name: x.kind for name, x in inspect.signature(function).parameters.items()}
    known = [name for name, kind in names.items() if kind is inspect.Parameter.KEYWORD_ONLY]

    @functools.wraps(function)
    def call(*args: P.args, **given: P.kwargs) -> R:
        if unknown := [name for name in given if name not in names]:
            raise InputError(
                "options",
                found=unknown[0],
                expected=", ".join(known),
                fix="correct it or leave it out",
            )
        return function(*args, **given)

    return call


def check_request(request: Request) -> None:
    """Raises InputError for an argument that is wrong whatever the members hold."""
    members, out = request.members, stand_in(request.out)
    if not isinstance(members, Mapping):
        raise InputError(
            "members",
            found=type(members).__name__,
            expected="names -> folders",
            fix="write {'a': 'path/to/a', 'b': 'path/to/b'}",
        )
    bad = [name for name in members if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name == BASE]
    if bad or bool(members) == (request.recipe is not None):
        raise InputError(
            "members",
            found=f"the name {bad[0]!r}" if bad else ", ".join(members) or "none",
            expected=f"names of letters, digits, - and _, other than {BASE!r}; none with a recipe",
            fix="rename the member" if bad else "name members, or a recipe",
        )
    one = request.method in METHODS and METHODS[request.method].takes[1] == 1
    if len(members) == 1 and not one:
        (folder,) = members.values()
        raise InputError(
            "members",
            found=f"one, {str(folder)!r}",
            expected="two or more to fuse",
            fix=f"name the others behind a comma, ({str(folder)!r}, 'path/to/another'); a mergekit "
            "YAML merges one model with its base",
        )
    rules = [
        one_of("export", request.export, EXPORTS),
        one_of("router", request.router, ROUTERS),
    ]
    if request.vocab is not None:
        rules.append(one_of("vocab", request.vocab, (BASE, *members)))
    check(rules, fix="choose one")
    if request.export == "whole":
        for key, default in (("positions", "running"), ("mask", "causal"), ("router", "merged")):
            if (given := getattr(request, key)) != default:
                raise InputError(
                    key,
                    found=f"{given!r} of a model that is merged whole",
                    expected=repr(default),
                    fix="leave it out",
                )
    check_arrangement(request.positions, request.mask)
    if request.recipe is not None and (request.params or request.rules or request.base):
        raise InputError(
            "recipe",
            found="params, rules or base beside it",
            expected="it alone",
            fix="write them in the recipe",
        )
    if request.template is not None:
        known(request.template)
    if str(request.out):
        check_new(out)
