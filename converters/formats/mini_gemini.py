"""Mini-Gemini folders (MGM mgm/model): CLIP and ConvNeXt, patch info mining."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from converters import registry
from converters.formats import dense_connector, llava
from converters.formats.llava import (
    own_prefixes,
    upstream_branch,
    upstream_names,
    upstream_source,
    upstream_tower,
)
from converters.params import llama
from converters.params.mlp import combine, projector, projector_rules
from converters.params.table import Arrays, Names, Rule, Table, dense, norm
from converters.source import Layout, Made, New, Source
from converters.towers import Tower, Towers, own_tower
from converters.values import ANY, Unused, Values
from vfjax import InputError
from vfjax.architectures import Inputs, MiniGemini, MiningConfig
from vfjax.architectures.base import PatchEncoder
from vfjax.vision.encoders import ConvNeXtConfig
from vfjax.vision.images import ImageSpec

MODELS = {
    f"{start}{end}": llm
    for start in ("mgm", "mini_gemini")
    for end, llm in (
        ("", "llama"),
        ("_llama", "llama"),
        ("_gemma", "gemma"),
        ("_mistral", "mistral"),
        ("_mixtral", "mixtral"),
    )
}
"""`model_type` -> the LLM's; early uploads are called mini_gemini."""

OWN = ("image_global", "image_grid", "image_size_aux", "optimize_vision_tower_aux")
"""Keys that are read, beside LLaVA's and those that begin with mm_."""

UNUSED: Unused = {**llava.UNUSED, "optimize_vision_tower": ANY}  # that copy is always read

TEMPLATES = {"gemma": "gemma", "mixtral": "mistral_instruct_mgm", "mistral": "mistral_instruct"}
"""LLM -> template of the published models, where it is not Vicuna's or Llama-3's."""


def read(hf: Values) -> MiningConfig:
    """Sizes from the checkpoint's config.

    Raises:
        InputError: features that are not one a patch, to which nothing mined can be added.
    """
    made = MiningConfig(
        projector=projector(hf),
        width=hf.whole("width"),
        aux_width=hf.whole("aux_width"),
        grid=hf.whole("grid", most=GRID),
        whole=hf.flag("whole"),
        combine=combine(hf),
    )
    if made.combine.axis == "tokens" or made.combine.side:
        raise InputError(
            "config.json: mm_dense_connector_type",
            found="tokens that are not one a patch, in patch info mining",
            expected="one token a patch",
            fix="use 'sci' or 'dci', without a side",
        )
    return made


GRID = 16
"""Most views a side."""


def path(
    hf: Values, images: ImageSpec, encoder: PatchEncoder, connector: MiningConfig
) -> MiniGemini:
    """The high-resolution picture, and views of it for the encoder."""
    side = hf.whole("image_size_aux")
    high = dataclasses.replace(images, size=side, edge=side)
    return MiniGemini(encoder, connector, high, hf.any("aux"), size=images.size)


def recorded(config: MiningConfig, inputs: Inputs, stages: Arrays) -> Arrays:
    """MGM's names; of the joined map the tests keep every few rows and columns, from 1 on."""
    crops = config.grid**2
    out: dict[str, np.ndarray] = {
        **stages,
        "pixel_values": np.moveaxis(np.asarray(inputs.pixels), -1, 1),
        "pixel_values_aux": np.moveaxis(np.asarray(inputs.others["aux"]), -1, 1),
        "aux_features_strided": stages["aux_features"].transpose(0, 3, 1, 2)[:, :, 1::4, 1::4],
    }
    if config.whole:
        mined = out.pop("mined")
        out |= {"mined_local": mined[:crops], "mined_global": mined[crops:]}
    return out


def asker(source: str, path: str) -> tuple[Rule, ...]:
    """Rules of a layer norm and a dense layer in a torch Sequential."""
    return (*norm(f"{source}.0", f"{path}/norm"), *dense(f"{source}.1", f"{path}/dense"))


TABLE = Table(
    types=("mining",),
    read=read,
    unused={},
    path=path,
    others=("aux",),
    recorded=recorded,
    limits={"pixel_values": 1e-5},  # resized after their normalisation
    rules=(
        *projector_rules("mm_projector.", "projector"),
        *asker("vlm_uni_query_projector", "query"),
        *asker("vlm_uni_aux_projector", "key"),
        *asker("vlm_uni_val_projector", "value"),
    ),
)


