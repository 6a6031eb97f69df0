"""Checkpoint folder -> sharded model: streams a few tensors at a time onto the devices."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from converters.files import hub
from converters.files.names import KINDS
from converters.fingerprint import fingerprint
from converters.folder import open_source
from converters.formats.visionfuse import arranged
from converters.load_params import fill
from converters.origin import remember
from converters.params.table import FLOATS, Layered, Rule, Table
from converters.preprocessor import from_preprocessor
from converters.processor import processor
from converters.registry import find
from converters.source import Branch, Source, is_tower
from converters.towers import read_tower
from vfjax import InputError, Model, Processor
from vfjax.architectures import Architecture
from vfjax.atomic import read_json
from vfjax.errors import counted
from vfjax.fusion.prune import Prune
from vfjax.llm import Llama, LlamaConfig
from vfjax.merge import LazyTensor
from vfjax.model import BranchConfig, ModelConfig
from vfjax.nn.int8 import int8 as to_int8
from vfjax.processes import agreeing, owners
from vfjax.sharding import Overrides
from vfjax.vision.encoders.vit import resolve_taps

if TYPE_CHECKING:
    pass

Module = TypeVar("Module", bound=nnx.Module)
Module_co = TypeVar("Module_co", bound=nnx.Module, covariant=True)

Params = dict[str, nnx.Variable]
"""Parameter path, joined by "/" -> the parameter."""


def load(
    path: str | Path,
    *,
    mesh: Mesh | None = None,
    dtype: DTypeLike | None = None,
    towers: Mapping[str, str | Path] | None = None,
    tower_source: str = "auto",
    base: str | Path | None = None,
    positions: str | None = None,
    mask: str | None = None,
    prune: Prune | None = None,
    int8: bool = False,
    int8_cache: bool = False,
    shard: Overrides = (),
    progress: Callable[[int], object] = lambda nbytes: None,
) -> tuple[Model, Processor]:
    """Any supported checkpoint folder as a model on the devices, and its processor.

    Args:
        path: an upstream or Hugging Face LLaVA, a fused folder, or a plain causal LM; or
            `org/name[@revision]` on the Hugging Face hub, where no folder has that name: the files
            that are read are downloaded into its cache. So too of `towers` and `base`.
        mesh: where parameters are sharded (`vfjax.sharding.make_mesh`); None: the default device.
            Its processes first agree on what they read: configs, headers, samples of weights.
        dtype: of the parameters; None keeps the stored ones.
        towers: name of a vision tower in config.json -> the folder where it is.
        tower_source: which copy of a tower is read when the checkpoint holds one too: "auto" as
            its authors' loader does, "checkpoint", or "hub" for the tower's own folder.
        base: folder of the LLM that a LoRA adapter or a bare projector at `path` is for; None: the
            one that its configs name.
        positions: "running" or "parallel", see `ModelConfig`; None: as the folder says.
        mask: "causal" or "block", see `ModelConfig`; None: as the folder says.
        prune: which visual tokens the LLM reads; None: all.
        int8: the LLM's products have int8 weights (`vfjax.nn.int8`); for generation.
        int8_cache: so do the keys and values of what was read (`vfjax.llm.cache.Int8Rows`).
        shard: parameters that lie elsewhere on the mesh than by its rules (`Overrides`).
        progress: called with the bytes of each tensor as it arrives.

    Raises:
        InputError: the folder cannot be read whole and exactly (see `open_source`), the hub refuses
            it, an argument is none of its choices, or processes disagree.
    """
    dtype = float_dtype(dtype)
    with agreeing("load", members := owners(mesh), patience=math.inf) as facts:  # of downloads
        source = open_source(path, towers=towers, tower_source=tower_source, base=base)
        source = arranged(source, positions, mask)
        if len(members) > 1:
            how = {"dtype": dtype, "prune": prune, "int8": int8, "int8_cache": int8_cache}
            facts |= fingerprint(source) | {key: str(value) for key, value in how.items()}
            facts |= {"mesh": str(mesh), "shard": str(shard)}
    model, its = read_model(source, mesh, dtype, progress, prune=prune, int8=int8, shard=shard)
    model.llm.int8_cache = int8_cache
    return model, its


def read_model(
    source: Source,
    mesh: Mesh | None,
    dtype: np.dtype | None,
    progress: Callable[[int], object] = lambda nbytes: None,
    *,
    prune: Prune | None = None,
    int8: bool = False,
    shard: Overrides = (),
) -> tuple[Model, Processor]:
    """An opened source as a model and its processor; arguments and errors as `load`."""
    config = dataclasses.replace(model_config(source), prune=prune)
    graph, params = structure(config)
    tensors = {
        name: (source.parts[part], rule)
        for part, rules in check(source, params).items()
        for name, rule in rules.items()
    }
    narrow: set[str] = set()
    if int8:
        graph, wanted = abstract(lambda rngs: to_int8(config.build(rngs=rngs)))
        narrow = {name for name, p in wanted.items() if p.dtype == np.int8}
    its = processor(source, config)
    fill(params, tensors, mesh, dtype, progress, narrow, shard)
    model = join(graph, params)
    remember(model, source)
    return model, its


def read_llm(
    source: Source,
    mesh: Mesh | None,
    dtype: np.dtype | None,
    progress: Callable[[int], object] = lambda nbytes: None,
) -> Llama:
    """The language model alone of an opened source; arguments and errors as `load`."""
    config = source.config_of("llm")
    table, tensors = source.table("llm"), source.parts["llm"]
    llm = _read_module(config, table, tensors, f"{source.path}: llm", mesh, dtype, progress)
    assert isinstance(llm, Llama)  # the config of any LLM builds one
    return llm


def load_encoder(
    path: str | Path, *, mesh: Mesh | None = None, dtype: DTypeLike | None = None
) -> nnx.Module:
    """A vision encoder from its own Hugging Face folder (config.json and weights), or of the hub.

    Raises:
        InputError: no table for it, tensors that don't fit it, or a `dtype` that parameters don't
            have.
    """
    path, dtype = hub.folder(path), float_dtype(dtype)
    tower = read_tower(path, tower_file(path) or "config.json")
    table = find(tower.config, str(path))
    config = table.config(tower.config, str(path))
    return _read_module(config, table, tower.tensors, str(path), mesh, dtype)


def tower_file(path: Path) -> str | None:
    """The config file of a folder if it is a vision tower's own, and one that is supported."""
    file = next((f for f in KINDS if (path / f).is_file()), None)
    return file if file is not None and is_tower(read_json(path / file)) else None


