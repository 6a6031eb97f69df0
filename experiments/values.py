"""Values of a config that the command line takes, and no task could use."""

import fnmatch
import math
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from vfjax import InputError

Kind = tuple[str, Callable[[Any], bool]]
"""Items of a tuple in words, and whether something is one."""


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _pair(*kinds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, tuple | list)
        and len(value) == len(kinds)
        and all(good(each) for good, each in zip(kinds, value, strict=True))
    )


def _text(value: Any) -> bool:
    return isinstance(value, str)


TEXTS: Kind = ("texts", _text)
COUNTS: Kind = ("whole numbers from 0", lambda value: type(value) is int and value >= 0)
NUMBERS: Kind = ("numbers", _number)
RATES: Kind = ("(pattern, rate) pairs", _pair(_text, _number))
SHARDS: Kind = ("(pattern, mapping) pairs", _pair(_text, lambda value: isinstance(value, Mapping)))

ITEMS: Mapping[str, Kind] = {
    **dict.fromkeys(("members", "towers", "more", "allow_hosts", "pairs", "order"), TEXTS),
    **dict.fromkeys(("mesh", "depths", "profile", "seeds"), COUNTS),
    **dict.fromkeys(("grid", "prune.keep", "stages.*.weights"), NUMBERS),
    **dict.fromkeys(("stages.*.train", "train.*"), RATES),
    "stages.*.data": TEXTS,
    "shard": SHARDS,
}
"""Pattern of a key -> what its tuple holds; others their task reads item by item."""


def check_values(config: ConfigDict, where: str = "") -> None:
    """Passes if all numbers are finite, and all tuples of items that their task can read.

    Args:
        config: as it is after the command line's changes; ml_collections checks types of scalars.
        where: key of the config inside another, with a dot.

    Raises:
        InputError: another value.
    """
    for key, value in config.items():
        path = where + key
        if isinstance(value, ConfigDict):
            check_values(value, f"{path}.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise InputError(
                f"config.{path}", found=value, expected="a finite number", fix="correct it"
            )
        elif isinstance(value, tuple):
            kinds = (kind for name, kind in ITEMS.items() if fnmatch.fnmatch(path, name))
            what, good = next(kinds, ("", lambda _: True))
            if wrong := [item for item in value if not good(item)]:
                raise InputError(
                    f"config.{path}",
                    found=repr(wrong[0]),
                    expected=f"a tuple of {what}",
                    fix=f'pass --config.{path}="(...,)"',
                )
