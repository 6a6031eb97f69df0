"""SliME folders (SliME llava/model): tiles, resamplers, a router that reads the prompt."""

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np

from converters import registry
from converters.formats import llava
from converters.formats.llava import (
    is_upstream,
    own_prefixes,
    upstream_branch,
    upstream_names,
    upstream_source,
    upstream_tower,
)
from converters.params import llama
from converters.params.mlp import combine, group, projector, projector_rules
from converters.params.table import TRANSPOSE, Arrays, Names, Rule, Table, dense, norm
from converters.source import Layout, Made, New, Source
from converters.towers import Towers
from converters.values import Values
from vfjax import InputError
from vfjax.architectures import Slime, SliMEConfig
from vfjax.architectures.base import PatchEncoder
from vfjax.architectures.slime import Slices
from vfjax.vision.images import ImageSpec

OPTIONS = {
    "queries": "mm_resampler_dim",
    "top_p": "mm_resampler_topp",
    "temperature": "mm_resampler_temp",
    "gate": "mm_learnable_gated",
    "separator": "seperator",
}
"""Attributes of `SliMEConfig` -> keys of config.json."""

SHOWN = ("use_global_only", "use_local_only")

OWN = ("seperator", *SHOWN)
"""Keys that are read, beside LLaVA's and those that begin with mm_."""


def read(hf: Values) -> SliMEConfig:
    """Options under the checkpoint's names; missing ones as its code has them.

    Raises:
        InputError: queries that are no grid, or features of several groups of layers, or resized.
    """
    queries = hf.whole("mm_resampler_dim", 144)
    if math.isqrt(queries) ** 2 != queries:
        raise hf.error("mm_resampler_dim", "a square number")
    group(hf)
    if hf.whole("side", 0, least=0):
        raise hf.error("side", "0, as this connector reads all patches")
    return SliMEConfig(
        projector=projector(hf),
        width=hf.whole("din"),
        grid=hf.whole("grid", 24),  # fixed in upstream's connector, as all its encoders have it
        queries=queries,
        separator=hf.whole("seperator", 1919, least=0, most=llama.VOCABULARY),
        top_p=hf.number("mm_resampler_topp", 0.95),
        temperature=hf.number("mm_resampler_temp", 1.0, least=1e-9),
        gate=hf.whole("mm_learnable_gated", -1, least=-1, most=1),
        shown=shown(hf),
        combine=combine(hf),
        vocab=hf.whole("vocab", 0, least=0, most=llama.VOCABULARY),
    )


def shown(hf: Values) -> Literal["all", "global", "local"]:
    """Which tokens a stage's checkpoint reads (llava_arch.py, encode_images)."""
    whole, tiles = (hf.flag(key, False, null=True) for key in SHOWN)
    return "global" if whole else "local" if tiles else "all"


def path(hf: Values, images: ImageSpec, encoder: PatchEncoder, connector: SliMEConfig) -> Slime:
    """The whole picture and tiles."""
    del hf
    return Slime(encoder, connector, images)


def recorded(config: SliMEConfig, inputs: Slices, stages: Arrays) -> Arrays:
    """SliME's names, for a batch of one picture; empty slots for tiles are cut."""
    tiles = int(inputs.tile_mask[0].sum())
    local = tiles * config.queries
    return {
        "pixel_values": np.moveaxis(np.asarray(inputs.pixels), -1, 1)[: 1 + tiles],
        "vision_features": stages["vision_features"][: 1 + tiles],
        "gates": stages["gates"][0],
        "global_features": stages["global_features"][0],
        "local_compressed": stages["local_compressed"][:tiles],
        "local_projected_raster": stages["local_features"][0, :local],
        "router_scores": stages["router_scores"][0, :local],
        "selected_local": np.flatnonzero(stages["selected"][0]),
        "image_features": stages["image_features"][stages["keep"]],
    }


