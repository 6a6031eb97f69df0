"""Layouts: how a whole checkpoint folder is put together from components.

A layout turns a folder into a `Source`: the same normal form whatever wrote the folder. Loading,
merging, inspecting and exporting know only the normal form.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from converters import tables
from converters.reader import read_json, read_weights, weight_files
from converters.rules import Table, rename
from vfjax import InputError
from vfjax.merge import LazyTensor

Prefixes = tuple[tuple[str, str], ...]
Tensors = dict[str, LazyTensor]


@dataclasses.dataclass
class Source:
    """A checkpoint folder in normal form.

    Attributes:
        path: the folder.
        layout: name of its layout.
        config: its config.json.
        llm: Hugging Face config of the language model.
        branches: one dict a branch: `name`; `encoder`, `connector` (configs whose `model_type`
            names a table); `preprocessor` (preprocessor_config.json); `aspect`, "pad" or
            "crop"; `taps`; `drop`.
        template: name of the prompt template.
        parts: component ("llm", "branches.NAME.encoder", ...) -> its tensors under the names of the
            component's table.
        prefixes: component -> the (prefix in the folder, prefix in the table) pairs it was read by.
        towers: component -> the folder it was read from, where that is not `path`.
        unread: tensors of the folder that another copy takes the place of.
    """

    path: Path
    layout: str
    config: dict[str, Any]
    llm: dict[str, Any]
    branches: list[dict[str, Any]]
    template: str
    parts: dict[str, Tensors] = dataclasses.field(default_factory=dict)
    prefixes: dict[str, Prefixes] = dataclasses.field(default_factory=dict)
    towers: dict[str, "Tower"] = dataclasses.field(default_factory=dict)
    unread: tuple[str, ...] = ()

    def component(self, part: str) -> dict[str, Any]:
        """The config of a component."""
        if part == "llm":
            return self.llm
        _, name, kind = part.split(".")
        return next(b for b in self.branches if b["name"] == name)[kind]

    def table(self, part: str) -> Table:
        """The table of a component."""
        return tables.find(self.component(part), f"{self.path}: {part}")

    def weight_files(self) -> dict[str, Path]:
        """All files that tensors are read from; a tower's are named after its component."""
        files = {file.name: file for file in weight_files(self.path)}
        for part, tower in self.towers.items():
            files |= {f"{part}/{f.name}": f for f in weight_files(tower.path, tower.stem)}
        return files

    def to_json(self) -> str:
        """All but the tensors, for `ModelConfig.source`."""
        keep = ("layout", "config", "llm", "branches", "template", "prefixes")
        record = {key: getattr(self, key) for key in keep}
        record["path"] = str(self.path)
        record["towers"] = {
            part: {"config": t.config, "preprocessor": t.preprocessor}
            for part, t in self.towers.items()
        }
        return json.dumps(record, sort_keys=True)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one kind of folder is read.

    Attributes:
        name: unique.
        matches: whether a config.json is of this kind.
        describe: (folder, config.json) -> the normal form without tensors.
        prefixes: (prefix in the folder, component, prefix in the component's table), the first that
            fits; the component of a branch is written as "encoder" or "connector" with the branch's
            name put before it, or in full.
    """

    name: str
    matches: Callable[[Mapping[str, Any]], bool]
    describe: Callable[[Path, dict[str, Any], "Towers"], Source]
    prefixes: Callable[[Source], tuple[tuple[str, str, str], ...]]


@dataclasses.dataclass(frozen=True)
class Tower:
    """A vision tower of its own folder."""

    path: Path
    stem: str
    config: dict[str, Any]
    preprocessor: dict[str, Any]
    tensors: Tensors = dataclasses.field(default_factory=dict)
    prefixes: Prefixes = ()


@dataclasses.dataclass(frozen=True)
class Towers:
    """Where towers that a checkpoint only names are looked for.

    Attributes:
        places: name in the checkpoint's config -> folder, first of all.
    """

    places: Mapping[str, str | Path] = dataclasses.field(default_factory=dict)

    def candidates(self, folder: Path, name: str) -> list[Path]:
        """Folders in which the tower is looked for, in this order."""
        out = [Path(self.places[name])] if name in self.places else []
        last = name.rstrip("/").split("/")[-1]
        out += [folder / "vision_tower", Path(name), folder / name, folder.parent / last]
        try:
            from huggingface_hub import snapshot_download
            from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

            out.append(Path(snapshot_download(name, local_files_only=True)))
        except (HFValidationError, LocalEntryNotFoundError):
            pass
        return out

    def find(self, folder: Path, name: str) -> Tower | None:
        """The tower's folder, or files `vision_tower*` in the checkpoint's; None if absent."""
        if (folder / "vision_tower_config.json").is_file():
            return self._read(folder, "vision_tower")
        for path in self.candidates(folder, name):
            if (path / "config.json").is_file():
                return self._read(path, "")
        return None

    def _read(self, path: Path, stem: str) -> Tower:
        start = f"{stem}_" if stem else ""
        config = read_json(path / f"{start}config.json")
        config = {"model_type": config.get("model_type"), **config.get("vision_config", config)}
        table = tables.find(config, str(path))
        raw = read_weights(path, stem)
        names = rename(raw, table.prefixes)
        return Tower(
            path=path,
            stem=stem,
            config=config,
            preprocessor=read_json(path / f"{start}preprocessor_config.json"),
            tensors={new: raw[old] for old, (new, _) in names.items()},
            prefixes=_pairs(pair for new, pair in names.values() if not table.ignores(new)),
        )

    def missing(self, folder: Path, name: str) -> InputError:
        """The error for a tower that is nowhere."""
        places = ", ".join(map(str, self.candidates(folder, name)))
        return InputError(
            f"{folder}: vision tower {name!r}",
            found="none",
            expected=f"a Hugging Face folder in one of: {places}",
            fix=f"put it there, or pass towers={{{name!r}: folder}}",
        )


def open_source(path: str | Path, *, towers: Mapping[str, str | Path] | None = None) -> Source:
    """A checkpoint folder in normal form; reads headers only.

    Args:
        path: a folder with config.json and weights.
        towers: name of a vision tower in config.json -> the folder where it is.

    Raises:
        InputError: no such folder, a config of no known layout, unreadable weights, or a vision
            tower that is nowhere to be found.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(path, found="no folder", expected="a checkpoint", fix="check the path")
    config = read_json(path / "config.json")
    layout = next((x for x in tables.LAYOUTS if x.matches(config)), None)
    if layout is None:
        kinds = ", ".join(sorted(x.name for x in tables.LAYOUTS))
        raise InputError(
            path / "config.json",
            found=f"model_type {config.get('model_type')!r}",
            expected=f"one of the layouts {kinds}",
            fix="this kind of checkpoint is not supported",
        )
    with reading(path / "config.json"):
        source = layout.describe(path, config, Towers(towers or {}))
    _assign(source, layout, read_weights(path))
    return source


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns the lack of a key in a config.json into an InputError."""
    try:
        yield
    except KeyError as error:
        raise InputError(
            path, found=f"no key {error}", expected="it", fix="complete the file"
        ) from error


def _assign(source: Source, layout: Layout, tensors: Mapping[str, LazyTensor]) -> None:
    """Distributes a folder's tensors over the components."""
    prefixes = layout.prefixes(source)
    names = rename(tensors, [(old, f"{part}\0{new}") for old, part, new in prefixes])
    if unknown := sorted(set(tensors) - set(names)):
        raise InputError(
            f"{source.path}: {unknown[0]}",
            found=f"{len(unknown)} tensors that belong to no part",
            expected="the names of layout " + layout.name,
            fix="check that config.json belongs to these weights",
        )
    pairs: dict[str, list[tuple[str, str]]] = {}
    unread = []
    for old, (new, (prefix, target)) in names.items():
        part, _, name = new.partition("\0")
        if part in source.towers:
            unread.append(old)
            continue
        source.parts.setdefault(part, {})[name] = tensors[old]
        pairs.setdefault(part, []).append((prefix, target.partition("\0")[2]))
    for part, tower in source.towers.items():
        source.parts[part] = tower.tensors
        pairs[part] = list(tower.prefixes)
    source.unread = tuple(sorted(unread))
    source.prefixes = {part: _pairs(found) for part, found in pairs.items()}


def _pairs(found: Iterable[tuple[str, str]]) -> Prefixes:
    """Distinct pairs, the most telling table prefix first."""
    return tuple(sorted(set(found), key=lambda pair: (-len(pair[1]), pair)))
