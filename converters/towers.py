"""Vision towers that a checkpoint only names: where they are looked for, and what is found."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from converters import registry
from converters.files import hub
from converters.files.names import KINDS, PREPROCESSOR, SLOT
from converters.files.paths import nearby
from converters.files.reader import has_weights
from converters.params.table import rename
from converters.preprocessor import read_preprocessor
from converters.quantised.folder import read_folder
from converters.values import ANY, Values
from vfjax import InputError
from vfjax.atomic import JSON, findable, read_json
from vfjax.errors import check, one_of
from vfjax.merge import LazyTensor

Tensors = dict[str, LazyTensor]
Prefixes = tuple[tuple[str, str], ...]


def slot_of(encoder: str) -> str:
    """Name of an encoder's folder inside a checkpoint, and stem of its files there."""
    return SLOT if encoder == "encoder" else f"{SLOT}_{encoder}"


@dataclasses.dataclass(frozen=True)
class Tower:
    """A vision tower.

    Attributes:
        config: its Hugging Face config, `model_type` naming a table.
        preprocessor: its preprocessor_config.json; empty if it has none, as OpenCLIP's.
        files: its weights files, by name.
        tensors: under the names of its table.
        spare: those that no encoder has, under their names in the folder.
        json: its configuration files as they are, by name; empty for a published tower.
        prefixes: the (prefix in the folder, prefix in the table) pairs they were read by.
        places: where it was looked for in vain, if only its published configs are known.
        repo: where its weights are on the hub, while its configs alone were downloaded.
    """

    config: dict[str, Any]
    preprocessor: dict[str, Any]
    path: Path | None = None
    files: dict[str, Path] = dataclasses.field(default_factory=dict)
    tensors: Tensors = dataclasses.field(default_factory=dict)
    spare: Tensors = dataclasses.field(default_factory=dict)
    json: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    prefixes: Prefixes = ()
    places: str = ""
    repo: hub.Repo | None = None

    def whole(self, where: str) -> "Tower":
        """The tower with its weights, which the hub is asked for; errors as `hub.fetch`."""
        return self if self.repo is None else own_tower(hub.fetch(self.repo, where))


SOURCES = ("auto", "checkpoint", "hub")
"""See `Towers.source`."""


@dataclasses.dataclass(frozen=True)
class Towers:
    """Where towers, and base LLMs, are looked for.

    Attributes:
        places: name in the checkpoint's config -> folder, in place of all others.
        source: which copy of a tower is read when a checkpoint holds one too: "auto" as its
            authors' loader does, "checkpoint", or "hub" for the tower's own folder.
    """

    places: Mapping[str, str | Path] = dataclasses.field(default_factory=dict)
    source: str = "auto"

    def __post_init__(self) -> None:
        check([one_of("tower_source", self.source, SOURCES)], fix="choose one")

    def find(self, folder: Path, name: str, slot: str = SLOT) -> Tower:
        """The tower of a checkpoint folder.

        Args:
            folder: the checkpoint's.
            name: what its config.json says.
            slot: stem of the tower's files, and name of its folder, inside `folder`.

        Returns:
            The tower; without tensors if only its config is there, or it is a published one, or on
            the hub, see `Tower.whole`.

        Raises:
            InputError: it is nowhere, or unreadable, or the hub refuses it.
        """
        for config in KINDS:
            if name not in self.places and (folder / f"{slot}_{config}").is_file():
                return read_tower(folder, config, slot)
        for path in self.candidates(folder, name, slot):
            for config, stems in KINDS.items():
                if (path / config).is_file():
                    return read_tower(path, config, weights=has_weights(path, stems))
        places = ", ".join(map(str, self.candidates(folder, name, slot)))
        repo = hub.parse(name) if name not in self.places else None
        if repo is not None:
            where = f"{folder}: vision tower {name!r}"
            try:
                path = hub.fetch(repo, where, weights=False)
            except hub.Absent as error:
                places += f", the hub ({error.found})"
            else:
                config = next((x for x in KINDS if (path / x).is_file()), "config.json")
                return dataclasses.replace(read_tower(path, config, weights=False), repo=repo)
        for table in registry.TABLES.values() if name not in self.places else ():
            if known := table.published.get(name.rstrip("/").split("/")[-1]):
                return Tower(dict(known.config), dict(known.preprocessor), places=places)
        raise InputError(
            f"{folder}: vision tower {name!r}",
            found="none",
            expected=f"a Hugging Face folder in one of: {places}",
            fix=f"put it there, or pass towers={{{name!r}: folder}}",
        )

    def candidates(self, folder: Path, name: str, slot: str) -> list[Path]:
        """Folders in which the tower, or a base LLM, is looked for, in this order, before the hub.

        Raises:
            InputError: as `hub.folder`, of the place in which alone it is.
        """
        if name in self.places:
            return [hub.folder(self.places[name], "towers")]
        findable(folder / name, f"{folder}: {slot}")
        last = name.rstrip("/").split("/")[-1]
        return [folder / slot, Path(name), folder / name, nearby(folder.parent / last)]


