"""A new multimodal model: an LLM, one or two vision encoders, a connector yet to be trained."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from converters.layouts import TEMPLATE, Source, open_source
from converters.load import flatten, float_dtype, model_config, read_model
from converters.rules import FLOATS
from converters.tables import comm, dense, find, llava
from converters.tables.visionfuse import fused_config
from converters.towers import KINDS, Tower, Towers, read_tower
from vfjax import InputError, Model, Processor
from vfjax.encoders.vit import resolve_taps
from vfjax.merge import LazyTensor
from vfjax.model import BranchConfig
from vfjax.prompts import get_template

UPSTREAM = {
    "llama": ("llava_llama", "LlavaLlamaForCausalLM"),
    "mistral": ("llava_mistral", "LlavaMistralForCausalLM"),
}
"""LLM -> `model_type` and class of LLaVA's code around it."""

OPTIONS = {
    "mlp": ("projector", "select"),
    "sti": ("projector", "select"),
    "sci": ("projector", "select", "side"),
    "dci": ("projector", "select", "side"),
    "comm": comm.OPTIONS,
}
"""Kind of connector -> its options, see `create`."""


def create(
    llm: str | Path,
    encoder: str | Path,
    connector: Mapping[str, Any],
    *,
    aux: str | Path | None = None,
    template: str | None = None,
    aspect: str = "pad",
    seed: int = 0,
    mesh: Mesh | None = None,
    dtype: Any = None,
) -> tuple[Model, Processor]:
    """A model whose LLM and encoders are read from their folders and whose connector is drawn.

    It is what `converters.load` returns for a folder: `converters.export` writes it, with its
    towers inside, and `load` reads that back. Around a Llama or Mistral the folder has LLaVA's
    layout, with Dense Connector's keys for "sti", "sci" and "dci" (for "comm" one of ours, see
    `converters.tables.comm`); around another LLM, or with an encoder that has register tokens under
    another connector than "comm", it is a fused folder of one branch.

    Args:
        llm: folder of a causal LM, or of any supported multimodal model, whose LLM is taken.
            Vocabulary, tokenizer and generation_config.json are its too.
        encoder: Hugging Face folder of a vision encoder, with preprocessor_config.json.
        connector: {"kind": ..., **options}. "mlp" is LLaVA's, "sti", "sci" and "dci" are Dense
            Connector's: `projector`, "linear" or "mlpNx_gelu" ("mlp2x_gelu"); `select`, the tap of
            the plain feature (-2); `side`, tokens a side of the efficient "sci" and "dci". "comm"
            has `layers`, `layers_aux`, `merge`, `blocks`, `ratio`, `join`, see
            `vfjax.connectors.MergeConfig` and `COMMConfig`; the first two are all layers and the
            last quarter.
        aux: folder of COMM's second encoder, shown the pixels of the first one with its own mean
            and deviation; None: COMM of one encoder.
        template: name of the prompt template; by default the one of the model that `llm` is, or
            what LLaVA's code would take for that LLM.
        aspect: "pad" or "crop", see `vfjax.images.ImageSpec`.
        seed: of the connector's weights: flax's default initialisation (LeCun normal), the same on
            every machine and mesh.
        mesh: see `converters.load`.
        dtype: of the parameters; None keeps the stored ones, the connector's is the LLM's then.

    Raises:
        InputError: a folder that cannot be read, an encoder without preprocessor or without tokens,
            an unknown kind or option, a layer that an encoder lacks, encoders that don't fit
            together, no such template.
    """
    dtype = float_dtype(dtype)
    source = describe(llm, encoder, connector, aux=aux, template=template, aspect=aspect)
    (branch,) = model_config(source).branches
    for part, taps in branch.connector.taps.items():
        resolve_taps(taps, getattr(branch, part).layers)
    stored = next(iter(source.parts["llm"].values())).dtype
    part = f"branches.{branch.name}.connector"
    source.parts[part] = drawn(source, branch, seed, stored if stored in FLOATS else FLOATS[-1])
    return read_model(source, mesh, dtype)


