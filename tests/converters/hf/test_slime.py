"""SliME's branch in torch."""

from pathlib import Path

import numpy as np
import pytest
import transformers

from tests.converters.hf.recorded import assert_recorded, opened
from tests.torch_fused import logits_of, picture


@pytest.mark.parametrize("case", ["slime_vicuna", "slime_llama3"])
def test_authors_recordings(shared: Path, tmp_path: Path, case: str) -> None:
    """And with all weights on disk, each fetched when its layer is called."""
    place = tmp_path / "fused"
    assert_recorded(shared / "golden" / case, place)
    if case == "slime_llama3":
        auto = transformers.AutoModelForImageTextToText
        away = auto.from_pretrained(
            place, dtype="float32", device_map={"": "disk"}, offload_folder=tmp_path / "away"
        )
        model, processor = opened(place)
        batch = processor([picture(40, 30)], input_ids=[[1, -200, 7]])
        assert {p.device.type for p in away.parameters()} == {"meta"}
        np.testing.assert_array_equal(logits_of(away, batch), logits_of(model, batch))
