"""What folders and their configs say, by vfjax's readers of checkpoints.

`converters.hf.written` has the same functions for folders that hold code of their own.
"""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedConfig

from converters import processor
from converters.files import hub
from converters.folder import open_source
from converters.formats.visionfuse import LAYOUTS, fused_config
from converters.hf.state import state_of
from converters.load import model_config as read_config
from converters.source import Source
from converters.towers import Towers
from vfjax import InputError, Processor
from vfjax.atomic import read_json
from vfjax.model import ModelConfig

OTHERS = frozenset(PreTrainedConfig().to_dict()) - {"model_type"} | {"quantization_config"}
"""Keys of any config.json that transformers itself knows."""


UNREAD = frozenset({"auto_map", "plain"})
"""Keys of a folder with code of its own, which a folder that is saved here does not get."""


Place = str | os.PathLike[str]
"""A folder, or a name on the hub."""


class Member(NamedTuple):
    """One member's folder, in any layout, as a fused one.

    Attributes:
        config: what its config.json would be.
        state: makes its tensors, by their names in a fused folder.
        processor: what makes its batches.
        home: folder of its tokenizer.
    """

    config: Mapping[str, Any]
    state: Callable[[], dict[str, Tensor]]
    processor: Processor
    home: Path


def files(path: Place, kwargs: Mapping[str, Any], *, weights: bool) -> Path:
    """The folder that `from_pretrained` is asked for; of a name on the hub in its cache.

    Args:
        path: the folder, or `org/name[@revision]`.
        kwargs: of `from_pretrained`, some of which say how the hub is asked.
        weights: whether its weights are needed; else the files beside them.

    Raises:
        InputError: two revisions; or as `converters.files.hub.fetch`.
    """
    repo = hub.parse(path)
    if repo is None or Path(path).exists():
        return Path(path)
    given = {key: kwargs.get(key) for key in ("cache_dir", "token", "force_download")}
    asked = kwargs.get("revision")
    if None not in (asked, repo.revision) and asked != repo.revision:
        raise InputError(
            path, found=f"revision {asked!r}, too", expected="one of them", fix="leave one out"
        )
    return hub.fetch(
        hub.Repo(repo.name, repo.revision or asked),
        str(path),
        weights=weights,
        local=bool(kwargs.get("local_files_only")),
        access=hub.Access(**{key: x for key, x in given.items() if x is not None}),
    )


def whole(path: Place, kwargs: Mapping[str, Any]) -> Path:
    """`files` with weights."""
    return files(path, kwargs, weights=True)


def small(path: Place, kwargs: Mapping[str, Any]) -> Path:
    """`files` without weights, unless it is a member's folder, whose tensors say what it is."""
    found = files(path, kwargs, weights=False)
    return found if is_fused(found) else whole(path, kwargs)


def is_fused(folder: Path) -> bool:
    """Whether a folder is for transformers to open by itself."""
    file = folder / "config.json"  # an adapter has none
    return file.is_file() and read_json(file).get("model_type") == "visionfuse"


def member(folder: Path, name: Place) -> Member | None:
    """A member's folder; None for a fused one.

    Args:
        folder: of `whole`, or `small`.
        name: what it was asked for by.

    Raises:
        InputError: as `converters.load`.
    """
    if is_fused(folder):
        return None
    source = open_source(folder)
    config = {**fused_config(source, {}), "name_or_path": str(name)}
    made = processor.processor(source, read_config(source))
    return Member(config, lambda: state_of(source), made, source.home)


def model_config(config: PreTrainedConfig) -> ModelConfig:
    """A fused model's config in vfjax.

    Args:
        config: `VisionFuseConfig`.

    Raises:
        InputError: a key of the wrong type, or one that is missing; or as `converters.load`.
    """
    return read_config(_source(config, config.name_or_path))


def processor_of(config: PreTrainedConfig, folder: Path) -> Processor:
    """What makes a fused model's batches.

    Args:
        config: `VisionFuseConfig`.
        folder: of the tokenizer.

    Raises:
        InputError: as `converters.load`.
    """
    source = _source(config, folder)
    return processor.processor(source, read_config(source))


def spare(config: PreTrainedConfig) -> set[str]:
    """Patterns of tensors that a folder may have and that nothing reads.

    Args:
        config: `VisionFuseConfig`.
    """
    source = _source(config, config.name_or_path)
    found = set()
    for part in source.components:
        table, start = source.table(part), "" if part == "llm" else f"{part}."
        rules = {re.escape(rule.source) for rule in table.rules if rule.optional}
        found |= {rf"^{re.escape(start)}(?:{name})$" for name in {*table.ignore, *rules}}
    return found


def _source(config: PreTrainedConfig, folder: str | Path) -> Source:
    """The folder in normal form, without tensors."""
    own = {key: x for key, x in config.to_dict().items() if key not in OTHERS}
    (layout,) = (layout for layout in LAYOUTS if layout.name == config.model_type)
    return layout.open(Path(folder), own, Towers({}, "auto"))
