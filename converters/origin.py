"""Where a loaded model came from, beside the model: JAX compiles for all that is inside one."""

import dataclasses
import json
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.lora import Updated
from converters.source import Source
from converters.towers import Prefixes, tower_files
from vfjax import InputError, Model
from vfjax.atomic import JSON
from vfjax.merge import LazyTensor

ORIGINS: "weakref.WeakKeyDictionary[Model, Origin]" = weakref.WeakKeyDictionary()
"""Model -> its checkpoint, as long as the model lives."""


@dataclasses.dataclass(frozen=True)
class Origin:
    """What of a checkpoint is needed to write its model back, or another like it.

    Attributes:
        home: folder of the tokenizer's files.
        base: folder that an adapter was for: of generation_config.json, and of the processor where
            `home` has none.
        config: its config.json.
        components: component -> its config, whose `model_type` names a table.
        prefixes: component -> see `Source.prefixes`.
        towers: component that has a folder of its own -> JSON files there.
        held: component that the checkpoint holds, and whose configs it lacks -> those.
        spare: component -> name of a tensor that its model may lack -> the file that has it, or,
            of one that is in no file, the tensor.
        created: see `Source.created`.
        kind: see `Source.kind`.
        made_of: folders that it was read from.
        source: its normal form, without tensors.
    """

    home: Path
    base: Path | None
    config: Mapping[str, JSON]
    components: Mapping[str, Mapping[str, JSON]]
    prefixes: Mapping[str, Prefixes]
    towers: Mapping[str, Mapping[str, Mapping[str, JSON]]]
    held: Mapping[str, Mapping[str, Mapping[str, JSON]]]
    spare: Mapping[str, Mapping[str, Path | LazyTensor]]
    created: bool
    kind: str
    made_of: tuple[Path, ...]
    source: Source


def remember(model: Model, source: Source) -> None:
    """Keeps what `origin_of` gives; tensors in files are not kept."""
    ORIGINS[model] = from_source(source)


def from_source(source: Source) -> Origin:
    """What of an opened folder is needed to write another like it."""
    towers, held = (
        {p: _sorted(t.json or tower_files(t.config, t.preprocessor)) for p, t in found.items()}
        for found in (source.towers, source.held)
    )
    towers_of = (tower.path for tower in source.towers.values() if source.created)
    return Origin(
        home=source.home,
        base=source.base,
        config=_sorted(source.config),
        components=source.components,
        prefixes=source.prefixes,
        towers=towers,
        held=held,
        spare={
            part: {name: _place(tensor) for name, tensor in tensors.items()}
            for part, tensors in source.spare.items()
        },
        created=source.created,
        kind=source.kind,
        made_of=tuple(path for path in (source.path, source.base, *towers_of) if path is not None),
        source=_without_tensors(source),
    )


def _without_tensors(source: Source) -> Source:
    towers, held = (
        {p: dataclasses.replace(t, tensors={}, spare={}) for p, t in found.items()}
        for found in (source.towers, source.held)
    )
    return dataclasses.replace(source, parts={}, spare={}, towers=towers, held=held)


def _sorted(files: Mapping[str, JSON]) -> dict[str, Any]:
    """A copy of JSON values with sorted keys, as transformers writes them."""
    return json.loads(json.dumps(files, sort_keys=True))


def origin_of(model: Model) -> Origin:
    """The checkpoint of a model of `converters.load` or its kin.

    Raises:
        InputError: it is of none, or JAX made another object of it.
    """
    if model not in ORIGINS:
        raise InputError(
            "model",
            found="one that no checkpoint was read into",
            expected="what converters.load, create or load_fused returned, or vfjax.train.fit",
            fix="load it, and change it in place: nnx.update(model, state)",
        )
    return ORIGINS[model]


def _place(tensor: LazyTensor) -> Path | LazyTensor:
    """A tensor's file; under an adapter the base's: its update of what nothing reads is 0."""
    while isinstance(tensor, Updated):
        tensor = tensor.base
    return getattr(tensor, "path", tensor)
