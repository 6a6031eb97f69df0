"""LLaVA-OneVision-1.5's patches with a slot before each frame's, by hand."""

import numpy as np
import pytest

from tests.qwen_vl import picture
from vfjax import Video
from vfjax.architectures import MergerConfig, OneVision15
from vfjax.architectures.onevision15 import ClassedPatches
from vfjax.vision.encoders import QwenViTConfig
from vfjax.vision.images import ImageSpec

TOWER = QwenViTConfig(32, 1, 2, 40, patch=4, time=1, eps=1e-5, classes=True)
SPEC = ImageSpec(8, 8, "native", "crop", (0.5,) * 3, (0.5,) * 3, pixels=(256, 2560))
PATH = OneVision15(TOWER, MergerConfig(32, 16), SPEC, SPEC, 7, 8)


def test_slots():
    """Two pictures of 16 and 24 patches: class tokens at 0 and 17, padding behind 42 slots."""
    ready = PATH.prepare([[picture(16, 16), picture(24, 16)]])
    seen = ready.inputs
    assert isinstance(seen, ClassedPatches)
    n = len(seen.pixels)
    assert (n, ready.size) == (64, 16)
    slots = [*range(1, 17), *range(18, 42)]
    assert seen.kept.tolist() == slots + [n] * (n - 40)
    assert (np.abs(seen.pixels).sum(axis=1) > 0).nonzero()[0].tolist() == slots
    assert seen.frames.tolist() == [-i for i in range(17)] + [-i for i in range(25)] + [0] * 22
    assert seen.place[17:20].tolist() == [[0, 0], [0, 0], [0, 1]]
    assert seen.place[41].tolist() == [3, 5]


def test_runs():
    """A mark, a token for four patches, a mark, one after another; of a video frame by frame."""
    frames = tuple(picture(16, 16) for _ in range(3))
    first, film = PATH.prepare([[picture(24, 16), Video(frames)]]).runs
    assert first.indices.ravel().tolist() == [0, *range(6), 0]
    assert first.marks is not None and first.marks.tolist() == [7, *[-1] * 6, 8]
    assert first.place is None and first.span == 0
    assert film.indices.ravel().tolist() == [0, *range(6, 18), 0]


@pytest.mark.parametrize("size", [(16, 16), (30, 500), (120, 90)])
def test_tokens_and_regions_agree(size: tuple[int, int]):
    (run,) = PATH.prepare([[picture(*size)]]).runs
    assert len(run) == len(PATH.regions(size)) <= PATH.tokens


def test_fifty_pictures_need_a_shape_a_bucket():
    """Buckets are of all that the tower reads, class tokens as well."""
    rng = np.random.default_rng(0)
    sizes = {
        len(PATH.prepare([[picture(*rng.integers(8, 200, 2))]]).inputs.pixels) for _ in range(50)
    }
    assert sizes <= {64, 96, 128, 192}
