"""What folders with code of their own say: config.json has vfjax's configs whole, as plain JSON.

In the file that `converters.hf.remote` writes this takes the place of `converters.hf.reading`.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from converters.files.names import TOKENIZER_FILES
from converters.hf.plain import from_plain
from vfjax import Processor
from vfjax.model import ModelConfig

KEY = "plain"
"""Of config.json: "branches" and "llm" (`ModelConfig`), "processor" (`Processor`), "spare"."""

PROCESSOR = ("template", "stop_ids", "image_token", "settings")
"""Fields of `Processor` that are written."""

UNREAD: frozenset[str] = frozenset()
"""Keys that are not saved: the code is saved with the folder, and reads them."""

CLASSES: dict[str, type] = {}
"""Classes of the configs by their names; the end of the file that is made of this fills it."""


Place = str | os.PathLike[str]
"""A folder, or a name on the hub."""

HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token")
"""Arguments of `from_pretrained` that say how files of the hub are found."""


def whole(path: Place, kwargs: Mapping[str, Any]) -> Place:
    """The folder or name itself: transformers gets its weights."""
    del kwargs
    return path


def small(path: Place, kwargs: Mapping[str, Any]) -> Path:
    """The folder of config.json and the tokenizer; of a name on the hub in its cache.

    Args:
        path: the folder or name.
        kwargs: of `from_pretrained`.
    """
    if Path(path).is_dir():
        return Path(path)
    given = {key: kwargs[key] for key in HUB if key in kwargs}
    files = ["config.json", *TOKENIZER_FILES]
    return Path(snapshot_download(str(path), allow_patterns=files, **given))


def member(folder: Place, name: Place) -> None:
    """None: no folder of another layout can be read."""
    del folder, name


def model_config(config: PreTrainedConfig) -> ModelConfig:
    """See `converters.hf.reading.model_config`.

    Raises:
        InputError: as `from_plain`.
    """
    given = getattr(config, KEY)
    found = {
        "branches": given["branches"],
        "llm": given["llm"],
        "positions": config.positions,
        "mask": config.mask,
        "prune": None,
    }
    made = from_plain({"class": ModelConfig.__name__, **found}, CLASSES, f"config.json: {KEY}")
    assert isinstance(made, ModelConfig)
    return made


def processor_of(config: PreTrainedConfig, folder: Path) -> Processor:
    """See `converters.hf.reading.processor_of`.

    Raises:
        InputError: as `from_plain`.
    """
    where = f"config.json: {KEY}.processor"
    given = getattr(config, KEY)["processor"]
    found = {key: from_plain(given[key], CLASSES, f"{where}.{key}") for key in PROCESSOR}
    tokenizer = None
    if (folder / "tokenizer.json").is_file():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    template = getattr(tokenizer, "chat_template", None) or ""
    return Processor(model_config(config), tokenizer, chat_template=template, **found)  # type: ignore[arg-type]


def spare(config: PreTrainedConfig) -> set[str]:
    """See `converters.hf.reading.spare`."""
    return set(getattr(config, KEY)["spare"])
