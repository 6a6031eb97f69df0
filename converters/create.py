"""A new multimodal model: an LLM, one or two vision encoders, a connector yet to be trained."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from converters.fingerprint import fingerprint
from converters.folder import open_source
from converters.formats.llava import UPSTREAM, prompt_template
from converters.formats.visionfuse import fused_config
from converters.load import flatten, float_dtype, model_config, read_model
from converters.params.table import FLOATS
from converters.registry import find
from converters.source import NEW, TEMPLATE, Made, New, Source
from converters.towers import Tower, Towers, transformer_tower
from converters.values import Values
from vfjax import InputError, Model, Processor
from vfjax.atomic import JSON
from vfjax.errors import check, one_of
from vfjax.merge import LazyTensor
from vfjax.model import BranchConfig
from vfjax.nn.layers import redraw
from vfjax.processes import agreeing, owners
from vfjax.text.chat import CHAT_TEMPLATE
from vfjax.text.prompts import get_template
from vfjax.vision.encoders.vit import resolve_taps


def create(
    llm: str | Path,
    encoder: str | Path,
    connector: Mapping[str, JSON],
    *,
    aux: str | Path | None = None,
    template: str | None = None,
    aspect: str = "pad",
    seed: int = 0,
    init: Literal["torch", "flax"] = "torch",
    mesh: Mesh | None = None,
    dtype: DTypeLike | None = None,
) -> tuple[Model, Processor]:
    """A model whose LLM and encoders are read from their folders and whose connector is drawn.

    It is what `converters.load` returns for a folder: `converters.export` writes it, with its
    towers inside, and `load` reads that back. Around a Llama or Mistral (with "onevision" a Qwen2)
    the folder has LLaVA's layout, with Dense Connector's keys for "sti", "sci" and "dci" (for
    "comm" one of ours, see `converters.formats.comm`); around another LLM, or with an encoder that
    has register tokens under another connector than "comm", it is a fused folder of one branch.

    Args:
        llm: folder of a causal LM, or of any supported multimodal model, whose LLM is taken.
            Vocabulary, tokenizer and generation_config.json are its too.
        encoder: Hugging Face folder of a vision encoder, with preprocessor_config.json. This, `llm`
            and `aux` may be names on the hub, too, see `converters.load`.
        connector: {"kind": ..., **options}. "mlp" is LLaVA's, "sti", "sci" and "dci" are Dense
            Connector's: `projector`, "linear" or "mlpNx_gelu" ("mlp2x_gelu"); `select`, the tap of
            the plain feature (-2); `side`, tokens a side of the efficient "sci" and "dci". "comm"
            has `layers`, `layers_aux`, `merge`, `blocks`, `ratio`, `join`, see
            `vfjax.architectures.MergeConfig` and `COMMConfig`; the first two are all layers and the
            last quarter. "mgm" is Mini-Gemini's patch info mining: `projector`, `select`,
            `image_size_aux` (twice the encoder's size), `image_grid` (1), `image_global` (False),
            see `vfjax.architectures.MiningConfig`. "slime" has `select` and `queries`, `top_p`,
            `temperature`, `gate`, `separator`, see `vfjax.architectures.SliMEConfig`. "onevision"
            is LLaVA-OneVision's: `projector`, `select` (of SigLIP always the last layer but one)
            and `most`, views' tokens that a picture's tiles have at most (9); it shows pictures by
            a rule of its own, whatever `aspect`.
        aux: folder of a second encoder: for "comm" a vision transformer, shown the pixels of the
            first one with its own mean and deviation, or None: COMM of one encoder; for "mgm" an
            OpenCLIP ConvNeXt.
        template: name of the prompt template; by default the one of the model that `llm` is, or
            what LLaVA's code would take for that LLM.
        aspect: "pad" or "crop", see `vfjax.vision.images.ImageSpec`.
        seed: of the connector's weights, the same on every machine and mesh.
        init: how they are drawn: as torch's modules begin, see `vfjax.nn.layers.redraw`, which is
            what the authors' rates are for; or as flax's (LeCun normal, zero biases).
        mesh: see `converters.load`.
        dtype: of the parameters; None keeps the stored ones, the connector's is the LLM's then.

    Raises:
        InputError: a folder that cannot be read, an encoder without preprocessor or without tokens,
            an unknown kind, option or `init`, a layer that an encoder lacks, encoders that don't
            fit together, no such template.
    """
    dtype = float_dtype(dtype)
    check([one_of("init", init, ("torch", "flax"))], fix="choose one")
    with agreeing("create", members := owners(mesh), patience=math.inf) as facts:
        source = describe(llm, encoder, connector, aux=aux, template=template, aspect=aspect)
        if len(members) > 1:
            facts |= fingerprint(source) | {"seed": seed, "init": init, "dtype": str(dtype)}
    (branch,) = model_config(source).branches
    for part, taps in branch.architecture.connector.taps.items():
        resolve_taps(taps, branch.architecture.encoders[part].layers)
    stored = next(iter(source.parts["llm"].values())).dtype
    part = f"branches.{branch.name}.connector"
    stored = stored if stored in FLOATS else FLOATS[-1]
    parts = {**source.parts, part: drawn(source, branch, seed, stored, init)}
    source = dataclasses.replace(source, parts=parts)
    return read_model(source, mesh, dtype)


def drawn(
    source: Source, branch: BranchConfig, seed: int, dtype: np.dtype, init: str
) -> dict[str, LazyTensor]:
    """New weights of a branch's connector, under the names of its table; drawn on the CPU."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        rngs = nnx.Rngs(seed)
        connector = branch.architecture.connector.build(rngs=rngs)
        if init == "torch":
            redraw(connector, rngs)
        params = flatten(nnx.split(connector)[1])
    table = source.table(f"branches.{branch.name}.connector")
    rules = table.match({name: p.shape for name, p in params.items()})
    parts: dict[str, list[np.ndarray]] = {}  # a tensor may hold several parameters
    for name, rule in sorted(rules.items(), key=lambda item: item[1].part):
        array = np.asarray(params[name].get_value()).astype(dtype)
        parts.setdefault(rule.source, []).append(rule.to_source(array))
    return {name: np.concatenate(p) if p[1:] else p[0] for name, p in parts.items()}


def describe(
    llm: str | Path,
    encoder: str | Path,
    connector: Mapping[str, JSON],
    *,
    aux: str | Path | None = None,
    template: str | None = None,
    aspect: str = "pad",
) -> Source:
    """The new model in normal form, without the connector's tensors; arguments as of `create`."""
    new = _kind(connector, aux, aspect)
    options = {key: value for key, value in connector.items() if key != "kind"}
    text = open_source(llm)
    towers = {"vision_tower": transformer_tower(encoder)}
    if aux is not None and new.aux is not None:
        towers["vision_tower_aux"] = new.aux(aux)
    config = _config(text, towers, new, options, aspect)
    source = new.describe(text.path, Values(config, "the new config.json"), _Given(found=towers))
    own_layout = text.llm["model_type"] in new.llms
    default = source.template if own_layout else prompt_template(text.llm) or source.template
    if text.branches and text.template != CHAT_TEMPLATE:
        default = text.template
    template = template or default
    get_template(template)
    own = {} if template == source.template else {TEMPLATE: template}
    (branch,) = source.branches
    connector_part, towers_of = f"branches.{branch.name}.connector", source.towers.items()
    source = dataclasses.replace(
        source,
        **{key: getattr(text, key) for key in ("path", "llm", "base", "files", "seen")},
        config={**source.config, **own},
        template=template,
        parts={"llm": text.parts["llm"]} | {part: tower.tensors for part, tower in towers_of},
        spare={part: tower.spare for part, tower in towers_of},
        prefixes={"llm": (("", ""),), connector_part: new.prefixes(source)}
        | {part: tower.prefixes for part, tower in towers_of},
        created=True,
    )
    prefix = find(branch.encoder, str(encoder)).config(branch.encoder).prefix
    if own_layout and (prefix < 2 or new.registers):
        return source
    branch = dataclasses.replace(branch, connector={**branch.connector, "drop": prefix})
    return _fused(dataclasses.replace(source, branches=(branch,)))


@dataclasses.dataclass(frozen=True)
class _Given(Towers):
    """Towers that were looked up already, by slot."""

    found: Mapping[str, Tower] = dataclasses.field(default_factory=dict)

    def find(self, folder: Path, name: str, slot: str = "vision_tower") -> Tower:
        return self.found[slot]


def _kind(connector: Mapping[str, JSON], aux: str | Path | None, aspect: str) -> New:
    """How the connector is made; its options are checked by name."""
    kind = connector.get("kind")
    if kind not in NEW:
        raise InputError(
            "connector: kind", found=repr(kind), expected=", ".join(NEW), fix="choose one"
        )
    new = NEW[kind]
    if unknown := sorted(set(connector) - {"kind", *new.options}):
        raise InputError(
            f"connector {kind!r}: {unknown[0]}",
            found="no such option",
            expected=", ".join(new.options),
            fix="remove it",
        )
    if aux is not None and new.aux is None:
        two = " or ".join(repr(other.kind) for other in NEW.values() if other.aux is not None)
        raise InputError(
            "aux",
            found=f"a second encoder for connector {kind!r}",
            expected="none",
            fix=f"take {two}, which read two",
        )
    if aux is None and new.needs:
        raise InputError(
            "aux",
            found="none",
            expected=f"{new.needs} for connector {kind!r}",
            fix="pass its folder",
        )
    check([one_of("aspect", aspect, ("pad", "crop"))], fix="choose one")
    return new


def _config(
    text: Source, towers: Mapping[str, Tower], new: New, options: Mapping[str, Any], aspect: str
) -> dict[str, Any]:
    """config.json as LLaVA's code and what grew from it have it."""
    tower = towers["vision_tower"]
    llm = find(text.llm, str(text.path)).config(text.llm)
    encoder = find(tower.config, str(tower.path)).config(tower.config)
    name, architecture = UPSTREAM.get(text.llm["model_type"], UPSTREAM["llama"])
    select = options.get("select", -2)
    heads = dict.fromkeys(("num_attention_heads", "num_key_value_heads"), llm.heads)
    apart = {**heads, "head_dim": llm.head_dim}  # a fused folder has its LLM's in a section
    config = {
        **(text.llm if text.llm["model_type"] in new.llms else apart),
        "architectures": [architecture],
        "model_type": name,
        "hidden_size": llm.width,
        "vocab_size": llm.vocab,
        "image_aspect_ratio": "pad" if aspect == "pad" else "square",
        "use_mm_proj": True,
        "mm_hidden_size": encoder.width,
        "mm_projector_type": options.get("projector", "mlp2x_gelu"),
        "mm_vision_tower": "vision_tower",
        "mm_vision_select_layer": select,
        "mm_vision_select_feature": "patch" if encoder.prefix else "cls_patch",  # all tokens
    }
    if "vision_tower_aux" in towers:
        config["mm_vision_tower_aux"] = "vision_tower_aux"
    aux = towers.get("vision_tower_aux")
    made = Made(text.llm["model_type"], llm.vocab, tower, encoder, aux, select, options)
    return config | new.config(made)


def _fused(source: Source) -> Source:
    """The same as a fused folder of one branch, for what LLaVA's code cannot say."""
    prefixes = {
        part: ((f"{part}.", ""),) if part != "llm" else (("", ""),) for part in source.prefixes
    }
    return dataclasses.replace(
        source,
        layout="visionfuse",
        config=fused_config(source, {}),
        towers={},
        spare={},
        prefixes=prefixes,
    )
