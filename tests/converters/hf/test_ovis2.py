"""Ovis2's branch in torch, against transformers' features."""

from pathlib import Path

import pytest
import torch

from tests.converters.formats.test_ovis2 import IMAGE, INDICATORS, make_folder
from tests.internvl import picture
from tests.torch_branch import assert_close, assert_usable, show


@pytest.mark.parametrize("choice", ["softmax", "st_argmax", "gumbel_argmax"])
def test_tiles_and_marks(choice: str, tmp_path: Path) -> None:
    """Tokens are sums of visual words; what is drawn in training is the likeliest one here."""
    theirs, maker = make_folder(tmp_path, vision={"tokenize_function": choice})
    shown = show(tmp_path, [picture(84, 61)])
    given = maker(text="<image>", images=[picture(84, 61)], return_tensors="pt")
    theirs.model.vision_tower.config.tokenize_function = choice.replace("gumbel", "st")
    seen = theirs.model.get_image_features(given["pixel_values"])
    ids = given["input_ids"][0]
    ids = ids[ids >= IMAGE]
    marks = seen.visual_indicator_features[(ids - INDICATORS[0]).clamp(min=0)]
    assert_close(shown.values[ids != IMAGE], marks[ids != IMAGE])
    assert_close(shown.values[ids == IMAGE], seen.pooler_output.reshape(-1, 32))
    assert_usable(shown)
    shown.branch.train()
    states = shown.branch.encode(shown.given)
    drawn = [shown.branch.visual_tokens(states, torch.zeros(9, 32).__getitem__) for _ in range(2)]
    assert torch.equal(drawn[0].values, drawn[1].values) == (choice != "gumbel_argmax")