def _read_module(
    config: Layered,
    table: Table[Layered],
    tensors: Mapping[str, LazyTensor],
    where: str,
    mesh: Mesh | None,
    dtype: np.dtype | None,
    progress: Callable[[int], object] = lambda nbytes: None,
) -> nnx.Module:
    """One component by itself."""
    check_depth(config, tensors, where)
    graph, params = structure(config)
    rules = table.check({name: p.shape for name, p in params.items()}, tensors, where)
    fill(params, {n: (tensors, rule) for n, rule in rules.items()}, mesh, dtype, progress)
    return join(graph, params)


def check_depth(config: Layered, tensors: Mapping[str, LazyTensor], where: str) -> None:
    """Raises InputError before more layers are built than there can be weights for."""
    if config.layers > len(tensors):
        raise InputError(
            where,
            found=f"{counted(len(tensors), 'tensor')} for {counted(config.layers, 'layer')}",
            expected="the tensors of every layer",
            fix="check that config.json belongs to these weights",
        )


def float_dtype(dtype: DTypeLike | None) -> np.dtype | None:
    """The dtype that a user asks for, None if there is none.

    Raises:
        InputError: it is not one that parameters have.
    """
    if dtype is None:
        return None
    names = {x.name: x for x in FLOATS}
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in names:
        raise InputError("dtype", found=name, expected=", ".join(names), fix="choose one of them")
    return names[name]


def model_config(source: Source) -> ModelConfig:
    """The configs of all components.

    Raises:
        InputError: a component that vfjax has no table for, a config that lacks a key or names an
            unknown activation, more layers than there are tensors, pictures that don't fit an
            encoder, or widths that don't fit one another.
    """
    branches = tuple(_branch_config(source, branch) for branch in source.branches)
    llm = source.config_of("llm")
    for part in ("llm", *source.encoders):
        if part in source.parts:
            check_depth(source.config_of(part), source.parts[part], f"{source.path}: {part}")
    for branch in branches:
        _check_width(source, branch, llm)
    return ModelConfig(branches, llm, source.positions, source.mask)


def _branch_config(source: Source, branch: Branch) -> BranchConfig:
    part = f"branches.{branch.name}"
    where = f"{source.path}: {part}"
    if not branch.preprocessor:
        raise InputError(
            source.path,
            found="no preprocessor_config.json",
            expected="it, or processor_config.json with an image_processor",
            fix="copy it from the published repository",
        )
    images = from_preprocessor(
        branch.preprocessor, aspect=branch.aspect, code=branch.code, name=where
    )
    fixed = images.resize != "native"
    side = {"input_size": images.size} if fixed else {}
    encoder = source.config_of(f"{part}.encoder", **side)
    if fixed and images.size != getattr(encoder, "input_size", encoder.image_size):
        raise InputError(
            f"{where}: preprocessor",
            found=f"pictures of {images.size} pixels",
            expected=f"{encoder.image_size}, as the encoder was built for",
            fix="use the preprocessor_config.json of the encoder's repository",
        )
    others = {}
    for name in branch.others:
        size = {"input_size": images.size} if f"preprocessor_{name}" in branch.connector else {}
        others[name] = source.config_of(branch.part(name), **size)
    table = source.table(f"{part}.connector")
    fed = {**branch.connector, **others}
    made = table.architecture_of(fed, f"{where}.connector", images, encoder)
    _check_channels(source, part, made)
    return BranchConfig(branch.name, made, scaled=branch.code == "authors")