def resampler(source: str, path: str) -> tuple[Rule, ...]:
    """Rules of a resampler; torch keeps its queries', keys' and values' kernels in one tensor."""
    parts = tuple(
        rule
        for i, name in enumerate(("q", "k", "v"))
        for rule in (
            Rule(f"{source}.attn.in_proj_weight", f"{path}/{name}/kernel", TRANSPOSE, part=(i, 3)),
            Rule(f"{source}.attn.in_proj_bias", f"{path}/{name}/bias", part=(i, 3)),
        )
    )
    return (
        Rule(f"{source}.query", f"{path}/query"),
        Rule(f"{source}.pos_embed", f"{path}/pos"),
        *norm(f"{source}.ln_q", f"{path}/norm_q"),
        *norm(f"{source}.ln_kv", f"{path}/norm_kv"),
        *norm(f"{source}.ln_post", f"{path}/norm_post"),
        *parts,
        *dense(f"{source}.attn.out_proj", f"{path}/out"),
    )


TABLE = Table(
    types=("slime",),
    read=read,
    unused={},
    ids={"seperator": True},
    path=path,
    recorded=recorded,
    rules=(
        *projector_rules("mm_projector.projection.", "projector"),
        *resampler("mm_projector.attn", "expert"),
        *resampler("sampler.post_qformer", "sampler"),
        Rule("mm_projector.w_gate", "gate"),
        Rule("embedding.weight", "embedding", optional=True),  # vfjax's, see converters.fuse
    ),
    ignore=(r"mm_projector\.(w_noise|mean|std)",),  # of the noise in training
)


def describe(path: Path, config: Values, towers: Towers) -> Source:
    """Normal form.

    Raises:
        InputError: a router other than the published one.
    """
    config.choice("mm_resampler_type", ("cosine",))
    tower = upstream_tower(path, config, towers)
    own = {"mm_projector_type": "mlp2x_gelu", "image_grid_pinpoints": []}
    branch = upstream_branch(config.put(own), tower)
    for key in ("merge", "pinpoints"):  # not read by upstream
        branch["connector"].pop(key, None)
    branch["connector"] |= {"model_type": "slime"} | {
        key: config.any(key) for key in (*OPTIONS.values(), *SHOWN) if key in config
    }
    side = math.isqrt(registry.find(tower.config, str(path)).config(tower.config).tokens)
    if side != 24:
        branch["connector"]["grid"] = side
    template = "llama3" if config.any("vocab_size") == 128256 else "vicuna_v1"
    return upstream_source(path, "slime", config, branch, tower, template=template, own=OWN)


def new_config(made: Made) -> dict[str, Any]:
    """The keys of config.json around a new connector; options are those of `OPTIONS`.

    Raises:
        InputError: a separator that the LLM lacks, or queries that are no grid.
    """
    options, vocab = made.options, made.vocab
    separator = options.get("separator", SliMEConfig.separator)
    if not 0 <= separator < vocab:
        raise InputError(
            "connector 'slime': separator",
            found=str(separator),
            expected=f"the id of a token, below {vocab}",
            fix="choose the one that stands between global and local tokens",
        )
    queries = options.get("queries", SliMEConfig.queries)
    if math.isqrt(queries) ** 2 != queries:
        raise InputError(
            "connector 'slime': queries",
            found=str(queries),
            expected="a square number",
            fix="choose another",
        )
    own = {OPTIONS[key]: value for key, value in options.items() if key in OPTIONS}
    return {"mm_projector_type": "gated", "mm_resampler_type": "cosine", **own}


def names(source: Source) -> Names:
    """Names of the parts that are not LLaVA's."""
    branch = f"branches.{source.branches[0].name}"
    return (
        ("model.mm_projector.", f"{branch}.connector", "mm_projector."),
        ("model.sampler.", f"{branch}.connector", "sampler."),
        *upstream_names(source),
    )


LAYOUTS = (
    Layout(
        "slime",
        lambda config: is_upstream(config) and config.get("mm_projector_type") == "gated",
        describe,
        names,
        unused=llava.UNUSED,
    ),
)


NEW = (
    New(
        "slime",
        ("select", *OPTIONS),
        describe,
        new_config,
        lambda source: own_prefixes(source, names(source)),
    ),
)