def own_tower(path: str | Path) -> Tower:
    """A tower of a folder of its own, or of the hub; errors as of `read_tower` and `hub.folder`."""
    path = hub.folder(path)
    return read_tower(path, next((f for f in KINDS if (path / f).is_file()), "config.json"))


def transformer_tower(path: str | Path) -> Tower:
    """A vision transformer's own folder.

    Raises:
        InputError: it has no preprocessor_config.json or no tokens, or see `own_tower`.
    """
    tower = own_tower(path)
    if not tower.preprocessor:
        raise InputError(
            findable(path) / "preprocessor_config.json",
            found="no file",
            expected="how the encoder's pictures are prepared",
            fix="copy it from the published repository",
        )
    if not hasattr(registry.find(tower.config, str(path)).config(tower.config), "prefix"):
        raise InputError(
            path,
            found=f"model_type {tower.config['model_type']!r}, which has no tokens",
            expected="a vision transformer",
            fix="choose another encoder",
        )
    return tower


def read_tower(path: Path, file: str, slot: str = "", *, weights: bool = True) -> Tower:
    """A tower of a folder of its own, or of files that start with `slot`, perhaps its configs only.

    Raises:
        InputError: a file is absent or unreadable, or there is no table for it.
    """
    start = f"{slot}_" if slot else ""
    stems = ((slot,) if slot else KINDS[file]) if weights else None
    whole, raw, files = read_folder(path, f"{start}{file}", stems)
    config = vision_config(whole, str(path / f"{start}{file}"))
    preprocessor = read_preprocessor(path)
    if slot:
        beside = path / f"{start}{PREPROCESSOR}"
        preprocessor = read_json(beside) if beside.is_file() else {}
    table = registry.find(config, str(path))
    renamed = rename(raw, table.prefixes)
    spare = {old for old, (new, _) in renamed.items() if table.ignores(new)}
    own = {old: pair for old, pair in renamed.items() if old not in spare}
    return Tower(
        config=config,
        preprocessor=preprocessor,
        path=path,
        files=files,
        tensors={new: raw[old] for old, (new, _) in own.items()},
        spare={old: raw[old] for old in spare},
        json={file: whole} | ({PREPROCESSOR: preprocessor} if preprocessor else {}),
        prefixes=pairs(pair for _, pair in own.values()),
    )


def tower_files(
    config: Mapping[str, JSON], preprocessor: Mapping[str, JSON]
) -> dict[str, dict[str, Any]]:
    """The JSON files of a folder for a tower of these."""
    if str(config["model_type"]).startswith(OPEN_CLIP):
        vision = {key: value for key, value in config.items() if key != "model_type"}
        return {"open_clip_config.json": {"model_cfg": {"vision_cfg": vision}}}
    return {"config.json": dict(config), PREPROCESSOR: dict(preprocessor)}


OPEN_CLIP = "open_clip_"
"""How the `model_type` of a tower of OpenCLIP's begins; its files have none."""


def open_clip_type(vision: Mapping[str, JSON]) -> str:
    """`model_type` of a tower by its `vision_cfg`."""
    siglip = "siglip" in str(vision.get("timm_model_name"))
    return OPEN_CLIP + ("siglip" if siglip else "convnext")


def vision_config(config: Mapping[str, JSON], where: str) -> dict[str, Any]:
    """The vision half of a CLIP-like config, or of an OpenCLIP one, with a `model_type`.

    Raises:
        InputError: a key beside it that is not known.
    """
    values = Values(config, where)
    if "model_cfg" in config:
        values.section("model_cfg").mapping("vision_cfg")
        values.done({"preprocess_cfg": ANY})
        values = values.section("model_cfg")
        found = {"model_type": "", **values.mapping("vision_cfg")}
        found["model_type"] = open_clip_type(found)
    elif "vision_config" in config:
        kind = values.text("model_type", None)
        found = {"model_type": kind, **values.mapping("vision_config")}
        same = values.mapping("vision_config_dict", None)
        if same is not None and _differ({"model_type": kind, **same}, found, where):
            raise values.error("vision_config_dict", "null, or vision_config once more")
    else:
        return {"model_type": None, **config}
    values.done(registry.find(found, where).around)
    return found


def _differ(one: Mapping[str, JSON], other: Mapping[str, JSON], where: str) -> bool:
    """Whether two configs are of different towers."""
    made = [registry.find(config, where).config(config, where) for config in (one, other)]
    return made[0] != made[1]


def pairs(found: Iterable[tuple[str, str]]) -> Prefixes:
    """Distinct pairs, the most telling table prefix first."""
    return tuple(sorted(set(found), key=lambda pair: (-len(pair[1]), pair)))
