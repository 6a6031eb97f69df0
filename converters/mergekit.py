"""mergekit's YAML files: the recipe, and the folders that it names."""

import codecs
import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import yaml

from converters.files import hub
from converters.files.reader import first_line
from converters.vocabulary import BASE
from vfjax import InputError
from vfjax.atomic import JSON, contents, findable
from vfjax.merge import METHODS, LazyTensor, Recipe, from_mergekit, parse
from vfjax.merge.mergekit import TOP_KEYS

UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
"""Marks by which YAML tells UTF-16 from UTF-8."""

DEEPEST, MOST = 50, 100_000
"""Levels and values of a recipe."""


@dataclasses.dataclass
class Yaml:
    """A mergekit recipe over labels.

    Attributes:
        recipe: the merge.
        folders: label -> folder of each model that is merged, the adapter's of "folder+adapter".
            The label of the base is "base", unless it is merged as a member too.
        below: label of such an adapter -> folder of the LLM.
        merges: label -> the recipe of the same file that makes this model; what `folders` has of it
            is its name.
        tokenizers: label -> folder that is named for its tokenizer alone.
        text: the file.
    """

    recipe: Recipe
    folders: dict[str, str]
    below: dict[str, str]
    merges: dict[str, "Yaml"]
    tokenizers: dict[str, str]
    text: str = ""


@dataclasses.dataclass(frozen=True)
class Reference:
    """A model of a YAML: a folder or a name on the hub, or one of them with an adapter on it."""

    path: str
    lora: str | None = None


def read_yaml(path: str | Path) -> Yaml:
    """Reads a mergekit YAML file as it is.

    Models are folders, from the working directory, or where there is none `org/name` on the hub:
    "model", "model+adapter", or mergekit's mappings; a revision behind @ says nothing of a folder.
    A file of several documents is what mergekit-multi takes: models are named by the `name` of
    other documents, too, and the result is that of the document without a name, or else of the one
    that no other names.

    Args:
        path: the file.

    Returns:
        The recipe, and those that it needs.

    Raises:
        InputError: no such file, no YAML, or no recipe.
    """
    path = findable(path)
    try:
        data = contents(path)
        text = data.decode("utf-16" if data[:2] in UTF16 else "utf-8-sig")
        found = [x for x in yaml.load_all(text, _Loader) if x is not None]
    except Exception as error:  # PyYAML lets through what int, float and its tables raise
        line = first_line(error)
        if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
            line = f"{error.problem.removeprefix('found ')} in line {error.problem_mark.line + 1}"
        raise InputError(path, found=line, expected="a YAML file", fix="correct it") from error
    _check_size(path, found)
    return dataclasses.replace(_result(str(path), found), text=text)


def _result(path: str, found: Sequence[object]) -> Yaml:
    """The document of a file that no other one needs."""
    documents: dict[str | None, Mapping[str, JSON]] = {}
    for document in found or [None]:
        if not isinstance(document, Mapping):
            kind = "nothing" if document is None else type(document).__name__
            parse.fail(path, kind, "a mapping", "see mergekit's examples")
        name = document.get("name")
        if not isinstance(name, str | None) or name in documents:
            parse.fail(
                f"{path}: name", repr(name), "a name of its own for each document", "name it"
            )
        documents[name] = {key: value for key, value in document.items() if key != "name"}
    if len(documents) == 1:
        (last,) = documents
        return _read(path, last, documents, ())
    used = {
        reference.path
        for document in documents.values()
        for _, reference in _references("", document)
    }
    ends = [None] if None in documents else [name for name in documents if name not in used]
    if len(ends) != 1 or (extra := set(documents) - used - {None, *ends}):
        names = ", ".join(map(str, ends if len(ends) != 1 else sorted(map(str, extra))))
        wanted = "one result: a document without a name, or one that no other names"
        parse.fail(path, names or "documents that need one another", wanted, "remove the rest")
    return _read(path, ends[0], documents, ())


