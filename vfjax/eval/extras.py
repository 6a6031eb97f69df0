"""Libraries that only scoring needs."""

import importlib
from typing import Any

from vfjax.errors import InputError


def needs(module: str, extra: str, package: str) -> Any:
    """Imports a module of an extra.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            "config.benchmark",
            found=f"no {package} ({error})",
            expected="it, to score by",
            fix=f"pip install 'vfjax[{extra}]', or pass --config.mode=predict and score elsewhere",
        ) from None
