"""Values of a config that the command line takes, and no task could use."""

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

from vfjax import InputError


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a tuple holds.

    Attributes:
        what: its items in words.
        good: whether something is one.
        numbers: of items that there may be; None for any.
    """

    what: str
    good: Callable[[object], bool]
    numbers: tuple[int, ...] | None = None


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _pair(*kinds: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: (
        isinstance(value, tuple | list)
        and len(value) == len(kinds)
        and all(good(each) for good, each in zip(kinds, value, strict=True))
    )


def _text(value: object) -> bool:
    return isinstance(value, str)


def _count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


TEXTS = Kind("texts", _text)
COUNTS = Kind("whole numbers from 0", _count)
NUMBERS = Kind("numbers", _number)
RATES = Kind("(pattern, rate) pairs", _pair(_text, _number))
SHARDS = Kind("(pattern, mapping) pairs", _pair(_text, lambda value: isinstance(value, Mapping)))

ITEMS: Mapping[str, Kind] = {
    **dict.fromkeys(("members", "towers", "more", "allow_hosts", "pairs", "order"), TEXTS),
    **dict.fromkeys(("depths", "seeds"), COUNTS),
    "mesh": Kind("one to three whole numbers", _count, (0, 1, 2, 3)),
    "profile": Kind("two whole numbers", _count, (2,)),
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
            _check_items(path, value)


def _check_items(path: str, value: tuple[object, ...]) -> None:
    kind = next((kind for name, kind in ITEMS.items() if fnmatch.fnmatch(path, name)), None)
    if kind is None:
        return
    wrong = [item for item in value if not kind.good(item)]
    if wrong or len(value) not in (kind.numbers or (len(value),)):
        raise InputError(
            f"config.{path}",
            found=repr(wrong[0] if wrong else value),
            expected=f"a tuple of {kind.what}",
            fix=f'pass --config.{path}="(...,)"',
        )
