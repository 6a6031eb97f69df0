"""Every table of `params` and `formats`, found by looking: a new family is a new file."""

import importlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from converters import formats, params
from converters.params.table import Table
from vfjax import InputError
from vfjax.atomic import JSON
from vfjax.errors import cut

TABLES: dict[str, Table[Any]] = {}
"""`model_type` of a component's config -> its table."""


def find(config: Mapping[str, JSON], where: str) -> Table[Any]:
    """The table for a component's config.

    Raises:
        InputError: there is none.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in TABLES:
        raise InputError(
            where,
            found=f"model_type {cut(repr(kind))}",
            expected=", ".join(sorted(TABLES)),
            fix="this architecture is not supported yet",
        )
    return TABLES[kind]


def modules() -> list[ModuleType]:
    """Imports those of `params` and `formats`."""
    return [
        importlib.import_module(found.name)
        for package in (params, formats)
        for found in sorted(
            pkgutil.iter_modules(package.__path__, f"{package.__name__}."), key=lambda m: m.name
        )
    ]


def register(module: ModuleType) -> None:
    """Adds a module's TABLE or TABLES.

    Raises:
        ValueError: another table reads the same `model_type`.
    """
    own = (module.TABLE,) if hasattr(module, "TABLE") else getattr(module, "TABLES", ())
    for table in own:
        for kind in table.types:
            if TABLES.setdefault(kind, table) is not table:
                raise ValueError(f"{module.__name__}: another table reads {kind!r}, too")
