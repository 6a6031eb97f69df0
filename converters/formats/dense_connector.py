"""Dense Connector folders (DenseConnector llava/model; arXiv 2405.13800): several layers."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.formats import llava
from converters.formats.llava import (
    is_upstream,
    upstream_branch,
    upstream_names,
    upstream_source,
    upstream_tower,
)
from converters.params import siglip
from converters.source import Layout, Made, New, Source
from converters.towers import Towers
from converters.values import ANY, DEEPEST, Unused, Values
from vfjax.architectures import dense
from vfjax.atomic import JSON

KINDS = ("sti", "sci", "dci")


def groups(config: Values, encoder: Mapping[str, JSON]) -> dict[str, Any]:
    """What the connector reads, by the kind and the tower; see `vfjax.architectures.dense`.

    The published code has fixed layers, those of CLIP-L and SigLIP-so400m (DenseConnector
    llava/model/multimodal_encoder). CLIP's second mean includes the plain feature, SigLIP's does
    not. SigLIP has no class token. `mm_dense_connector_layers` is ours, for towers of other depths.
    """
    kind = config.choice("mm_dense_connector_type", KINDS)
    fixed = is_siglip(encoder)
    layers = config.whole(LAYERS, PUBLISHED[fixed], most=DEEPEST)
    plain = llava.select_layer(config)
    if fixed and LAYERS not in config:
        plain = layers
    combine = dense(kind, layers, plain, drop=0 if fixed else 1)
    return {
        "groups": [list(group) for group in combine.groups],
        "axis": combine.axis,
        "pool": combine.pool,
        "drop": combine.drop,
    }


UNUSED: Unused = {**llava.UNUSED, "if_pool": ANY, "is_video": (False, None)}
"""Its code pools the tokens of videos, if_pool says whether."""

LAYERS = "mm_dense_connector_layers"

PUBLISHED = {False: 24, True: 26}
"""Whether it is SigLIP -> hidden states that the published code shares out."""


def is_siglip(encoder: Mapping[str, JSON]) -> bool:
    """Whether a tower is a SigLIP, whose last layer Dense Connector leaves out."""
    return encoder["model_type"] in siglip.TABLE.types


def new_config(kind: str, made: Made) -> dict[str, Any]:
    """Keys of config.json from which `groups` reads a kind over a new model's tower."""
    cut = is_siglip(made.tower.config)
    shared = made.encoder.layers - cut
    fixed = shared == PUBLISHED[cut] and (not cut or made.select == -2)
    out = {"mm_dense_connector_type": kind} | ({} if fixed else {LAYERS: shared})
    if kind != "sti":
        out["mm_hidden_size"] = 3 * made.encoder.width
    if "side" in made.options:
        out["mm_dense_connector_side"] = made.options["side"]
    return out


def describe(path: Path, config: Values, towers: Towers) -> Source:
    """Normal form: LLaVA's, with more layers read.

    `mm_dense_connector_side` is ours: the published code lacks the paper's efficient variant (12
    tokens a side in place of CLIP's 24, resized before the projector).

    Raises:
        InputError: a side for tokens that are not on a grid, or one that is no positive number.
    """
    tower = upstream_tower(path, config, towers)
    branch = upstream_branch(config, tower)
    branch["connector"] |= groups(config, tower.config)
    if "mm_dense_connector_side" in config:
        side = config.whole("mm_dense_connector_side")
        if branch["connector"]["axis"] == "tokens":
            raise config.error("mm_dense_connector_side", "none without 'sci' or 'dci'")
        branch["connector"]["side"] = side
    template = "llama_3_dc" if config.any("vocab_size") == 128256 else ""
    return upstream_source(
        path, "dense-connector", config, branch, tower, template=template, own=UNUSED
    )


LAYOUTS = (
    Layout(
        "dense-connector",
        lambda config: is_upstream(config) and config.get("mm_dense_connector_type") in KINDS,
        describe,
        upstream_names,
        unused=UNUSED,
    ),
)


NEW = tuple(
    New(
        kind,
        ("projector", "select", *(() if kind == "sti" else ("side",))),
        describe,
        functools.partial(new_config, kind),
        llava.new_prefixes,
    )
    for kind in KINDS
)
