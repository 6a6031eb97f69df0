"""Cambrian-1 folders (cambrian/model): up to eight towers, the Spatial Vision Aggregator.

Only towers of the published models are read: SigLIP and ConvNeXt of OpenCLIP's, CLIP, DINOv2. Each
is a repository of its own, which config.json names by the names of multimodal_encoder/*_encoder.py;
no checkpoint holds one that its authors' code would read.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from converters import registry
from converters.formats import llava
from converters.formats.llava import prompt_template, select_layer, upstream_source
from converters.params.mlp import projector_rules
from converters.params.table import TRANSPOSE, Arrays, Names, Rule, Table, dense, norm
from converters.preprocessor import from_preprocessor
from converters.source import Layout, Source
from converters.towers import Tower, Towers
from converters.values import ANY, DEEPEST, Unused, Values
from vfjax import InputError
from vfjax.architectures import Cambrian, SVAConfig, TowerConfig
from vfjax.architectures.base import Encoder, Inputs, PatchEncoder
from vfjax.architectures.cambrian import HEADS, names
from vfjax.vision.encoders import ConvNeXtConfig
from vfjax.vision.images import ImageSpec

MODELS = {"cambrian_llama": "llama", "cambrian_phi3": "phi3"}
"""`model_type` -> the LLM's; the code's Mistral, Gemma and Cohere lack what images need."""

MOST = 8
"""Towers."""

Colour = tuple[float, ...]

OPENAI: Colour = (0.48145466, 0.4578275, 0.40821073)
"""What is around pictures for OpenCLIP's towers (base_encoder.py, ProcessorWrapper)."""

SHOWN: Mapping[str, tuple[Colour, Colour]] = {
    "siglip": ((0.5,) * 3, (0.5,) * 3),
    "convnext": (OPENAI, (0.26862954, 0.26130258, 0.27577711)),
}
"""Mean and deviation of OpenCLIP's towers whose open_clip_config.json says none."""

REPOSITORIES = {
    "siglip": {
        "siglip/CLIP-ViT-SO400M-14-384": "timm/ViT-SO400M-14-SigLIP-384",
        "timm/ViT-SO400M-14-SigLIP-384": "timm/ViT-SO400M-14-SigLIP-384",
        "siglip/CLIP-ViT-SO400M-14": "timm/ViT-SO400M-14-SigLIP",
        "timm/ViT-SO400M-14-SigLIP": "timm/ViT-SO400M-14-SigLIP",
    },
    "convnext": {
        "clip-convnext-L": "laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup",
        "clip-convnext-XXL": "laion/CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-soup",
    },
    "dinov2": {
        name: name
        for name in (
            *("facebook/dinov2-small", "facebook/dinov2-base", "facebook/dinov2-large"),
            *("facebook/dinov2-giant-imagenet1k-1-layer", "facebook/dinov2-giant"),
        )
    },
}
"""Kind of tower -> how a name of one begins -> its repository; the first that fits."""

KEYS = (
    *("connector_depth", "connector_only", "image_token_len", "num_query_group"),
    *("query_num_list", "vision_hidden_size"),
)
SAMPLERS = (
    "num_of_vision_sampler_layers",
    "start_of_vision_sampler_layers",
    "stride_of_vision_sampler_layers",
)
UNUSED: Unused = {
    **llava.UNUSED,
    **dict.fromkeys(SAMPLERS, ANY),  # with the connector alone
    "image_aspect_ratio": ANY,  # all are padded (mm_utils.py, process_images)
    "image_position": ANY,  # where the published prompts have the picture
    "mm_vision_sampler_lr": ANY,
    "vision_tower_aux_list": ANY,  # mm_vision_tower_aux_list comes first
    "vision_tower_aux_token_len_list": ANY,
}


