"""Dense Connector folders (DenseConnector llava/model; arXiv 2405.13800): several layers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.layouts import Layout, Source
from converters.tables.llava import (
    choice,
    is_upstream,
    upstream_branch,
    upstream_names,
    upstream_source,
    upstream_tower,
)
from converters.towers import Towers
from vfjax import InputError

KINDS = ("sti", "sci", "dci")


def groups(path: Path, config: Mapping[str, Any], encoder: Mapping[str, Any]) -> dict[str, Any]:
    """What the connector reads: its fixed layers, by the kind and the tower.

    DenseConnector llava/model/multimodal_encoder; layer 0 is the embedding output. CLIP's second
    mean includes the plain feature, SigLIP's does not. SigLIP has no class token.
    """
    kind = choice(path, config, "mm_dense_connector_type", "", KINDS)
    siglip = encoder["model_type"].startswith("siglip")
    plain = 26 if siglip else config.get("mm_vision_select_layer", -2)
    half = 13 if siglip else 12
    halves = [list(range(half)), list(range(half, 2 * half))]
    return {
        "groups": [[plain], *(halves if kind == "dci" else [[7], [15]])],
        "axis": "tokens" if kind == "sti" else "channels",
        "pool": 8 if kind == "sti" else 1,
        "drop": 0 if siglip else 1,
    }


def describe(path: Path, config: dict[str, Any], towers: Towers) -> Source:
    """Normal form: LLaVA's, with more layers read.

    `mm_dense_connector_side` is ours: the published code lacks the paper's efficient variant (12
    tokens a side in place of CLIP's 24, resized before the projector).

    Raises:
        InputError: a side for tokens that are not on a grid, or one that is no positive number.
    """
    tower = upstream_tower(path, config, towers)
    branch = upstream_branch(path, config, tower)
    branch["connector"] |= groups(path, config, tower.config)
    if "mm_dense_connector_side" in config:
        side = config["mm_dense_connector_side"]
        if branch["connector"]["axis"] == "tokens" or type(side) is not int or side < 1:
            raise InputError(
                f"{path / 'config.json'}: mm_dense_connector_side",
                found=f"{side!r} with {config['mm_dense_connector_type']!r}",
                expected="a positive whole number with 'sci' or 'dci'",
                fix="correct the config",
            )
        branch["connector"]["side"] = side
    template = "llama_3_dc" if config.get("vocab_size") == 128256 else ""
    return upstream_source(path, "dense-connector", config, branch, tower, template=template)


LAYOUTS = (
    Layout(
        "dense-connector",
        lambda config: is_upstream(config) and config.get("mm_dense_connector_type") in KINDS,
        describe,
        upstream_names,
    ),
)
