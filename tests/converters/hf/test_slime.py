"""SliME's branch in torch."""

from pathlib import Path

import numpy as np
import transformers

from converters.hf import VisionFuseForConditionalGeneration, VisionFuseProcessor
from tests.converters.hf.recorded import (
    assert_as_recorded,
    assert_connectors_learn,
    assert_recorded,
    opened,
)
from tests.torch_fused import logits_of, picture


def test_authors_folder(shared: Path) -> None:
    """The shares of two experts, tiles, a router that leaves tokens out."""
    folder = shared / "golden" / "slime_vicuna"
    model = VisionFuseForConditionalGeneration.from_pretrained(folder).eval()
    assert_as_recorded(model, VisionFuseProcessor.from_pretrained(folder).vfjax, folder)


def test_fused_folder(shared: Path, tmp_path: Path) -> None:
    """And with all weights on disk, each fetched when its layer is called."""
    place = tmp_path / "fused"
    assert_recorded(shared / "golden" / "slime_llama3", place)
    away = transformers.AutoModelForImageTextToText.from_pretrained(
        place, dtype="float32", device_map={"": "disk"}, offload_folder=tmp_path / "away"
    )
    model, processor = opened(place)
    batch = processor([picture(40, 30)], input_ids=[[1, -200, 7]])
    assert {p.device.type for p in away.parameters()} == {"meta"}
    np.testing.assert_array_equal(logits_of(away, batch), logits_of(model, batch))
    assert_connectors_learn(model, batch)
