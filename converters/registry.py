"""Every table of `params` and layout of `formats`, found by looking: a new family is a new file."""

import importlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

from converters import formats, params
from converters.params.table import Table
from vfjax import InputError
from vfjax.errors import cut

if TYPE_CHECKING:
    from converters.source import Layout

TABLES: dict[str, Table] = {}
"""`model_type` of a component's config -> its table."""

LAYOUTS: list["Layout"] = []
"""All layouts; at most one matches a config."""


def find(config: Mapping[str, Any], where: str) -> Table:
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


def register() -> None:
    """Imports the modules of `params` and `formats`; collects their TABLE or TABLES, and LAYOUTS.

    Raises:
        ValueError: two tables of one `model_type`, or two layouts of one name.
    """
    for package in (params, formats):
        for found in map(importlib.import_module, _modules(package)):
            own = (found.TABLE,) if hasattr(found, "TABLE") else getattr(found, "TABLES", ())
            for table in own:
                for kind in table.types:
                    if TABLES.setdefault(kind, table) is not table:
                        raise ValueError(f"{found.__name__}: another table reads {kind!r}, too")
            for layout in getattr(found, "LAYOUTS", ()):
                if any(layout.name == known.name for known in LAYOUTS):
                    raise ValueError(f"{found.__name__}: another layout is called {layout.name!r}")
                LAYOUTS.append(layout)


def _modules(package: ModuleType) -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__, f"{package.__name__}."))
