"""A fused folder's config.json as transformers holds it."""

import dataclasses
import re
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from converters.formats.visionfuse import LAYOUTS, fused_config
from converters.load import model_config
from converters.source import Source
from converters.towers import Towers
from vfjax.model import ModelConfig

OF_SOURCE = ("branches", "template", "image_token", "tokenizer", "positions", "mask", "recipe")
"""Keys of a fused folder's config.json beside `text_config`."""


class VisionFuseConfig(PreTrainedConfig):
    """Branches as JSON has them, and the LLM's config; see `converters.formats.visionfuse`.

    Attributes:
        text_config: of the LLM, transformers' own.
        branches: in the order in which their tokens are read.
        template: see `vfjax.Processor`.
        image_token: see `vfjax.Processor`.
        tokenizer: see `converters.source.Source`.
        positions: see `vfjax.model.ModelConfig`.
        mask: see `vfjax.model.ModelConfig`.
        recipe: what was merged, and how.
    """

    model_type = "visionfuse"
    sub_configs_defaults = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama")
    }

    text_config: Any = None  # transformers reads a mapping into its own class
    branches: list = dataclasses.field(default_factory=list)
    template: str = "plain"
    image_token: str = ""
    tokenizer: dict = dataclasses.field(default_factory=dict)
    positions: str = "running"
    mask: str = "causal"
    recipe: dict = dataclasses.field(default_factory=dict)

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the LLM's head is its embedding table."""
        return bool(self.text_config.tie_word_embeddings)

    def source(self, folder: str | Path = "") -> Source:
        """The folder in normal form, without tensors.

        Args:
            folder: where its other files are.

        Raises:
            InputError: a key of the wrong type, or one that is missing.
        """
        found = self.to_dict()
        known = {key: found[key] for key in ("model_type", "text_config", *OF_SOURCE)}
        (layout,) = (layout for layout in LAYOUTS if layout.name == self.model_type)
        return layout.open(Path(folder), known, Towers({}, "auto"))

    def vfjax(self) -> ModelConfig:
        """The model's config in vfjax.

        Raises:
            InputError: as `converters.load`.
        """
        return model_config(self.source(self.name_or_path))

    def spare(self) -> set[str]:
        """Patterns of tensors that a folder may have and that nothing reads."""
        source = self.source(self.name_or_path)
        found = set()
        for part in source.components:
            table, start = source.table(part), "" if part == "llm" else f"{part}."
            rules = {re.escape(rule.source) for rule in table.rules if rule.optional}
            found |= {rf"^{re.escape(start)}(?:{name})$" for name in {*table.ignore, *rules}}
        return found

    @classmethod
    def of(cls, source: Source) -> "VisionFuseConfig":
        """The config of an opened folder of any layout."""
        return cls(**fused_config(source, {}), name_or_path=str(source.path))
