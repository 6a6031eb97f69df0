"""LLaVA-OneVision's branch in torch."""

from pathlib import Path

import numpy as np

from converters.hf import VisionFuseForConditionalGeneration, VisionFuseProcessor
from tests.onevision import picture, port_folder, reference
from tests.torch_fused import logits_of
from vfjax import Video

FILM = [picture(50 + k, 40) for k in range(3)]


def test_transformers_folder(tmp_path: Path) -> None:
    """One tile and many, a shrunk raster, several pictures, a video: as its own class computes."""
    theirs = port_folder(tmp_path)
    model = VisionFuseForConditionalGeneration.from_pretrained(tmp_path).eval()
    processor = VisionFuseProcessor.from_pretrained(tmp_path).vfjax
    for row, images, film in (
        ([1, -200, 7, 200], [picture(20, 20)], None),
        ([1, -200, 7, 200], [picture(25, 400)], None),
        ([1, -200, 9, -200, 4], [picture(60, 20), picture(30, 70)], None),
        ([1, -201, 8, -200], [picture(61, 47)], FILM),
    ):
        ids = [-200 if token == -201 else token for token in row]
        media = [*([Video(tuple(film))] if film else []), *images]
        expected = reference(theirs, row, images, film)
        found = logits_of(model, processor([media], input_ids=[ids]))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
