"""Ovis2's tiles and their places in the picture, marks, and words that are drawn."""

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from vfjax import Video
from vfjax.architectures import Ovis2, VocabularyConfig
from vfjax.vision.encoders import AIMv2Config
from vfjax.vision.images import ImageSpec

ENCODER = AIMv2Config(8, 1, 2, 8, patch=2, image_size=8)


def ovis2(**options) -> Ovis2:
    """Views of 8 x 8 pixels, 2 x 2 tokens; pixels of 0 to 1."""
    connector = VocabularyConfig(32, 16, words=12, stride=2)
    return Ovis2(
        ENCODER, connector, ImageSpec(8, 8, "squash", "crop", (0.0,) * 3, (1.0,) * 3), **options
    )


def test_boxes_are_what_tokens_saw():
    """On a picture that grows brighter to the right and downwards; marks have no place."""
    path = ovis2(covering=False, most=6)
    x, y = np.meshgrid(np.arange(240), np.arange(160))
    image = Image.fromarray(np.stack([x, y, 0 * x], axis=-1).astype(np.uint8))
    ready, boxes = path.prepare([[image]]), path.regions(image.size)
    (run,) = ready.runs
    assert len(boxes) == len(run) == 4 * 7 + 3 + 5 <= path.tokens
    first = ready.size - 5
    seen = run.indices[:, 0]
    marks = seen[seen >= first] - first
    assert marks.tolist() == [0, 1, 2, 2, 3, 2, 2, 4]
    assert np.isnan(boxes[seen >= first]).all() and ready.shared == 5
    cells = ready.inputs.pixels.reshape(-1, 2, 4, 2, 4, 3).mean(axis=(2, 4))
    tokens = cells.reshape(-1, 3)[seen[seen < first]]
    middle = (boxes[seen < first, :2] + boxes[seen < first, 2:]) / 2
    np.testing.assert_allclose(tokens[:, :2] * 255, middle * [240, 160], atol=3)


def test_a_video_is_lines_of_pictures():
    film = Video(tuple(Image.new("RGB", (9, 9)) for _ in range(3)))
    ready = ovis2().prepare([[Image.new("RGB", (8, 8)), film]])
    lone, run = ready.runs
    end = ready.size - 5
    assert lone.indices[:, 0].tolist() == [end, 0, 1, 2, 3, end + 1, end + 4]
    spoken = run.tokenized(lambda text: [7, 8])
    frame = [-1] * 7
    assert run.words == ("\n", "\n")
    assert spoken.text.tolist() == [*frame, 7, 8, *frame, 7, 8, *frame]
    assert run.indices[8:15, 0].tolist() == [end, 8, 9, 10, 11, end + 1, end + 4]


def test_room_for_other_processes():
    ready = ovis2(most=4).prepare([[Image.new("RGB", (8, 8))]], slots=2)
    assert len(ready.inputs.pixels) == 2 * 5 and ready.size == 4 * 10 + 5


@pytest.mark.parametrize("choice", ["softmax", "st_argmax", "gumbel_argmax"])
def test_words(choice: str):
    """All by their shares, the likeliest, or one that is drawn; derivatives are softmax's."""
    config = VocabularyConfig(4, 3, words=8, choice=choice)
    head = config.build(rngs=nnx.Rngs(0))
    logits = np.array([1.0, 0.0, 2.0], np.float32)
    soft = np.exp(logits) / np.exp(logits).sum()
    plain = head.shares(logits)
    np.testing.assert_allclose(plain, soft if choice == "softmax" else [0, 0, 1], atol=1e-6)
    many = head.shares(np.broadcast_to(logits, (4000, 3)), jax.random.key(0))
    expected = [0, 0, 1] if choice == "st_argmax" else soft
    np.testing.assert_allclose(np.mean(many, axis=0), expected, atol=0.03)
    if choice == "gumbel_argmax":
        assert set(np.unique(many)) == {0, 1}
    slope = jax.grad(lambda x: head.shares(x)[2])(logits)
    np.testing.assert_allclose(slope, soft[2] * (np.eye(3)[2] - soft), atol=1e-6)