def drawn(
    source: Source, branch: BranchConfig, seed: int, dtype: np.dtype
) -> dict[str, LazyTensor]:
    """New weights of a branch's connector, under the names of its table; drawn on the CPU."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        params = flatten(nnx.split(branch.connector.build(rngs=nnx.Rngs(seed)))[1])
    table = source.table(f"branches.{branch.name}.connector")
    rules = table.match({name: p.shape for name, p in params.items()})
    return {
        rule.source: rule.to_source(np.asarray(params[name].get_value()).astype(dtype))
        for name, rule in rules.items()
    }


def describe(
    llm: str | Path,
    encoder: str | Path,
    connector: Mapping[str, Any],
    *,
    aux: str | Path | None = None,
    template: str | None = None,
    aspect: str = "pad",
) -> Source:
    """The new model in normal form, without the connector's tensors; arguments as of `create`."""
    options = _options(connector, aux, aspect)
    kind = options.pop("kind")
    text = open_source(llm)
    towers = _Given(found={"vision_tower": _tower(encoder)} | _second(aux))
    config = _config(text, towers.found["vision_tower"], kind, options, aspect)
    if aux is not None:
        config["mm_vision_tower_aux"] = "vision_tower_aux"
    layout = {"mlp": llava.describe_upstream, "comm": comm.describe}.get(kind, dense.describe)
    source = layout(text.path, config, towers)
    source.llm, source.path, source.base, source.files = text.llm, text.path, text.base, text.files
    source.created = True
    default = text.template if text.branches else source.template
    template = template or default
    get_template(template)
    if template != source.template:
        source.template = config[TEMPLATE] = template
    (branch,) = source.branches
    start = f"branches.{branch['name']}"
    source.parts = {part: tower.tensors for part, tower in source.towers.items()}
    source.parts["llm"] = text.parts["llm"]
    source.prefixes = {part: tower.prefixes for part, tower in source.towers.items()}
    lone = branch["connector"]["mm_projector_type"] == "linear"
    names = "model.mm_projector."
    source.prefixes |= {"llm": (("", ""),), f"{start}.connector": ((names, "0." if lone else ""),)}
    prefix = find(branch["encoder"], str(encoder)).config(branch["encoder"]).prefix
    if text.llm["model_type"] in UPSTREAM and (prefix < 2 or kind == "comm"):
        return source
    branch["connector"]["drop"] = prefix
    return _fused(source)


@dataclasses.dataclass(frozen=True)
class _Given(Towers):
    """Towers that were looked up already, by slot."""

    found: Mapping[str, Tower] = dataclasses.field(default_factory=dict)

    def find(self, folder: Path, name: str, slot: str = "vision_tower") -> Tower:
        return self.found[slot]


def _options(connector: Mapping[str, Any], aux: str | Path | None, aspect: str) -> dict[str, Any]:
    """The connector's options, checked by name."""
    kind = connector.get("kind")
    if kind not in OPTIONS:
        raise InputError(
            "connector: kind", found=repr(kind), expected=", ".join(OPTIONS), fix="choose one"
        )
    if unknown := sorted(set(connector) - {"kind", *OPTIONS[kind]}):
        raise InputError(
            f"connector {kind!r}: {unknown[0]}",
            found="no such option",
            expected=", ".join(OPTIONS[kind]),
            fix="remove it",
        )
    if aux is not None and kind != "comm":
        raise InputError(
            "aux",
            found=f"a second encoder for connector {kind!r}",
            expected="none",
            fix="take 'comm', which reads two",
        )
    if aspect not in ("pad", "crop"):
        raise InputError("aspect", found=repr(aspect), expected="'pad', 'crop'", fix="choose one")
    return dict(connector)


def _second(aux: str | Path | None) -> dict[str, Tower]:
    return {} if aux is None else {"vision_tower_aux": _tower(aux)}


def _tower(path: str | Path) -> Tower:
    """An encoder's own folder."""
    path = Path(path)
    tower = read_tower(path, next((f for f in KINDS if (path / f).is_file()), "config.json"))
    if not tower.preprocessor:
        raise InputError(
            path / "preprocessor_config.json",
            found="no file",
            expected="how the encoder's pictures are prepared",
            fix="copy it from the published repository",
        )
    if not hasattr(find(tower.config, str(path)).config(tower.config), "prefix"):
        raise InputError(
            path,
            found=f"model_type {tower.config['model_type']!r}, which has no tokens",
            expected="a vision transformer",
            fix="choose another encoder",
        )
    return tower


def _config(
    text: Source, tower: Tower, kind: str, options: Mapping[str, Any], aspect: str
) -> dict[str, Any]:
    """config.json as LLaVA's code and what grew from it have it."""
    llm = find(text.llm, str(text.path)).config(text.llm)
    encoder = find(tower.config, str(tower.path)).config(tower.config)
    name, architecture = UPSTREAM.get(text.llm["model_type"], UPSTREAM["llama"])
    select = options.get("select", -2)
    config = {
        **text.llm,
        "architectures": [architecture],
        "model_type": name,
        "hidden_size": llm.width,
        "vocab_size": llm.vocab,
        "image_aspect_ratio": "pad" if aspect == "pad" else "square",
        "use_mm_proj": True,
        "mm_hidden_size": encoder.width * (3 if kind in ("sci", "dci") else 1),
        "mm_projector_type": options.get("projector", "mlp2x_gelu"),
        "mm_vision_tower": "vision_tower",
        "mm_vision_select_layer": select,
        "mm_vision_select_feature": "patch" if encoder.prefix else "cls_patch",  # all tokens
    }
    if kind == "comm":
        return config | {"mm_projector_type": "comm", "mm_comm": dict(options)}
    if kind in dense.KINDS:
        config |= dense.config_of(kind, tower.config, encoder.layers, select)
        if "side" in options:
            config["mm_dense_connector_side"] = options["side"]
    return config


def _fused(source: Source) -> Source:
    """The same as a fused folder of one branch, for what LLaVA's code cannot say."""
    source.layout, source.towers = "visionfuse", {}
    source.prefixes = {
        part: ((f"{part}.", ""),) if part != "llm" else (("", ""),) for part in source.prefixes
    }
    source.config = fused_config(source, {})
    return source
