"""What folders and their configs say, by vfjax's readers of checkpoints.

`converters.hf.written` has the same functions for folders that hold code of their own.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedConfig

from converters import processor
from converters.folder import open_source
from converters.formats.visionfuse import LAYOUTS, fused_config
from converters.hf.state import Place, is_fused, state_of
from converters.load import model_config as read_config
from converters.source import Source
from converters.towers import Towers
from vfjax import Processor
from vfjax.model import ModelConfig

OTHERS = frozenset(PreTrainedConfig().to_dict()) - {"model_type"} | {"quantization_config"}
"""Keys of any config.json that transformers itself knows."""


UNREAD = frozenset({"auto_map", "plain"})
"""Keys of a folder with code of its own, which a folder that is saved here does not get."""


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


def member(path: Place, kwargs: Mapping[str, object]) -> Member | None:
    """A member's folder; None for a fused one, or a name on the hub.

    Args:
        path: the folder or name.
        kwargs: of `from_pretrained`.

    Raises:
        InputError: as `converters.load`.
    """
    if is_fused(path, kwargs):
        return None
    source = open_source(Path(path))
    config = {**fused_config(source, {}), "name_or_path": str(path)}
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
