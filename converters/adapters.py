"""What a checkpoint folder holds, completed by a base LLM's folder where it holds but a part.

Two kinds hold a part: LoRA repositories (Hugging Face's PEFT; with `non_lora_trainables.bin` and a
config.json those of LLaVA's finetune_lora scripts), and the bare projectors of its pretrain scripts
(`mm_projector.bin`). Names are those of LLaVA's llava/model/builder.py.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.adapter_config import Settings, read_settings
from converters.files import hub
from converters.files.names import ADAPTER, EXTRA, PROJECTOR, SETTINGS
from converters.files.reader import Stored, has_weights, read_config, read_weights
from converters.quantised.folder import read_folder
from converters.towers import Towers
from converters.values import Values
from vfjax import InputError
from vfjax.atomic import read_json
from vfjax.merge import LazyTensor, check_family

EMBEDDINGS = re.compile(r".*\bembed_tokens\.([a-z_.]+\.)?(?<!lora_[AB]\.)weight")
"""Names in an adapter's file of a whole embedding."""


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a folder holds, with its base.

    Attributes:
        path: the folder.
        config: config.json, the base's if the folder has none or an adapter alone.
        home: the folder of that config.json.
        tensors: the base's; the folder's own if it is complete without.
        files: all files that tensors are read from, the base's named "base/...".
        base: folder of the base; None if the folder is complete without.
        settings: adapter_config.json; empty if there is none.
        added: stem of a file -> what the folder adds to its base.
    """

    path: Path
    config: dict[str, Any]
    home: Path
    tensors: dict[str, LazyTensor]
    files: dict[str, Path]
    base: Path | None = None
    settings: Settings = dataclasses.field(default_factory=Settings)
    added: dict[str, dict[str, Stored]] = dataclasses.field(default_factory=dict)


def read(path: Path, base: str | Path | None, towers: Towers) -> Contents:
    """Reads configs and headers of a checkpoint folder and, if it needs one, of its base.

    Args:
        path: the folder.
        base: the base's folder; None: where the folder's configs say.
        towers: where that is looked for.

    Raises:
        InputError: a file that is absent or unreadable, LoRA settings that are not supported, a
            base that is nowhere to be found, or one that the folder's tensors don't fit.
    """
    if not is_part(path):
        config, whole, files = read_folder(path)
        return Contents(path, config, path, whole, files)
    settings = read_settings(path)
    added = _own_tensors(path, settings)
    found = _base(path, base, towers)
    (config, below, files), home = read_folder(found), found
    if (path / "config.json").is_file():
        own = read_json(path / "config.json")
        _check_base(path, found, _resized(config, added), _resized(own, added))
        if set(added) != {ADAPTER} or own.get("model_type") != config.get("model_type"):
            # LLaVA's code reads it, PEFT does not.
            config, home = read_config(path / "config.json"), path
    config = _resized(config, added)
    files = {f"base/{name}": file for name, file in files.items()}
    files |= {x.path.name: x.path for tensors in added.values() for x in tensors.values()}
    return Contents(path, config, home, below, files, found, settings, added)


def named_base(
    path: str | Path, towers: Mapping[str, str | Path] | None = None, *, local: bool = False
) -> Path | None:
    """The base that a folder's configs name, if it needs one and that is found.

    Args:
        path: the folder, or its name on the hub.
        towers: where it may be.
        local: of a base on the hub take what is in the cache.

    Raises:
        InputError: as `hub.folder`; a base that the hub refuses.
    """
    path = hub.folder(path)
    if not path.is_dir() or not is_part(path):
        return None
    try:
        return _look(path, _base_name(path), Towers(towers or {}), local=local)
    except hub.Absent:
        return None


def is_part(path: Path) -> bool:
    """Whether a folder needs a base.

    Raises:
        InputError: it has both an adapter and whole weights.
    """
    adapter = (path / SETTINGS).is_file()
    if has_weights(path):
        if adapter:
            raise InputError(
                path,
                found=f"{SETTINGS} and the weights of a whole model",
                expected="one of them",
                fix="move the adapter, or the weights, to a folder of its own",
            )
        return False
    return adapter or has_weights(path, (PROJECTOR,))


def _base_name(path: Path) -> str:
    for file, key in ((SETTINGS, "base_model_name_or_path"), ("config.json", "_name_or_path")):
        found = read_json(path / file) if (path / file).is_file() else {}
        if name := Values(found, str(path / file)).text(key, None):
            return name
    return ""


def _base(path: Path, base: str | Path | None, towers: Towers) -> Path:
    """The base's folder.

    Raises:
        InputError: it is not there.
    """
    name, why = _base_name(path), ""
    try:
        found = hub.folder(base, "base") if base is not None else _look(path, name, towers)
    except hub.Absent as error:
        if base is not None:
            raise
        found, why = None, f", the hub ({error.found})"
    if found is None or not found.is_dir():
        places = ", ".join(map(str, towers.candidates(path, name, "base"))) + why if name else ""
        kind = "a LoRA adapter" if (path / SETTINGS).is_file() else "a projector"
        raise InputError(
            f"{path}: base model {name!r}",
            found=f"{kind} without it" if found is None else f"no folder {found}",
            expected=f"a whole checkpoint in one of: {places}" if places else "its folder",
            fix=f"put it there, or pass base=FOLDER, or towers={{{name!r}: FOLDER}}"
            if places
            else "pass base=FOLDER",
        )
    return found


def _look(path: Path, name: str, towers: Towers, *, local: bool = False) -> Path | None:
    """The base's folder, on the disk or else of the hub; None if it is nowhere."""
    for place in towers.candidates(path, name, "base") if name else ():
        if (place / "config.json").is_file() and has_weights(place):
            return place
    repo = hub.parse(name) if name not in towers.places else None
    if repo is None:
        return None
    if revision := read_settings(path).get("revision"):
        repo = dataclasses.replace(repo, revision=revision)
    return hub.fetch(repo, f"{path}: base model {name!r}", local=local)


def _check_base(path: Path, base: Path, below: dict[str, Any], own: dict[str, Any]) -> None:
    """Checks that the LLM of the folder's own config.json is the base's."""
    label = str(path / "config.json")
    check_family({str(base): below.get("text_config", below), label: own.get("text_config", own)})


def _resized(config: dict[str, Any], added: Mapping[str, Mapping[str, Stored]]) -> dict[str, Any]:
    """A config with the vocabulary of an adapter that brings an embedding of its own."""
    saved = (x for name, x in added.get(ADAPTER, {}).items() if EMBEDDINGS.fullmatch(name))
    if (embedding := next(saved, None)) is None:
        return config
    rows = {"vocab_size": embedding.shape[0]}
    if "text_config" in config:
        return {**config, "text_config": {**config["text_config"], **rows}}
    return {**config, **rows}


def _own_tensors(path: Path, settings: Settings) -> dict[str, dict[str, Stored]]:
    """Stem -> the tensors of its file, of all files that are there; the adapter's must be."""
    stems = [stem for stem in (EXTRA, PROJECTOR) if has_weights(path, (stem,))]
    return {x: dict(read_weights(path, (x,))) for x in (*stems, *([ADAPTER] if settings else []))}