def _check_channels(source: Source, part: str, made: Architecture) -> None:
    """Raises InputError if a connector reads layers or channels that an encoder doesn't have."""
    connector = made.connector
    for name, (states, channels) in connector.channels.items():
        encoder, where = made.encoders[name], f"{part}.{name}"
        resolve_taps(connector.taps[name], encoder.layers, f"{source.path}: {where}: taps")
        if states * encoder.width != channels:
            tower = source.towers.get(where)
            kind = source.components[where]["model_type"]
            raise InputError(
                f"{source.path}: {part}.connector",
                found=f"a connector that reads {channels} channels",
                expected=f"{states} x {encoder.width}, the width of {kind} from "
                f"{tower.path or 'its published config' if tower else 'this folder'}",
                fix="take the tower that the connector was trained with",
            )


def _check_width(source: Source, branch: BranchConfig, llm: LlamaConfig) -> None:
    """Raises InputError if a branch's tokens are none of the LLM's, or it embeds ids beyond it."""
    where = f"{source.path}: branches.{branch.name}.connector"
    connector = branch.architecture.connector
    if connector.dout != llm.width:
        raise InputError(
            where,
            found=f"visual tokens of width {connector.dout}",
            expected=f"{llm.width}, as the LLM's embeddings",
            fix="check that config.json belongs to these weights",
        )
    rows = getattr(connector, "vocab", 0) or llm.vocab
    separator = getattr(connector, "separator", 0)
    if not 0 <= separator < rows:
        raise InputError(
            f"{where}: separator",
            found=f"token id {separator}",
            expected=f"one of the {rows} rows of the embedding",
            fix="check that config.json belongs to these weights",
        )


def abstract(build: Callable[..., Module]) -> tuple[nnx.GraphDef[Module], Params]:
    """The module that `build(rngs=)` makes, as structure and shapes only."""
    graph, state = nnx.split(nnx.eval_shape(lambda: build(rngs=_OneKey())))
    return graph, flatten(state)


class Config(Protocol[Module_co]):
    """What a module is made of; equal ones make equal structures."""

    def __hash__(self) -> int: ...
    def build(self, *, rngs: nnx.Rngs) -> Module_co: ...


def structure(config: Config[Module]) -> tuple[nnx.GraphDef[Module], Params]:
    """`abstract(config.build)`; equal configs, as members of one family have, are traced once."""
    graph, params = _traced(config)
    return graph, {name: p.copy() for name, p in params.items()}


@functools.lru_cache(maxsize=16)
def _traced(config: Config[nnx.Module]) -> tuple[nnx.GraphDef[Any], Params]:
    return abstract(config.build)


class _OneKey:
    """In place of `nnx.Rngs` where no value is drawn: tracing its counter takes quadratic time."""

    def params(self) -> jax.Array:
        return jax.random.key(0)


def flatten(state: nnx.State) -> Params:
    """A module's state by parameter names."""
    return {"/".join(map(str, path)): v for path, v in nnx.to_flat_state(state)}


def join(graph: nnx.GraphDef[Module], params: Params) -> Module:
    """The module of a structure and its parameters."""
    flat = [(tuple(map(_key, name.split("/"))), v) for name, v in params.items()]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def _key(name: str) -> str | int:
    return int(name) if name.isdigit() else name


def part_of(name: str) -> tuple[str, str]:
    """A model parameter's component and its path in there."""
    words = name.split("/")
    depth = 1 if words[0] == "llm" else 3
    return ".".join(words[:depth]), "/".join(words[depth:])


def check(source: Source, params: Params) -> dict[str, dict[str, Rule]]:
    """Component -> parameter name -> its rule; see `Table.check`.

    Raises:
        InputError: parameters and tensors don't fit one to one.
    """
    parts: dict[str, dict[str, str]] = {}
    for name in params:
        part, path = part_of(name)
        parts.setdefault(part, {})[path] = name
    out = {}
    for part, names in parts.items():
        shapes = {path: params[name].shape for path, name in names.items()}
        where = f"{source.path}: {part}"
        rules = source.table(part).check(shapes, source.parts.get(part, {}), where)
        out[part] = {names[path]: rule for path, rule in rules.items()}
    return out
