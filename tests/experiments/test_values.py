"""Values that the command line takes for a config."""

import importlib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from experiments.values import ITEMS, check_values
from tests.test_bad_input import refused

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(path.stem for path in (ROOT / "experiments" / "configs").glob("*.py"))


def config(name: str) -> ConfigDict:
    return importlib.import_module(f"experiments.configs.{name}").get_config()


@pytest.mark.parametrize("name", NAMES)
def test_configs_as_they_are(name: str):
    check_values(config(name))


def test_all_patterns_are_some_key():
    keys: set[str] = set()
    for name in NAMES:
        keys |= set(_keys(config(name)))
    assert not [name for name in ITEMS if not any(fnmatch(key, name) for key in keys)]


def _keys(config: ConfigDict, where: str = "") -> list[str]:
    return [
        each
        for key, value in config.items()
        for each in (
            _keys(value, f"{where}{key}.") if isinstance(value, ConfigDict) else [where + key]
        )
    ]


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("fuse", "members", (1,)),
        ("fuse", "towers", ((),)),
        ("fuse", "shard_gb", float("nan")),
        ("train", "stages.align.data", (None,)),
        ("train", "stages.align.train", ("a",)),
        ("train", "stages.tune.train", (("a", "b"),)),
        ("train", "stages.tune.weights", ("a",)),
        ("train", "stages.tune.warmup", float("inf")),
        ("train", "mesh", (1, "a")),
        ("train", "mesh", (-1, 1)),
        ("train", "mesh", (1, 1, 1, 1)),
        ("train", "profile", (1.5, 2)),
        ("train", "profile", (1, 2, 3)),
        ("train", "order", (1,)),
        ("evaluate", "shard", (("a", 1),)),
        ("evaluate", "prune.keep", ("a",)),
        ("search", "grid", (True, 1)),
        ("search", "grid", (0.5, float("nan"))),
        ("serve", "allow_hosts", (b"a",)),
        ("plan", "train.full", (("a", 1, 2),)),
        ("plan", "depths", (2.0,)),
    ],
)
def test_items_that_no_task_reads(name: str, key: str, value: Any):
    """Each is named by its key, before anything is read."""
    given = config(name)
    with given.unlocked():
        given.update_from_flattened_dict({key: value})
    refused(lambda: check_values(given), f"config.{key}: found ", "; ")
