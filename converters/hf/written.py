"""What folders with code of their own say: config.json has vfjax's configs whole, as plain JSON.

In the file that `converters.hf.remote` writes this takes the place of `converters.hf.reading`.
"""

from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from converters.hf.plain import from_plain
from converters.hf.state import Place
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


def member(path: Place, kwargs: Mapping[str, object]) -> None:
    """None: no folder of another layout can be read."""
    del path, kwargs


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
