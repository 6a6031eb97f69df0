"""LLaVA's projectors, named by their place in a torch Sequential."""

import re
from collections.abc import Mapping
from typing import Any

from converters.rules import Table, dense
from vfjax import InputError
from vfjax.connectors import MLPConfig

MOST = 8
"""Layers that a projector has at most."""


def config(hf: Mapping[str, Any]) -> MLPConfig:
    """From `mm_projector_type`, `din` and `dout`.

    Raises:
        InputError: a projector of another kind.
    """
    kind = hf["mm_projector_type"]
    deep = re.fullmatch(r"mlp([1-9])x_gelu", kind)
    if kind != "linear" and (deep is None or int(deep[1]) > MOST):
        raise InputError(
            "config.json: mm_projector_type",
            found=repr(kind),
            expected=f"'linear' or 'mlpNx_gelu' with N up to {MOST}",
            fix="this connector is not supported yet",
        )
    return MLPConfig(
        din=hf["din"],
        dout=hf["dout"],
        layers=int(deep[1]) if deep else 1,
        act=hf.get("act", "gelu"),
    )


TABLE = Table(
    types=("mlp",),
    config=config,
    rules=tuple(rule for i in range(MOST) for rule in dense(f"{2 * i}", f"layers/{i}")),
)
