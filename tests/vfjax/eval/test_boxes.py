"""Boxes: how they are read, where they are in the picture, how much they share."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vfjax import InputError
from vfjax.eval import Data, get_benchmark, read
from vfjax.eval.boxes import iou, parse_box, score_refcoco, unpadded

LLAVA = {"padded": True, "scale": 1.0}


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("[0.1,0.2,0.3,0.4]", (0.1, 0.2, 0.3, 0.4)),
        ("It is at [0.100, 0.200, 0.300, 0.400].", (0.1, 0.2, 0.3, 0.4)),
        ("{<10><20><30><40>}", (10, 20, 30, 40)),
        ("<10 20 30 40>", (10, 20, 30, 40)),
        ("(1, 2, 3, 4) or [5, 6, 7, 8]", (1, 2, 3, 4)),
        ("[.5,.5,1.,1]", (0.5, 0.5, 1, 1)),
        ("[1, 2, 3]", None),
        ("0.1,0.2,0.3,0.4", None),
        ("", None),
    ],
)
def test_parse(text: str, box: tuple[float, ...] | None) -> None:
    assert parse_box(text) == box


def test_boxes_are_mapped_back_from_the_padded_square() -> None:
    wide = unpadded((0.25, 0.375, 0.5, 0.625), (640, 480), scale=1, padded=True)
    assert wide == (160, 160, 320, 320)  # 80 rows above the picture
    tall = unpadded((250, 0, 500, 1000), (100, 200), scale=1000, padded=True)
    assert tall == (0, 0, 50, 200)
    assert unpadded((0, 0, 50, 100), (10, 30), scale=100, padded=False) == (0, 0, 5, 30)


def test_mapping_undoes_llavas_padding() -> None:
    """Where a coloured box of a picture is after `expand2square`, and back."""
    for width, height in ((61, 40), (40, 61), (50, 50)):
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[10:25, 5:30] = 255
        side = max(width, height)
        square = Image.new("RGB", (side, side))
        square.paste(Image.fromarray(pixels), ((side - width) // 2, (side - height) // 2))
        rows, columns = np.nonzero(np.asarray(square)[..., 0])
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        shares = tuple(float(edge) / side for edge in box)
        back = unpadded(shares, (width, height), scale=1, padded=True)  # type: ignore[arg-type]
        np.testing.assert_allclose(back, (5, 10, 30, 25))


def test_iou_by_hand() -> None:
    assert iou((0, 0, 2, 2), (0, 0, 2, 2)) == 1
    assert iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert iou((0, 0, 1, 1), (1, 0, 2, 1)) == 0
    assert iou((2, 2, 0, 0), (0, 0, 2, 2)) == 0  # inside out
    assert iou((0, 0, 1, 2), (0, 0, 2, 2)) == 0.5


def test_random_ious_equal_torchvisions_formula() -> None:
    rng = np.random.default_rng(0)
    corners = np.sort(rng.integers(0, 20, (200, 2, 2, 2)), axis=2).reshape(200, 2, 4)
    grid = np.zeros((2, 20, 20), bool)
    for a, b in corners.tolist():
        grid[:] = False
        for mask, (x1, y1, x2, y2) in zip(grid, (a, b), strict=True):
            mask[y1:y2, x1:x2] = True
        union = (grid[0] | grid[1]).sum()
        expected = (grid[0] & grid[1]).sum() / union if union else 0
        assert iou(tuple(a), tuple(b)) == pytest.approx(expected)


def test_refcoco_of_the_published_rows(shared: Path) -> None:
    bench = get_benchmark("refcoco")
    questions = read(bench, Data(shared / "data/refcoco/refcoco_val_first100.json"), bench.options)
    assert len(questions) == 100
    first = questions[0]
    assert first.images[0].name == "COCO_train2014_000000580957.jpg"
    assert first.prompt.endswith("describes: bowl behind the others can only see part")
    texts = []
    for q in questions:
        (x1, y1, x2, y2), (width, height) = q.extra["box"], q.extra["size"]
        side, left, top = max(width, height), 0, 0
        left, top = (side - width) // 2, (side - height) // 2
        box = ((x1 + left) / side, (y1 + top) / side, (x2 + left) / side, (y2 + top) / side)
        texts.append("[" + ",".join(f"{edge:.3f}" for edge in box) + "]")
    assert score_refcoco(questions, texts, LLAVA)["IoU > 0.5"].value == 100
    texts[0] = "I see none."
    found = score_refcoco(questions, texts, LLAVA)
    assert found["IoU > 0.5"].value == 99 == found["with a box"].value
    wrong = score_refcoco(questions, texts, {"padded": False, "scale": 1.0})
    assert wrong["mean IoU"].value < 80


def test_half_is_not_more_than_half(shared: Path) -> None:
    bench = get_benchmark("refcoco")
    (first, *_) = read(
        bench, Data(shared / "data/refcoco/refcoco_val_first100.json"), bench.options
    )
    half = first.extra | {"box": (0.0, 0.0, 2.0, 4.0), "size": (4, 4)}
    question = type(first)("1", "?", extra=half)
    found = score_refcoco([question], ["[0,0,1,1]"], LLAVA)
    assert found["mean IoU"].value == 50 and found["IoU > 0.5"].value == 0


def test_a_folder_of_several_files_needs_one_named(shared: Path) -> None:
    bench = get_benchmark("refcoco")
    with pytest.raises(InputError, match="refcoco_val_first100.json, .*name the file"):
        read(bench, Data(shared / "data/refcoco"), bench.options)
    with pytest.raises(InputError, match="scale: found 0"):
        score_refcoco([], [], {"padded": True, "scale": 0})
