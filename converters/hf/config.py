"""A fused folder's config.json as transformers holds it."""

import dataclasses
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from converters.hf import reading
from vfjax.model import ModelConfig


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
    keys_to_ignore_at_inference = ["cache", "attention_mask", "position_ids"]
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

    @tie_word_embeddings.setter
    def tie_word_embeddings(self, tied: bool) -> None:
        self.text_config.tie_word_embeddings = tied

    def to_dict(self) -> dict[str, Any]:
        """See transformers; without what is for a folder's own code, where that does not run."""
        return {key: x for key, x in super().to_dict().items() if key not in reading.UNREAD}

    def vfjax(self) -> ModelConfig:
        """The model's config in vfjax.

        Raises:
            InputError: as `converters.load`.
        """
        return reading.model_config(self)
