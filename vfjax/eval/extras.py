"""Libraries that only scoring and analysis need."""

import importlib
from types import ModuleType

from vfjax.errors import InputError


def needs(module: str, extra: str, package: str, where: str = "config.benchmark") -> ModuleType:
    """Imports a module of an extra; `where` names what asks for it.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            where,
            found=f"no {package} ({error})",
            expected="it",
            fix=f"pip install 'vfjax[{extra}]'",
        ) from None
