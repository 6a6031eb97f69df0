"""COMM folders (arXiv 2310.08825). The authors published neither code nor weights: this is ours.

LLaVA's layout with a second tower under Mini-Gemini's key (`mm_vision_tower_aux`),
`mm_projector_type` "comm", and what the connector reads and how under `mm_comm`.
"""

import dataclasses
from pathlib import Path

from converters import registry
from converters.formats import llava
from converters.formats.llava import (
    is_upstream,
    upstream_branch,
    upstream_names,
    upstream_source,
    upstream_tower,
)
from converters.params import mlp
from converters.params.mlp import group
from converters.params.table import Rule, Table, dense, norm
from converters.preprocessor import from_preprocessor
from converters.source import Layout, New, Source
from converters.towers import Towers, transformer_tower
from converters.values import ANY, DEEPEST, Values
from vfjax import InputError
from vfjax.architectures import Comm, COMMConfig, MergeConfig
from vfjax.architectures.base import PatchEncoder
from vfjax.architectures.comm import MERGES
from vfjax.vision.images import ImageSpec

OPTIONS = ("layers", "layers_aux", "merge", "blocks", "ratio", "join")
"""Keys of `mm_comm`; see `vfjax.architectures.MergeConfig` and `COMMConfig`."""


def read(hf: Values) -> COMMConfig:
    """Layers and widths of both encoders; the MLPs stand behind the second one only."""
    merge = hf.choice("merge", MERGES)
    encoder = MergeConfig(hf.whole("din"), group(hf), hf.whole("drop", least=0), merge)
    aux = None
    if "layers_aux" in hf:
        layers, drop = (
            hf.wholes("layers_aux", least=-DEEPEST, most=DEEPEST),
            hf.whole("drop_aux", least=0),
        )
        blocks, ratio = hf.whole("blocks", least=0, most=DEEPEST), hf.whole("ratio")
        aux = MergeConfig(hf.whole("din_aux"), layers, drop, merge, blocks, ratio)
    return COMMConfig(encoder, hf.whole("dout"), aux, hf.choice("join", ("channels", "tokens")))


def path(hf: Values, images: ImageSpec, encoder: PatchEncoder, connector: COMMConfig) -> Comm:
    """The same pixels for both encoders, each with the mean and deviation it was trained on.

    Raises:
        InputError: the second encoder takes no pictures of this size, or has other tokens.
    """
    aux = hf.any("aux")
    if aux is None:
        return Comm(encoder, connector, images)
    if images.size != getattr(aux, "input_size", aux.image_size):
        raise InputError(
            "second vision tower",
            found=f"one for pictures of {aux.image_size} pixels",
            expected=f"{images.size}, as the first one is shown",
            fix="choose another",
        )
    own = from_preprocessor(
        hf.mapping("preprocessor_aux"),
        aspect=images.aspect,
        name="second vision tower: preprocessor",
    )
    shown = dataclasses.replace(images, mean=own.mean, std=own.std)
    connector.tokens(encoder.tokens, aux.tokens)
    return Comm(encoder, connector, images, aux, images_aux=shown)


def merge_rules(part: str) -> tuple[Rule, ...]:
    """Rules of one encoder's merge: of each kind that it may be."""
    layer, block = f"{part}/layers/{{}}", f"{part}/mlp/{{}}"
    return (
        Rule(f"{part}.logits", f"{part}/logits"),
        *norm(f"{part}.layers.{{}}.norm", f"{layer}/norm"),
        *dense(f"{part}.layers.{{}}.linear", f"{layer}/dense"),
        *dense(f"{part}.layers.{{}}.conv", layer),
        *dense(f"{part}.mlp.{{}}.fc1", f"{block}/fc1"),
        *dense(f"{part}.mlp.{{}}.fc2", f"{block}/fc2"),
    )


TABLE = Table(
    types=("comm",),
    read=read,
    unused=dict.fromkeys(("act", "blocks", "mm_projector_type", "ratio"), ANY),
    path=path,
    others=("aux",),
    recorded=mlp.recorded,
    limits={"aux_features": 1e-4},
    rules=(
        *merge_rules("encoder"),
        *merge_rules("aux"),
        *dense("projector", "projector"),
    ),
)


def describe(path: Path, config: Values, towers: Towers) -> Source:
    """Normal form; options that `mm_comm` lacks have the paper's values, or else ours.

    Layers: all of the first encoder, the last quarter of the second (1..24 and 19..24 of 24). One
    MLP of ratio 4 on the second.

    Raises:
        InputError: an unknown option.
    """
    options = config.section("mm_comm", None)
    if unknown := sorted(set(options.data) - set(OPTIONS)):
        raise InputError(
            f"{options.where}",
            found=repr(unknown[0]),
            expected=", ".join(OPTIONS),
            fix="remove it",
        )
    tower = upstream_tower(path, config, towers)
    encoder = registry.find(tower.config, str(path)).config(tower.config)
    layers = options.wholes("layers", None, least=-DEEPEST, most=DEEPEST)
    branch = upstream_branch(config, tower)
    connector = branch["connector"]
    connector |= {
        "model_type": "comm",
        "groups": [list(layers or range(1, encoder.layers + 1))],
        "drop": encoder.prefix,
        "merge": options.text("merge", "lln_layerscale"),
        "blocks": options.whole("blocks", 1, least=0, most=DEEPEST),
        "ratio": options.whole("ratio", 4),
        "join": options.text("join", "channels"),
    }
    others = {}
    if name := config.text("mm_vision_tower_aux", None):
        second = towers.find(path, name, "vision_tower_aux")
        aux = registry.find(second.config, str(path)).config(second.config)
        layers = options.wholes("layers_aux", None, least=-DEEPEST, most=DEEPEST)
        last = range(aux.layers - max(1, aux.layers // 4) + 1, aux.layers + 1)
        connector |= {
            "din_aux": aux.width,
            "layers_aux": list(layers or last),
            "drop_aux": aux.prefix,
            "preprocessor_aux": second.preprocessor,
        }
        branch["others"] = {"aux": second.config}
        others["aux"] = second
    return upstream_source(path, "comm", config, branch, tower, others=others)


LAYOUTS = (
    Layout(
        "comm",
        lambda config: is_upstream(config) and config.get("mm_projector_type") == "comm",
        describe,
        upstream_names,
        unused=llava.UNUSED,
    ),
)


NEW = (
    New(
        "comm",
        OPTIONS,
        describe,
        lambda made: {"mm_projector_type": "comm", "mm_comm": dict(made.options)},
        llava.new_prefixes,
        aux=transformer_tower,
        registers=True,
    ),
)