def describe(path: Path, config: Values, towers: Towers) -> Source:
    """Normal form. The CLIP copy in the checkpoint is the one to read, the ConvNeXt's is not."""
    tower = upstream_tower(path, config, towers)
    aux = towers.find(path, config.text("mm_vision_tower_aux"), "vision_tower_aux")
    branch = upstream_branch(config, tower)
    branch["others"] = {"aux": aux.config}
    if config.choice("mm_dense_connector_type", dense_connector.KINDS, None):
        branch["connector"] |= dense_connector.groups(config, tower.config)
    branch["connector"] |= {
        "model_type": "mining",
        "width": registry.find(tower.config, str(path)).config(tower.config).width,
        "aux_width": config.whole("mm_hidden_size_aux"),
        "grid": config.whole("image_grid", 1, most=GRID),
        "whole": config.flag("image_global", False, null=True),
        "image_size_aux": config.whole("image_size_aux", 320),
    }
    llm = MODELS[config.text("model_type")]
    source = upstream_source(
        path,
        "mgm",
        config,
        branch,
        tower,
        others={"aux": aux},
        llm=llm,
        template=template(llm, config),
        own={*OWN, *UNUSED},
    )
    own = dict(source.llm)
    if own.get("hidden_act") == "gelu" and llm == "gemma":
        own["hidden_act"] = "gelu_python"  # MGM's transformers takes it to the letter
    part = f"branches.{branch['name']}"
    tuned = config.flag("optimize_vision_tower_aux", False, null=True)
    return dataclasses.replace(
        source,
        llm=own,
        tuned=(f"{part}.encoder", *([f"{part}.aux"] if tuned else [])),
    )


def template(llm: str, config: Values) -> str:
    """What the authors' scripts pass for each published model, told apart by LLM and vocabulary."""
    by_vocabulary = {128256: "llama_3", 64000: "chatml_direct"}
    size = config.whole("vocab_size", 32000, most=llama.VOCABULARY)
    return TEMPLATES.get(llm) or by_vocabulary.get(size, "vicuna_v1")


def convnext(path: str | Path) -> Tower:
    """The folder of the second encoder, which is fed by the first one's preprocessor.

    Raises:
        InputError: it is another encoder, or see `converters.towers.read_tower`.
    """
    tower = own_tower(path)
    if not isinstance(registry.find(tower.config, str(path)).config(tower.config), ConvNeXtConfig):
        raise InputError(
            path,
            found=f"model_type {tower.config['model_type']!r}",
            expected="an OpenCLIP ConvNeXt for connector 'mgm'",
            fix="choose another second encoder",
        )
    return tower


MADE = {
    "llama": ("mgm", "MGMLlamaForCausalLM"),
    "mistral": ("mgm_mistral", "MGMMistralForCausalLM"),
}
"""LLM -> `model_type` and class of Mini-Gemini's code around it."""


def new_config(made: Made) -> dict[str, Any]:
    """The keys of config.json around a new connector.

    Raises:
        InputError: a high-resolution map that the encoder's tokens do not divide.
    """
    aux, encoder, options = made.aux, made.encoder, made.options
    assert aux is not None
    grid = options.get("image_grid", 1)
    side = options.get("image_size_aux", 2 * grid * encoder.image_size)
    cells = grid * math.isqrt(encoder.tokens)
    if side % 32 or side // 4 % cells:
        raise InputError(
            "connector 'mgm': image_size_aux",
            found=f"{side}, a map of {side // 4} pixels a side",
            expected=f"a multiple of 32 whose quarter is one of {cells}, the tokens a side",
            fix="choose another size",
        )
    name, architecture = MADE.get(made.llm, MADE["llama"])
    return {
        "model_type": name,
        "architectures": [architecture],
        "mm_hidden_size_aux": sum(
            registry.find(aux.config, str(aux.path)).config(aux.config).widths
        ),
        "image_size_aux": side,
        "image_grid": grid,
        "image_global": bool(options.get("image_global", False)),
    }


def names(source: Source) -> Names:
    """Names of the parts that are not LLaVA's."""
    branch = f"branches.{source.branches[0].name}"
    aux = "model.vision_tower_aux."
    return (
        ("model.mm_projector.", f"{branch}.connector", "mm_projector."),
        ("model.vlm_uni_", f"{branch}.connector", "vlm_uni_"),
        (f"{aux}vision_stem.", f"{branch}.aux", "stem."),
        (f"{aux}vision_stages.", f"{branch}.aux", "stages."),
        *upstream_names(source),
    )


LAYOUTS = (
    Layout(
        "mgm",
        lambda config: config.get("model_type") in MODELS,
        describe,
        names,
        unused=UNUSED,
    ),
)


NEW = (
    New(
        "mgm",
        ("projector", "select", "image_size_aux", "image_grid", "image_global"),
        describe,
        new_config,
        lambda source: own_prefixes(source, names(source)),
        aux=convnext,
        needs="a ConvNeXt",
    ),
)