def is_cambrian(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of Cambrian's code."""
    return config.get("model_type") in MODELS


@dataclasses.dataclass(frozen=True)
class Named:
    """What a tower's name says.

    Attributes:
        kind: "clip", "siglip", "dinov2" or "convnext".
        repository: where it is.
        side: of the pictures that are fed, if it says so.
        stages: of a ConvNeXt all are read.
    """

    kind: str
    repository: str
    side: int | None
    stages: bool


def named(config: Values, name: str) -> Named:
    """As multimodal_encoder/builder.py and the towers' own files read a name.

    Raises:
        InputError: another tower.
    """
    low = name.lower()
    kinds = {"openai/clip": "clip", "siglip": "siglip", "clip-convnext": "convnext"}
    kind = next((k for part, k in {**kinds, "dinov2": "dinov2"}.items() if part in low), "")
    known = {"": name.split("-interp")[0]} if kind == "clip" else REPOSITORIES.get(kind, {})
    repository = next((x for start, x in known.items() if name.startswith(start)), None)
    if repository is None or re.match("maws|apple/dfn|eva/clip", low):
        found = [start for each in REPOSITORIES.values() for start in each]
        raise InputError(
            f"{config.where}: mm_vision_tower_aux_list",
            found=repr(name),
            expected=f"names that begin with openai/clip or {', '.join(found)}",
            fix="this tower is not supported",
        )
    sides = re.findall(r"-res(\d+)", name) if kind in ("dinov2", "convnext") else []
    return Named(kind, repository, int(sides[-1]) if sides else None, "multi-stage" in name)


def square(config: Values, key: str, count: int) -> int:
    """The side of a square of tokens."""
    if math.isqrt(count) ** 2 != count:
        raise config.error(key, "square numbers of tokens")
    return math.isqrt(count)


def describe(path: Path, config: Values, towers: Towers) -> Source:
    """Normal form.

    Raises:
        InputError: another connector than the aggregator, towers that are tuned, another number of
            token counts than of towers, cells that are no whole tokens, or samplers behind layers
            that the LLM lacks.
    """
    config.choice("mm_projector_type", ("sva",))
    config.choice("mm_vision_select_feature", ("patch",), "patch")
    if config.flag("unfreeze_mm_vision_tower", False, null=True):
        fix = "its authors' code reads the published towers, whatever the checkpoint holds"
        raise config.error("unfreeze_mm_vision_tower", "false", fix)
    found = config.names("mm_vision_tower_aux_list")
    counts = config.wholes("mm_vision_tower_aux_token_len_list", least=1)
    if not 1 <= len(found) <= MOST or len(counts) != len(found):
        raise config.error(
            "mm_vision_tower_aux_token_len_list",
            f"one number for each of 1 to {MOST} towers, of which there are {len(found)}",
        )
    sides = [square(config, "mm_vision_tower_aux_token_len_list", n) for n in counts]
    whole, side = _queries(config, sides)
    width = config.whole("vision_hidden_size")
    if width % HEADS:
        raise config.error("vision_hidden_size", f"a multiple of {HEADS}, the samplers' heads")
    opened, shown = dict[str, Tower](), []
    for name, given, tokens in zip(names(len(found)), found, sides, strict=True):
        says = named(config, given)
        place = given if given in towers.places else says.repository
        slot = "vision_tower" if name == "encoder" else f"vision_tower_{name}"
        tower = towers.find(path, place, slot)
        read, fed = _read(config, path, says, tower, tokens)
        shown.append(read)
        opened[name] = dataclasses.replace(tower, config={**tower.config, **fed})
    first, *others = opened
    image = shown[0]
    branch = {
        "name": "cambrian",
        "encoder": opened[first].config,
        "preprocessor": {
            "image_processor_type": "SiglipImageProcessor",
            "size": {"height": image["size"], "width": image["size"]},
            "image_mean": image["mean"],
            "image_std": image["std"],
        },
        "aspect": "pad",
        "connector": {
            "model_type": "sva",
            "dout": config.whole("hidden_size"),
            "width": width,
            "side": side,
            "queries": list(whole),
            "depth": config.whole("connector_depth", most=DEEPEST),
            "layers": _layers(config),
            "towers": shown,
        },
        "others": {name: opened[name].config for name in others},
    }
    kind = MODELS[config.text("model_type")]
    return upstream_source(
        path,
        "cambrian",
        config,
        branch,
        opened[first],
        others={name: opened[name] for name in others},
        llm=kind,
        template=template(kind, config),
        own={*KEYS, *SAMPLERS, *UNUSED},
        known=f"Cambrian{registry.TABLES[kind].architecture}",
    )


def _queries(config: Values, sides: list[int]) -> tuple[tuple[int, ...], int]:
    """Sides of the groups of queries, and of the visual tokens."""
    counts = config.wholes("query_num_list", least=1)
    if len(counts) != config.whole("num_query_group"):
        raise config.error("query_num_list", "as many numbers as num_query_group says")
    whole = tuple(square(config, "query_num_list", n) for n in counts)
    side = square(config, "image_token_len", config.whole("image_token_len"))
    for key, wanted in (("query_num_list", whole), ("image_token_len", (side,))):
        if any(tokens % each for tokens in sides for each in wanted):
            raise config.error(key, "sides that divide those of all towers' tokens")
    return whole, side


def _layers(config: Values) -> list[int]:
    """Layers of the LLM behind which there is a sampler."""
    if config.flag("connector_only"):
        return []
    count, start, stride = (
        config.whole(key, least=least, most=DEEPEST)
        for key, least in zip(SAMPLERS, (1, 0, 1), strict=True)
    )
    layers = [start + stride * k for k in range(count)]
    most = config.whole("num_hidden_layers", None)
    if most is not None and layers[-1] >= most:
        raise config.error(SAMPLERS[0], f"samplers behind the LLM's {most} layers alone")
    return layers


def _read(
    config: Values, path: Path, says: Named, tower: Tower, side: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is read of a tower and how pictures are shown to it, and keys for its own config."""
    where = f"{path}: vision tower {says.repository!r}"
    table = registry.find(tower.config, where)
    encoder = table.config(tower.config, where)
    if isinstance(encoder, ConvNeXtConfig) != (says.kind == "convnext"):
        raise InputError(
            where,
            found=f"model_type {tower.config['model_type']!r}",
            expected=f"a {says.kind}",
            fix="take the tower that config.json names",
        )
    size = says.side or (1024 if says.kind == "convnext" else encoder.image_size)
    mean, std, border = _shown(path, says, tower, size)
    taps: tuple[int, ...]
    if says.kind == "convnext":
        taps = tuple(range(encoder.layers + 1)) if says.stages else (encoder.layers,)
        width = sum(encoder.widths[k] for k in taps)
    else:
        taps = (select_layer(config),) if says.kind == "clip" else (-1,)
        width = encoder.width
    shown = {"size": size, "mean": list(mean), "std": list(std), "border": list(border)}
    read = {
        "width": width,
        "side": side,
        "taps": list(taps),
        "norm": says.kind in ("siglip", "dinov2"),
        "drop": getattr(encoder, "prefix", 0),
        **shown,
    }
    fed: dict[str, Any] = {"input_size": size}
    if says.kind == "dinov2":
        fed["position_offset"] = 0.1  # transformers 4.37's, which the authors' code is for
    return read, fed


def _shown(path: Path, says: Named, tower: Tower, size: int) -> tuple[Colour, Colour, Colour]:
    """Mean and deviation of a tower's pixels, and the colour around its pictures.

    Raises:
        InputError: a preprocessor that cuts the square.
    """
    if tower.preprocessor:
        where = f"{path}: vision tower {says.repository!r}: preprocessor"
        images = from_preprocessor(tower.preprocessor, aspect="pad", name=where)
        if says.kind == "clip" and {images.size, images.edge} != {size}:
            raise InputError(
                where,
                found=f"pictures resized to {images.edge} and cut to {images.size}",
                expected=f"{size} both, the side that the tower was built for",
                fix="use the preprocessor_config.json of the published repository",
            )
        border = images.mean if says.kind in ("clip", "dinov2") else OPENAI
        return images.mean, images.std, border
    if says.kind not in SHOWN:
        raise InputError(
            f"{path}: vision tower {says.repository!r}",
            found="no preprocessor_config.json",
            expected="how its pictures are prepared",
            fix="copy it from the published repository",
        )
    file = tower.json.get("open_clip_config.json", {})
    given = Values(file, f"{path}: {says.repository}").section("preprocess_cfg", None)
    mean, std = SHOWN[says.kind]
    mean, std = (given.numbers(key, default) for key, default in (("mean", mean), ("std", std)))
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise given.error("std", "three numbers above 0, as mean has three")
    return mean, std, OPENAI


def template(llm: str, config: Values) -> str:
    """What the authors' inference.py takes for each published model."""
    if llm == "phi3":
        return "phi3"
    found = prompt_template({"model_type": llm, "vocab_size": config.any("vocab_size")})
    own = {"chatml_direct": "chatml_direct_cambrian", "llava_llama_3": "llama_3_cambrian"}
    return own.get(found, found)


def read(hf: Values) -> SVAConfig:
    """Sizes from the normal form."""
    given = hf.any("towers")
    entries = given if isinstance(given, list) else []
    if not 1 <= len(entries) <= MOST or not all(isinstance(x, Mapping) for x in entries):
        raise hf.error("towers", f"1 to {MOST} mappings")
    towers = tuple(_tower(Values(x, f"{hf.where}: towers[{i}]")) for i, x in enumerate(entries))
    made = SVAConfig(
        towers,
        hf.whole("dout"),
        hf.whole("width"),
        hf.whole("side"),
        hf.wholes("queries", least=1),
        hf.whole("depth", most=DEEPEST),
        hf.wholes("layers", least=0, most=DEEPEST),
    )
    if made.width % HEADS:
        raise hf.error("width", f"a multiple of {HEADS}, the samplers' heads")
    if not made.queries or any(t.side % s for t in towers for s in (*made.queries, made.side)):
        raise hf.error("queries", "sides that, as `side`, divide those of all towers' tokens")
    if list(made.layers) != sorted({*made.layers}):
        raise hf.error("layers", "numbers of layers, ascending")
    return made


def _tower(hf: Values) -> TowerConfig:
    made = TowerConfig(
        hf.whole("width"),
        hf.whole("side"),
        hf.wholes("taps", least=-DEEPEST, most=DEEPEST),
        hf.flag("norm"),
        hf.whole("drop", least=0),
    )
    _images(hf)
    hf.done({})
    return made


def _images(hf: Values) -> ImageSpec:
    """How pictures are shown to a tower."""
    size = hf.whole("size")
    mean, std, border = (hf.numbers(key) for key in ("mean", "std", "border"))
    if not len(mean) == len(std) == len(border) == 3 or min(std) <= 0:
        raise hf.error("std", "three numbers above 0, as mean and border have three")
    return ImageSpec(size, size, "squash", "pad", mean, std, border=border)


def path(hf: Values, images: ImageSpec, encoder: PatchEncoder, connector: SVAConfig) -> Cambrian:
    """The same picture for all towers, each with its own size and colours.

    Raises:
        InputError: an encoder too few, or pictures of another size than one was built for.
    """
    specs = [_images(Values(x, hf.where)) for x in hf.any("towers")]
    others = [hf.any(name) for name in connector.names[1:]]
    encoders: list[Encoder] = [encoder, *others]
    for name, each, spec in zip(connector.names, encoders, specs, strict=True):
        if each is None:
            raise InputError(
                hf.where, found=f"no encoder {name!r}", expected="it", fix="complete the file"
            )
        built = getattr(each, "input_size", getattr(each, "image_size", None))
        if spec.size != built or images.size != specs[0].size:
            raise InputError(
                f"{hf.where}: {name}",
                found=f"pictures of {spec.size} pixels",
                expected=f"{built}, as the encoder was built for",
                fix="take the tower that config.json names",
            )
    own = dataclasses.replace(images, border=specs[0].border)
    return Cambrian(encoder, connector, own, tuple(others), tuple(specs[1:]))


def recorded(config: SVAConfig, inputs: Inputs, stages: Arrays) -> Arrays:
    """The stages, and pixels of each tower as NCHW."""
    shown = [inputs.pixels, *(inputs.others[name] for name in config.names[1:])]
    pixels = {f"pixel_values_{i}": np.moveaxis(np.asarray(x), -1, 1) for i, x in enumerate(shown)}
    return {**stages, **pixels}


def asker(source: str, path: str) -> tuple[Rule, ...]:
    """Rules of a layer norm and a dense layer without bias in a torch Sequential."""
    return (*norm(f"{source}.0", f"{path}/norm"), plain(f"{source}.1", f"{path}/dense"))


def plain(source: str, path: str) -> Rule:
    """Rule of a dense layer without bias."""
    return Rule(f"{source}.weight", f"{path}/kernel", TRANSPOSE)


def sampler(source: str, path: str) -> tuple[Rule, ...]:
    """Rules of one VisionCrossAttentionLayer."""
    attention = f"{source}.cross_attn"
    return (
        plain(f"{source}.proj_context", f"{path}/context"),
        plain(f"{source}.proj_in", f"{path}/enter"),
        plain(f"{source}.proj_out.linear_1", f"{path}/fc1"),
        plain(f"{source}.proj_out.linear_2", f"{path}/fc2"),
        *norm(f"{source}.norm", f"{path}/norm"),
        *asker(f"{attention}.q_proj", f"{path}/query"),
        *asker(f"{attention}.k_proj_{{}}", f"{path}/key/{{}}"),
        *asker(f"{attention}.v_proj_{{}}", f"{path}/value/{{}}"),
        plain(f"{attention}.o_proj", f"{path}/out"),
        Rule(f"{source}.pos_embed_{{}}", f"{path}/pos/{{}}"),
    )


STAGES = ("pixel_values", "vision_features", "projected", "sva")

TABLE = Table(
    types=("sva",),
    read=read,
    unused={},
    path=path,
    others=names(MOST)[1:],
    recorded=recorded,
    limits={
        f"{stage}_{i}": 2e-6 if stage == "pixel_values" else 1e-4
        for stage in STAGES
        for i in range(MOST)
    },
    rules=(
        *projector_rules("mm_projector.", "projector"),
        *dense("mm_projector_aux_{}.0", "feature/{}/fc1"),
        *dense("mm_projector_aux_{}.2", "feature/{}/fc2"),
        *norm("mm_projector_aux_{}.3", "feature/{}/norm"),
        *sampler("vision_sampler_{}.layers.{}", "sampler/{}/{}"),
        *sampler("vision_sampler_layers.{}.layers.0", "within/{}"),
        Rule("vision_query", "query"),
        Rule("image_newline", "newline"),
    ),
)


def upstream_names(source: Source) -> Names:
    """The authors' names."""
    connector = source.branches[0].part("connector")
    parts = ("mm_projector.", "mm_projector_aux_", "vision_sampler_", "vision_query")
    own = tuple((f"model.{name}", connector, name) for name in (*parts, "image_newline"))
    return (*own, ("", "llm", ""))


LAYOUTS = (Layout("cambrian", is_cambrian, describe, upstream_names, unused=UNUSED),)
