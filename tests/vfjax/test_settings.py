"""generation_config.json: every setting of transformers has a fate."""

import pytest
from transformers import (
    GenerationConfig,
)

from vfjax import InputError, Settings


def test_every_setting_of_transformers_has_a_fate() -> None:
    """Of its GenerationConfig: defaults change nothing; what does is used or refused by name."""
    defaults = GenerationConfig().to_dict()
    Settings.read(defaults, True, "x").check()
    others = {
        "no_repeat_ngram_size": 2, "suppress_tokens": [5], "begin_suppress_tokens": [5],
        "num_beams": 4, "min_new_tokens": 5, "bad_words_ids": [[5]], "forced_eos_token_id": 2,
    }  # fmt: skip
    for name, value in others.items():
        with pytest.raises(InputError, match=f"generation_config.json: {name}: found "):
            Settings.read(defaults | {name: value}, True, "x").check()
    for value in ("1.1", 0, -1, float("nan"), True):
        with pytest.raises(InputError, match="x: repetition_penalty: found .* a number above 0"):
            Settings.read({"repetition_penalty": value}, True, "x")
