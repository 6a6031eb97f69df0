"""LLaVA-OneVision-1.5's branch in torch, against what the authors' code was recorded to make."""

from pathlib import Path

import torch
import transformers

from converters.hf.onevision15 import OneVision15TextConfig
from tests.onevision15 import RECORDED, ROWS, write
from tests.torch_branch import assert_close, assert_usable, show


def test_pictures_and_a_video(tmp_path: Path) -> None:
    """Each frame as if it were alone, a class token before it within the tower."""
    rows = [i for i in range(len(ROWS)) if f"{i}/features" in RECORDED]
    shown = show(write(tmp_path / "port"), [each for i in rows for each in ROWS[i]])
    expected = [torch.from_numpy(RECORDED[f"{i}/features"]) for i in rows]
    assert_close(shown.values, torch.cat(expected))
    assert_usable(shown)


def test_its_llm_is_a_qwen3() -> None:
    """With one position a token, whatever its rope is called; other defaults."""
    kind = OneVision15TextConfig.model_type
    scaling = {"type": "mrope", "mrope_section": [1, 2, 1]}
    for given in ({}, {"rope_scaling": scaling}):
        found = transformers.AutoConfig.for_model(kind, **given)
        assert found.rope_parameters == {"rope_type": "default", "rope_theta": 5e6}
        assert found.hidden_size == 2560 and found.num_key_value_heads == 8
    small = {"vocab_size": 9, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 8}
    made = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **small))
    assert isinstance(made, transformers.Qwen3Model)
