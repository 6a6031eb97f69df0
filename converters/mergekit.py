"""mergekit's YAML files: the recipe, and the folders that it names."""

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import yaml

from converters.vocabulary import BASE
from vfjax import InputError
from vfjax.merge import METHODS, LazyTensor, Recipe, from_mergekit

REFERENCES = ("model", "base_model", "tokenizer_source")
"""Keys whose values name models."""


def read_yaml(path: str | Path) -> tuple[Recipe, dict[str, str], dict[str, str]]:
    """Reads a mergekit YAML file as it is.

    Models are folders, from the working directory; "folder+adapter" is an adapter on a folder.

    Args:
        path: the file.

    Returns:
        The recipe over labels; label -> folder of each model, the adapter's of "folder+adapter";
        label of such a model -> folder of the LLM. The label of the base is "base", unless it is
        merged as a member too.

    Raises:
        InputError: no such file, no YAML, or no recipe.
    """
    path = Path(path)
    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        found = str(error).splitlines()[0]
        raise InputError(path, found=found, expected="a YAML file", fix="correct it") from error
    if not isinstance(config, Mapping):
        raise InputError(
            path, found=type(config).__name__, expected="a mapping", fix="see mergekit's examples"
        )
    base = config.get("base_model")
    listed = _references(config)
    labels: dict[str, str] = {}
    if isinstance(base, str) and base not in listed:
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
    for key in ("tokenizer", "chat_template"):
        if config.get(key) not in (None, "auto"):
            raise InputError(
                f"{path}: {key}",
                found="a value",
                expected="none: tokenizers are copied, not made",
                fix="remove it, and change the tokenizer of the result",
            )
    recipe = from_mergekit(_renamed(config, labels))
    parts = {label: reference.rpartition("+") for reference, label in labels.items()}
    folders = {label: folder for label, (_, _, folder) in parts.items()}
    return recipe, folders, {label: below for label, (below, _, _) in parts.items() if below}


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


def _references(config: Any) -> list[str]:
    """Names of models, in the order in which they occur."""
    if isinstance(config, Mapping):
        here = [config["model"]] if isinstance(config.get("model"), str) else []
        return here + [name for value in config.values() for name in _references(value)]
    return [name for x in config for name in _references(x)] if isinstance(config, list) else []


def _label(reference: str, taken: set[str]) -> str:
    name = re.sub(r"[^A-Za-z0-9_-]", "-", Path(reference).name) or "model"
    number = 2
    label = name
    while label in taken or label == BASE:
        label, number = f"{name}-{number}", number + 1
    return label


def _renamed(config: Any, labels: Mapping[str, str]) -> Any:
    if isinstance(config, Mapping):
        return {
            key: labels.get(value, value)
            if key in REFERENCES and isinstance(value, str)
            else _renamed(value, labels)
            for key, value in config.items()
        }
    return [_renamed(x, labels) for x in config] if isinstance(config, list) else config
