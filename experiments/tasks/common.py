"""What the tasks share: named folders from flags, progress bars."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from tqdm import tqdm

import converters
from converters.files import hub
from vfjax import InputError, Model, Processor, Prune
from vfjax.errors import check
from vfjax.sharding import make_mesh

FAMILY = Path(__file__).resolve().parents[1] / "family" / "models"
"""The shipped family: base and members."""


def named(key: str, items: Sequence[str]) -> dict[str, str]:
    """`converters.files.hub.by_names` of a key of the config."""
    return hub.by_names(items, f"config.{key}")


def required(config: ConfigDict, *keys: str) -> None:
    """Raises InputError for the first key that has no value."""
    for key in keys:
        if not config[key]:
            raise InputError(
                f"config.{key}", found="nothing", expected="a value", fix=f"pass --config.{key}=..."
            )


def check_config(config: ConfigDict, *rules: tuple[str, object, str]) -> None:
    """Raises InputError for the first of (key, whether its value is right, what is expected)."""
    check((f"config.{key}", repr(config[key]), right, expected) for key, right, expected in rules)


def positive(config: ConfigDict, *keys: str) -> None:
    """Raises InputError for the first key whose value is not above 0."""
    check_config(config, *((key, config[key] > 0, "more than 0") for key in keys))


@contextmanager
def bar(what: str) -> Iterator[Any]:
    """A progress bar of bytes, where stderr is a terminal; yields the callable that advances it."""
    with tqdm(desc=what, unit="B", unit_scale=True, disable=None) as progress:
        yield progress.update


def load(config: ConfigDict, folder: str | Path) -> tuple[Model, Processor]:
    """A model by the config's `mesh`, `dtype`, `towers`, `int8`s, `shard` and `prune`."""
    prune = config.get("prune")
    with bar("load") as progress:
        return converters.load(
            folder,
            mesh=make_mesh(*config.mesh) if config.mesh else None,
            dtype=config.dtype,
            towers=named("towers", config.towers),
            int8=bool(config.get("int8")),
            int8_cache=bool(config.get("int8_cache")),
            shard=config.get("shard", ()),
            prune=Prune(tuple(prune.keep), prune.by, prune.depth) if prune and prune.keep else None,
            progress=progress,
        )
