"""LLaVA's projectors, named by their place in a torch Sequential, and what goes into them."""

import math
import re
from collections.abc import Mapping
from typing import Any

from converters.rules import Arrays, Rule, Table, dense
from vfjax import InputError
from vfjax.connectors import Combine, LLaVAConfig, MLPConfig
from vfjax.images import ImageSpec
from vfjax.views import Anyres, Whole

MOST = 8
"""Layers that a projector has at most."""


def projector(hf: Mapping[str, Any]) -> MLPConfig:
    """From `mm_projector_type`, `din`, `dout`, `act` and `bias`.

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
    layers = int(deep[1]) if deep else 1
    return MLPConfig(hf["din"], hf["dout"], layers, hf.get("act", "gelu"), hf.get("bias", True))


def projector_rules(source: str, path: str) -> tuple[Rule, ...]:
    """Rules of all layers that a projector may have; activations have the odd numbers."""
    return tuple(
        rule for i in range(MOST) for rule in dense(f"{source}{2 * i}", f"{path}/layers/{i}")
    )


def combine(hf: Mapping[str, Any]) -> Combine:
    """From `groups`, `axis`, `pool`, `drop` and `side`."""
    return Combine(
        groups=tuple(map(tuple, hf["groups"])),
        axis=hf.get("axis", "channels"),
        pool=hf.get("pool", 1),
        drop=hf["drop"],
        side=hf.get("side", 0),
    )


def config(hf: Mapping[str, Any]) -> LLaVAConfig:
    """A projector on joined hidden states; see `projector` and `combine`."""
    newline = hf.get("merge") == "spatial_unpad"
    return LLaVAConfig(projector(hf), combine(hf), newline)


def views(
    hf: Mapping[str, Any], images: ImageSpec, encoder: Any, connector: LLaVAConfig
) -> Whole | Anyres:
    """Tiles if the connector has `pinpoints`, the whole picture otherwise."""
    tokens = connector.combine.tokens(encoder.prefix + encoder.tokens - connector.combine.drop)
    if "pinpoints" not in hf:
        return Whole(images, tokens)
    if connector.combine.axis == "tokens":
        raise InputError(
            "config.json: mm_dense_connector_type",
            found="tokens of several layers on tiles",
            expected="one token a patch",
            fix="use 'sci' or 'dci' with image_aspect_ratio 'anyres'",
        )
    side = math.isqrt(tokens)
    if side**2 != tokens:
        raise InputError(
            "config.json: mm_vision_select_feature",
            found=f"{tokens} tokens a tile",
            expected="a square of them, without the class token",
            fix="use 'patch' with image_aspect_ratio 'anyres'",
        )
    pinpoints = tuple((int(w), int(h)) for w, h in hf["pinpoints"])
    return Anyres(images, pinpoints, side, hf["merge"], hf.get("unpad_decimals"))


def recorded(config: Any, inputs: Arrays, stages: Arrays) -> Arrays:
    """Stages have the names of LLaVA's code already; pixels are NCHW there."""
    del config
    return {**stages, "pixel_values": inputs["pixels"].transpose(0, 3, 1, 2)}


TABLE = Table(
    types=("mlp",),
    config=config,
    views=views,
    recorded=recorded,
    rules=(*projector_rules("", "projector"), Rule("image_newline", "newline", optional=True)),
)
