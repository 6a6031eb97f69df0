"""Finding what an expression refers to, as a box: RefCOCO, RefCOCO+, RefCOCOg."""

import re
from collections.abc import Sequence

import numpy as np

from vfjax.errors import InputError
from vfjax.eval.data import (
    Benchmark,
    Data,
    Options,
    Question,
    fields,
    number,
    read_lines,
    text_fields,
)
from vfjax.eval.stats import Metric, ratio

PROMPT = "Please provide the bounding box coordinate of the region this sentence describes: "
"""LLaVA-1.5's words for RefCOCO (arXiv 2310.03744, appendix)."""

NUMBER = r"(\d+(?:\.\d*)?|\.\d+)"
_BOX = re.compile(rf"[\[({{<]\s*{NUMBER}" + rf"[\s,<>]+{NUMBER}" * 3 + r"\s*[\])}>]")

Box = tuple[float, float, float, float]


def read_refcoco(data: Data, options: Options) -> list[Question]:
    """Rows of img_id, sents, bbox (x, y, w, h), width and height, as in MiniGPT-4's eval_data.

    Pictures are COCO's train2014. `prompt` is put before the expression.
    """
    out = []
    file = data.file("*refcoco*.json", "*.json")
    for i, row in enumerate(read_lines(file)):
        where = f"{file} row {i}"
        keys = ("bbox", "width", "height")
        image, sentence = text_fields(row, where, "img_id", "sents")
        box, *size = fields(row, where, *keys)
        if not isinstance(box, list) or len(box) != 4:
            raise InputError(
                where, found=f"bbox {ascii(box)[:60]}", expected="[x, y, w, h]", fix="correct it"
            )
        x, y, w, h = (number(value, where, "bbox") for value in box)
        width, height = (
            number(value, where, key) for value, key in zip(size, keys[1:], strict=True)
        )
        name = "_".join(image.split("_")[:3])
        out.append(
            Question(
                id=str(i),
                prompt=options["prompt"] + sentence,
                images=(data.picture(f"{name}.jpg", "train2014"),),
                answers=(f"[{x}, {y}, {x + w}, {y + h}]",),
                cluster=name,
                extra={"box": (x, y, x + w, y + h), "size": (width, height)},
            )
        )
    return out


def parse_box(text: str) -> Box | None:
    """The first four numbers in brackets, such as Shikra's [0.1,0.2,0.3,0.4]; None without any."""
    found = _BOX.search(text)
    return None if found is None else tuple(map(float, found.groups()))  # type: ignore[return-value]


def unpadded(box: Box, size: tuple[float, float], *, scale: float, padded: bool) -> Box:
    """A model's box in pixels of the picture.

    Args:
        box: x1, y1, x2, y2, each 0 to `scale`.
        size: width and height of the picture.
        scale: 1, 100 or 1000.
        padded: the model saw the picture in the middle of a square (LLaVA's expand2square in
            llava/mm_utils.py: the border's width is rounded down).
    """
    width, height = size
    side = max(size)
    left, top = ((side - width) // 2, (side - height) // 2) if padded else (0, 0)
    across, down = (side, side) if padded else (width, height)
    x1, y1, x2, y2 = (value / scale for value in box)
    return (x1 * across - left, y1 * down - top, x2 * across - left, y2 * down - top)


def iou(a: Box, b: Box) -> float:
    """Intersection over union; 0 where a box has no area."""
    wide = min(a[2], b[2]) - max(a[0], b[0])
    high = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(wide, 0) * max(high, 0)
    areas = [max(x[2] - x[0], 0) * max(x[3] - x[1], 0) for x in (a, b)]
    return shared / (sum(areas) - shared) if shared else 0.0


def score_refcoco(
    questions: Sequence[Question], texts: Sequence[str], options: Options
) -> dict[str, Metric]:
    """Share of boxes with an IoU above 0.5, strictly (Shikra, MiniGPT-v2), and the mean IoU.

    A text without a box is wrong.
    """
    scale, padded = options["scale"], options["padded"]
    if not scale > 0:
        raise InputError("config.options.scale", found=scale, expected="above 0", fix="change it")
    found = np.zeros(len(questions))
    for i, (q, text) in enumerate(zip(questions, texts, strict=True)):
        if (box := parse_box(text)) is not None:
            box = unpadded(box, q.extra["size"], scale=scale, padded=padded)
            found[i] = iou(box, q.extra["box"])
    parsed = [parse_box(text) is not None for text in texts]
    return {
        "IoU > 0.5": ratio(found > 0.5),
        "mean IoU": ratio(found),
        "with a box": ratio(parsed),
    }


BENCHMARKS = {
    "refcoco": Benchmark(
        read_refcoco, score_refcoco, 64, {"padded": True, "scale": 1.0, "prompt": PROMPT}
    ),
}
