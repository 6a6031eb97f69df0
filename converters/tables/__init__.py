"""Every table and layout of this folder, found by looking: a new family is a new file here."""

import importlib
import pkgutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from converters.rules import Table
from vfjax import InputError
from vfjax.errors import cut

if TYPE_CHECKING:
    from converters.layouts import Layout

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
    """Imports the modules of this folder and collects their TABLE or TABLES, and LAYOUTS."""
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        found = importlib.import_module(f"{__name__}.{module.name}")
        own = (found.TABLE,) if hasattr(found, "TABLE") else getattr(found, "TABLES", ())
        TABLES.update({kind: table for table in own for kind in table.types})
        LAYOUTS.extend(getattr(found, "LAYOUTS", ()))