class _Loader(yaml.SafeLoader):
    """Refuses a key that a mapping has twice, of which PyYAML would drop the first."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen and key.value != "<<":
                    problem = f"key {key.value!r} twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return node


def _check_size(path: Path, found: object) -> None:
    """Refuses what is nested too deep, as aliases of themselves are, or too much, as of aliases."""
    left, nodes = [(found, 0)], 0
    while left:
        value, depth = left.pop()
        nodes += 1
        if depth > DEEPEST or nodes > MOST:
            what = f"more than {DEEPEST} levels" if depth > DEEPEST else f"more than {MOST} values"
            parse.fail(str(path), what, "a recipe", "see mergekit's examples")
        if isinstance(value, Mapping | list):
            inner = value.values() if isinstance(value, Mapping) else value
            left += [(x, depth + 1) for x in inner]


def _read(
    path: str,
    name: str | None,
    documents: Mapping[str | None, Mapping[str, JSON]],
    above: tuple[str | None, ...],
) -> Yaml:
    """One document; `above` are those that it is needed for."""
    if name in above:
        parse.fail(path, f"{name!r} made of itself", "documents without a circle", "correct it")
    config = documents[name]
    parse.keys("recipe", config, TOP_KEYS)
    found = _references("", config)
    base = _reference("base_model", config["base_model"]) if config.get("base_model") else None
    listed = [x for where, x in found if where == "model"]
    labels: dict[Reference, str] = {}
    if base is not None and base not in listed:
        method = METHODS.get(str(config.get("merge_method")))
        modules = config.get("modules")
        forms = [config, *modules.values()] if isinstance(modules, Mapping) else [config]
        whole = any(isinstance(form, Mapping) and form.get("models") for form in forms)
        if whole and method is not None and method.base == "unread":
            listed.append(base)  # mergekit appends it to the models, and merges it with them
        else:
            labels[base] = BASE
    for reference in listed:
        labels.setdefault(reference, _label(reference, set(labels.values())))
    merged = set(labels)
    for where, reference in found:
        if where == "tokenizer":
            labels.setdefault(reference, _label(reference, set(labels.values())))
    recipe = from_mergekit(_renamed("", config, labels))
    folders, below, merges = {}, {}, {}
    for reference, label in labels.items():
        if reference.path in documents and len(documents) > 1:
            if reference.lora or reference not in merged:
                wanted = "a result without an adapter, among the models"
                parse.fail(path, str(reference), wanted, "name its folder")
            merges[label] = _read(path, reference.path, documents, (*above, name))
        if reference in merged:
            folders[label] = reference.lora or reference.path
            if reference.lora:
                below[label] = reference.path
    others = {labels[x]: x.path for _, x in found if x not in merged}
    return Yaml(recipe, folders, below, merges, others)


def _reference(where: str, given: object) -> Reference:
    """Mergekit's ModelReference: a string, or a mapping of `model` and `lora`."""
    if isinstance(given, str) and findable(given, where).exists():
        return Reference(given)
    if isinstance(given, str):
        folder, *more = given.split("+")
        if len(more) > 1:
            parse.fail(where, repr(given), "folder, or folder+adapter", "correct it")
        given = {"model": folder, "lora": more[0] if more else None}
    asked = parse.keys(where, given, ("model", "lora", "override_architecture"))
    if (other := asked.get("override_architecture")) is not None:
        found = f"override_architecture {other!r}"
        parse.fail(where, found, "the architecture of config.json", "remove it")
    path = _path(f"{where}.model", asked.get("model"))
    lora = asked.get("lora")
    return Reference(path, None if lora is None else _path(f"{where}.lora", lora))


def _path(where: str, given: object) -> str:
    """The model of mergekit's ModelPath, "folder@revision" or a mapping.

    A folder has no revision: it is kept for the hub.
    """
    revision: object = ""
    if isinstance(given, Mapping):
        asked = parse.keys(where, given, ("path", "revision"))
        given, revision = asked.get("path"), asked.get("revision") or ""
    elif isinstance(given, str) and not findable(given, where).exists():
        given, _, revision = given.partition("@")
    if not isinstance(given, str) or not given or not isinstance(revision, str):
        parse.fail(where, repr(given), "a folder, or a name on the hub", "correct it")
    if revision and hub.parse(given) and not findable(given, where).exists():
        return f"{given}@{revision}"
    return given


