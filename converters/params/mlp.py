"""LLaVA's projectors, named by their place in a torch Sequential, and what goes into them."""

import math
import re

import numpy as np

from converters.params.table import Arrays, Rule, Table, dense
from converters.values import DEEPEST, REQUIRED, Values
from vfjax import InputError
from vfjax.architectures import (
    Combine,
    Inputs,
    Llava,
    LlavaNext,
    MLPConfig,
    ProjectorConfig,
)
from vfjax.architectures.base import PatchEncoder
from vfjax.errors import cut
from vfjax.vision.images import ImageSpec

MOST = 8
"""Layers that a projector has at most."""


def projector(hf: Values) -> MLPConfig:
    """From `mm_projector_type`, `din`, `dout`, `act` and `bias`.

    Raises:
        InputError: a projector of another kind.
    """
    kind = hf.text("mm_projector_type")
    deep = re.fullmatch(r"mlp([1-9])x_gelu", kind)
    if kind != "linear" and (deep is None or int(deep[1]) > MOST):
        raise InputError(
            f"{hf.where}: mm_projector_type",
            found=cut(repr(kind)),
            expected=f"'linear' or 'mlpNx_gelu' with N up to {MOST}",
            fix="this connector is not supported yet",
        )
    layers = int(deep[1]) if deep else 1
    act, bias = hf.activation("act", "gelu"), hf.flag("bias", True)
    return MLPConfig(hf.whole("din"), hf.whole("dout"), layers, act, bias)


def projector_rules(source: str, path: str) -> tuple[Rule, ...]:
    """Rules of all layers that a projector may have; activations have the odd numbers."""
    return tuple(
        rule for i in range(MOST) for rule in dense(f"{source}{2 * i}", f"{path}/layers/{i}")
    )


def combine(hf: Values) -> Combine:
    """From `groups`, `axis`, `pool`, `drop` and `side`."""
    return Combine(
        groups=groups(hf),
        axis=hf.choice("axis", ("channels", "tokens"), "channels"),
        pool=hf.whole("pool", 1),
        drop=hf.whole("drop", least=0),
        side=hf.whole("side", 0, least=0),
    )


def groups(hf: Values) -> tuple[tuple[int, ...], ...]:
    """`groups`: one or more lists of layers.

    Raises:
        InputError: something else.
    """
    found = hf.any("groups", REQUIRED)
    parts = found if isinstance(found, list | tuple) else []
    if not parts or not all(isinstance(x, list | tuple) and x for x in parts):
        raise hf.error("groups", "lists of layers")
    each = Values({str(i): part for i, part in enumerate(parts)}, f"{hf.where}: groups")
    return tuple(each.wholes(i, least=-DEEPEST, most=DEEPEST) for i in each.data)


def group(hf: Values) -> tuple[int, ...]:
    """`groups` of a connector that reads one.

    Raises:
        InputError: there are several.
    """
    first, *others = groups(hf)
    if others:
        raise hf.error("groups", "one list of layers, all that this connector reads")
    return first


def config(hf: Values) -> ProjectorConfig:
    """A projector on joined hidden states; see `projector` and `combine`."""
    newline = hf.choice("merge", MERGES, "flat") == "spatial_unpad"
    return ProjectorConfig(projector(hf), combine(hf), newline)


MERGES = ("flat", "spatial", "spatial_unpad")
"""LLaVA's values of `mm_patch_merge_type`."""


def path(
    hf: Values, images: ImageSpec, encoder: PatchEncoder, connector: ProjectorConfig
) -> Llava | LlavaNext:
    """Tiles if the connector has `pinpoints`, the whole picture otherwise."""
    tokens = connector.combine.tokens(encoder.prefix + encoder.tokens - connector.combine.drop)
    if "pinpoints" not in hf:
        return Llava(encoder, connector, images)
    if connector.combine.axis == "tokens":
        raise InputError(
            "config.json: mm_dense_connector_type",
            found="tokens of several layers on tiles",
            expected="one token a patch",
            fix="use 'sci' or 'dci' with image_aspect_ratio 'anyres'",
        )
    if math.isqrt(tokens) ** 2 != tokens:
        raise InputError(
            hf.where,
            found=f"{tokens} tokens a tile",
            expected="a square of them: all patches, and no class token",
            fix="correct mm_vision_select_feature, or vision_feature_select_strategy",
        )
    merge, decimals = hf.choice("merge", MERGES), hf.whole("unpad_decimals", None, least=0)
    return LlavaNext(
        encoder, connector, images, pinpoints=hf.pairs("pinpoints"), merge=merge, decimals=decimals
    )


def recorded(config: object, inputs: Inputs, stages: Arrays) -> Arrays:
    """Stages have the names of LLaVA's code already; pixels are NCHW there."""
    del config
    return {**stages, "pixel_values": np.moveaxis(np.asarray(inputs.pixels), -1, 1)}


TABLE = Table(
    types=("mlp",),
    read=config,
    unused={},
    path=path,
    recorded=recorded,
    rules=(*projector_rules("", "projector"), Rule("image_newline", "newline", optional=True)),
)