def widest(tensors: Sequence[LazyTensor]) -> np.dtype:
    """The dtype that holds all: of a result without a dtype in its recipe."""
    return np.dtype(functools.reduce(jnp.promote_types, [x.dtype for x in tensors]))


LISTS = ("layer_types", "no_rope_layers", "mlp_layer_types")
"""Keys of a config.json that have one value a layer."""


def layer_lists(
    configs: Mapping[str, Mapping[str, Any]], origins: Sequence[Mapping[str, int]]
) -> dict[str, list[Any]]:
    """The `LISTS` of layers that were put together anew.

    Args:
        configs: label -> config of each LLM.
        origins: of each layer, label -> its layer that is merged there.

    Raises:
        InputError: layers of two kinds are merged into one.
    """
    out: dict[str, list[Any]] = {}
    for key in LISTS:
        for i, layers in enumerate(origins):
            known = {m: configs[m][key][j] for m, j in layers.items() if configs[m].get(key)}
            if len({*known.values()}) > 1:
                raise InputError(
                    f"recipe: layer {i}: {key}",
                    found=", ".join(f"{value} of {label}" for label, value in known.items()),
                    expected="layers of one kind",
                    fix="choose other layers",
                )
            out.setdefault(key, []).extend(list(known.values())[:1])
    return {key: values for key, values in out.items() if len(values) == len(origins)}


MODELS = ("model", "base_model")
"""Keys whose values are models."""
WORDS = ("union", "base")
"""Sources of tokenizers that are no models."""


def _references(
    where: str, config: Mapping[str, object] | list[object]
) -> list[tuple[str, Reference]]:
    """("model", "base_model" or "tokenizer", model) in the order in which they occur."""
    found = []
    for key, value in config.items() if isinstance(config, Mapping) else enumerate(config):
        kind = _kind(where, key, value)
        if kind is not None:
            found.append((kind, _reference(f"{where}{key}", value)))
        elif isinstance(value, Mapping | list):
            found += _references(f"{where}{key}.", value)
    return found


def _kind(where: str, key: object, value: object) -> str | None:
    """What a value is read as: "model", "base_model", "tokenizer", or None for no model."""
    if value is None or where == "tokenizer.tokens.":
        return None
    if f"{where}{key}" in ("tokenizer_source", "tokenizer.source"):
        return None if value in WORDS else "tokenizer"
    if where.startswith("tokenizer."):
        inner = isinstance(value, Mapping) and "kind" in value
        return "tokenizer" if key in ("source", "model") and not inner else None
    return key if key in MODELS else None


def _label(reference: Reference, taken: set[str]) -> str:
    path = reference.lora or reference.path
    repo = hub.parse(path)
    name = Path(repo.name if repo else path).name
    name = re.sub(r"[^A-Za-z0-9_-]", "-", name) or "model"
    number = 2
    label = name
    while label in taken or label in WORDS:
        label, number = f"{name}-{number}", number + 1
    return label


def _renamed(
    where: str, config: Mapping[str, object], labels: Mapping[Reference, str]
) -> dict[str, Any]:
    """The configuration with labels in place of references."""
    return {key: _relabelled(where, key, value, labels) for key, value in config.items()}


def _relabelled(
    where: str, key: str | int, value: object, labels: Mapping[Reference, str]
) -> object:
    """A value of it, under a key or at a place in a list."""
    if _kind(where, key, value) is not None:
        return labels[_reference(f"{where}{key}", value)]
    inside = f"{where}{key}."
    if isinstance(value, Mapping):
        return _renamed(inside, value, labels)
    if isinstance(value, list):
        return [_relabelled(inside, i, x, labels) for i, x in enumerate(value)]
    return value
