"""Pictures of coloured digits on photographs, and questions about them.

A scene is a grid of 3 x 3 cells of which two to five hold a digit, each another, in one of six
colours. The digits are scikit-learn's `load_digits` (UCI's handwritten digits), the backgrounds
crops of the photographs that scikit-image and scikit-learn ship: nothing is downloaded. The splits
share neither a digit's drawing nor a region of a photograph.
"""

import dataclasses
import functools
import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import skimage.data
import sklearn.datasets
from PIL import Image

from vfjax.atomic import temporary
from vfjax.train import same_config

SIZE, CELL, CELLS = 48, 16, 9

COLOURS = ("red", "green", "blue", "yellow", "cyan", "magenta")
PLACES = (
    *("top-left", "top", "top-right"),
    *("left", "centre", "right"),
    *("bottom-left", "bottom", "bottom-right"),
)
NUMBERS = ("zero", "one", "two", "three", "four", "five")
KINDS = ("locdig", "loccol", "ocr", "colour", "count", "exist", "compare")

RGB = np.array(
    [
        *((0.9, 0.15, 0.15), (0.1, 0.8, 0.2), (0.2, 0.3, 1)),
        *((0.95, 0.9, 0.1), (0.1, 0.9, 0.9), (1, 0.2, 0.9)),
    ],
    np.float32,
)
SPLITS = {"train": (0, 1200), "validation": (1200, 1498), "test": (1498, 1797)}
"""Split -> range of digits in `load_digits`: its order is by writer, so tests have new writers."""

CHUNK = 1000  # scenes rendered at a time


@dataclasses.dataclass(frozen=True)
class Scenes:
    """Rendered scenes.

    Attributes:
        pictures: uint8[n, 48, 48, 3].
        digits: int8[n, 9], -1 where a cell is empty; cells row by row.
        colours: int8[n, 9] into `COLOURS`, -1 where a cell is empty.
    """

    pictures: np.ndarray
    digits: np.ndarray
    colours: np.ndarray

    def __len__(self) -> int:
        return len(self.digits)


def sample(split: str, count: int, seed: int) -> Scenes:
    """Draws and renders `count` scenes of a split; the same for the same arguments.

    Raises:
        KeyError: no such split.
    """
    rng = np.random.default_rng([seed, list(SPLITS).index(split)])
    digits, colours = layouts(count, rng)
    pictures = np.empty((count, SIZE, SIZE, 3), np.uint8)
    for i in range(0, count, CHUNK):
        part = slice(i, i + CHUNK)
        pictures[part] = render(digits[part], colours[part], split, rng)
    return Scenes(pictures, digits, colours)


def layouts(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Digits and colours int8[count, 9] of random scenes, see `Scenes`."""
    rows = np.arange(count)[:, None]
    objects = np.arange(5) < rng.integers(2, 6, count)[:, None]
    cells = rng.random((count, CELLS)).argsort(axis=1)[:, :5]
    digits, colours = np.full((2, count, CELLS), -1, np.int8)
    digits[rows, cells] = np.where(objects, rng.random((count, 10)).argsort(axis=1)[:, :5], -1)
    colours[rows, cells] = np.where(objects, rng.integers(len(COLOURS), size=(count, 5)), -1)
    return digits, colours


def render(
    digits: np.ndarray, colours: np.ndarray, split: str, rng: np.random.Generator
) -> np.ndarray:
    """Pictures uint8[n, 48, 48, 3] of scenes int8[n, 9], with drawings of a split.

    A digit is turned by up to 0.2 rad, sheared by up to 0.2, 13 to 16 pixels high and up to 1.5
    pixels off the middle of its cell; its colour is off by up to 0.1, the scene's brightness by up
    to a quarter, and noise of 0.04 lies over all.
    """
    rows, cells = np.nonzero(digits >= 0)
    shapes = draw(digits[rows, cells], split, rng)
    ink = np.zeros((len(digits), CELLS, CELL, CELL), np.float32)
    ink[rows, cells] = shapes
    ink = ink.reshape(-1, 3, 3, CELL, CELL).swapaxes(2, 3).reshape(-1, SIZE, SIZE, 1)
    tint = RGB[colours] + rng.uniform(-0.1, 0.1, (*colours.shape, 3)).astype(np.float32)
    tint = tint.reshape(-1, 3, 3, 3).repeat(CELL, axis=1).repeat(CELL, axis=2)
    out = backgrounds(len(digits), split, rng)
    out += (tint - out) * ink
    out *= rng.uniform(0.75, 1.25, (len(out), 1, 1, 1)).astype(np.float32)
    out += 0.04 * rng.standard_normal(out.shape, np.float32)
    return (out.clip(0, 1) * 255).round().astype(np.uint8)


def draw(digits: np.ndarray, split: str, rng: np.random.Generator) -> np.ndarray:
    """Opacities float32[n, 16, 16] of digits int[n], by an affine map of drawings of a split."""
    drawings, wanted = _drawings(split), np.empty(len(digits), int)
    for digit, own in enumerate(drawings[1]):
        mask = digits == digit
        wanted[mask] = rng.choice(own, mask.sum())
    n = len(digits)
    turn, shear = rng.uniform(-0.2, 0.2, (2, n))
    scale = 8 / rng.uniform(13, 16, n)
    shift = rng.uniform(-1.5, 1.5, (n, 2))
    grid = np.arange(CELL) - (CELL - 1) / 2
    y, x = grid[None, :, None] - shift[:, :1, None], grid[None, None] - shift[:, 1:, None]
    sin, cos = (f(turn)[:, None, None] for f in (np.sin, np.cos))
    scale, shear = scale[:, None, None], shear[:, None, None]
    u = (sin * x + cos * y) * scale
    v = (cos * x - sin * y) * scale + shear * u
    return _bilinear(drawings[0][wanted], u + 3.5, v + 3.5)


def _bilinear(pictures: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """float32[n, h, w] of float32[n, 8, 8] at rows y and columns x, each [n, h, w]; 0 outside."""
    padded = np.pad(pictures, ((0, 0), (2, 2), (2, 2)))
    y, x = (a.clip(-2, 8.999).astype(np.float32) + 2 for a in (y, x))
    top, left = y.astype(int), x.astype(int)
    dy, dx = y - top, x - left
    flat = padded.reshape(-1)
    start = np.arange(len(pictures))[:, None, None] * 144 + top * 12 + left
    upper = flat[start] * (1 - dx) + flat[start + 1] * dx
    lower = flat[start + 12] * (1 - dx) + flat[start + 13] * dx
    return upper * (1 - dy) + lower * dy


@functools.cache
def _drawings(split: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """Drawings float32[n, 8, 8] of a split, and which of them show 0, 1, ... 9."""
    first, last = SPLITS[split]
    data = sklearn.datasets.load_digits()
    shapes = (data.images[first:last] / 16).astype(np.float32).clip(0, 1)
    labels = data.target[first:last]
    return shapes, [np.flatnonzero(labels == digit) for digit in range(10)]


def backgrounds(count: int, split: str, rng: np.random.Generator) -> np.ndarray:
    """Darkened crops float32[count, 48, 48, 3] of the photographs' regions that are a split's."""
    regions = photographs(split)
    out = np.empty((count, SIZE, SIZE, 3), np.float32)
    for i in range(count):
        photo = regions[rng.integers(len(regions))]
        step = int(rng.integers(1, 3))
        top, left = (int(rng.integers(size - SIZE * step + 1)) for size in photo.shape[:2])
        out[i] = photo[top : top + SIZE * step : step, left : left + SIZE * step : step]
    return out * np.float32(0.5 / 255)


@functools.cache
def photographs(split: str) -> list[np.ndarray]:
    """A split's region of each photograph: the left 70 %, the upper right, the lower right."""
    names = ("astronaut", "coffee", "chelsea", "rocket", "grass", "brick", "gravel")
    photos = [np.asarray(getattr(skimage.data, name)()) for name in names]
    photos += [sklearn.datasets.load_sample_image(f"{name}.jpg") for name in ("china", "flower")]
    out = []
    for photo in photos:
        photo = photo if photo.ndim == 3 else np.repeat(photo[..., None], 3, axis=2)
        rows, columns = photo.shape[0] // 2, int(photo.shape[1] * 0.7)
        left, right = photo[:, :columns], photo[:, columns:]
        out.append({"train": left, "validation": right[:rows], "test": right[rows:]}[split])
    return out


def ask(
    kind: str, digits: Sequence[int], colours: Sequence[int], rng: random.Random
) -> tuple[str, str]:
    """A question about a scene, and its answer in one word.

    Where it needs a colour that stands alone and none does, "loccol" becomes "locdig" and "ocr"
    becomes "compare".

    Args:
        kind: one of `KINDS`.
        digits: the scene's nine, -1 in empty cells.
        colours: the same.
        rng: draws what is asked for.

    Raises:
        ValueError: no such kind.
    """
    cells = [i for i in range(CELLS) if digits[i] >= 0]
    seen = [colours[i] for i in cells]
    alone = [i for i in cells if seen.count(colours[i]) == 1]
    if not alone:
        kind = {"loccol": "locdig", "ocr": "compare"}.get(kind, kind)
    i = rng.choice(alone if kind in ("loccol", "ocr") else cells)
    digit, colour = str(digits[i]), COLOURS[colours[i]]
    match kind:
        case "locdig":
            return f"where is {digit} ?", PLACES[i]
        case "loccol":
            return f"where is {colour} ?", PLACES[i]
        case "ocr":
            return f"what digit is {colour} ?", digit
        case "colour":
            return f"what colour is {digit} ?", colour
        case "count":
            if rng.random() < 0.4:
                return "how many digits ?", NUMBERS[len(cells)]
            wanted = rng.choice(seen) if rng.random() < 0.7 else rng.randrange(len(COLOURS))
            return f"how many {COLOURS[wanted]} ?", NUMBERS[seen.count(wanted)]
        case "exist":
            return _exist([digits[i] for i in cells], seen, rng)
        case "compare":
            word, pick = rng.choice((("largest", max), ("smallest", min)))
            return f"which is {word} ?", str(pick(digits[i] for i in cells))
    raise ValueError(f"no questions of kind {kind!r}")


def _exist(digits: list[int], colours: list[int], rng: random.Random) -> tuple[str, str]:
    """Is there a digit, or a colour? As often yes as no."""
    there, everything = (digits, 10) if rng.random() < 0.5 else (colours, len(COLOURS))
    wanted, answer = rng.choice(there), "yes"
    if rng.random() < 0.5:
        wanted = rng.choice([x for x in range(everything) if x not in there])
        answer = "no"
    word = str(wanted) if there is digits else COLOURS[wanted]
    return f"is there {word} ?", answer


def ensure(folder: Path, split: str, count: int, seed: int, *, turns: int = 1) -> None:
    """`write`, unless the folder is there; raises InputError if it holds other scenes."""
    if not folder.is_dir():
        write(folder, split, count, seed, turns=turns)
    same_config(folder, {"split": split, "count": count, "seed": seed, "turns": turns})


def write(folder: str | Path, split: str, count: int, seed: int, *, turns: int = 6) -> Scenes:
    """Writes scenes as pictures and conversations that `vfjax.data.Conversations` reads.

    `folder` then holds images/NNNNN.png; rows.json, LLaVA's format, `turns` questions of random
    kinds a picture; scenes.json, one `{"image", "digits", "colours", "questions": {kind: [question,
    answer]}}` a picture, for alignment and scoring; config.json, the arguments.

    Args:
        folder: to make.
        split: "train", "validation" or "test".
        count: scenes.
        seed: of scenes and questions.
        turns: questions a conversation.

    Raises:
        FileExistsError: `folder` exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(folder)
    scenes = sample(split, count, seed)
    rng = random.Random(f"{split} {seed}")
    rows, labels = [], []
    folder.parent.mkdir(parents=True, exist_ok=True)
    with temporary(folder.parent, f".{folder.name}") as made:
        out = made / "data"
        (out / "images").mkdir(parents=True)
        both = zip(scenes.digits.tolist(), scenes.colours.tolist(), strict=True)
        for i, (digits, colours) in enumerate(both):
            image = f"{i:05d}.png"
            Image.fromarray(scenes.pictures[i]).save(out / "images" / image, compress_level=1)
            asked = [ask(rng.choice(KINDS), digits, colours, rng) for _ in range(turns)]
            rows.append({"id": f"{i:05d}", "image": image, "conversations": _messages(asked)})
            questions = {kind: ask(kind, digits, colours, rng) for kind in KINDS}
            labels.append(
                {"image": image, "digits": digits, "colours": colours, "questions": questions}
            )
        for file, value in (("rows.json", rows), ("scenes.json", labels)):
            (out / file).write_text(json.dumps(value))
        same_config(out, {"split": split, "count": count, "seed": seed, "turns": turns})
        out.rename(folder)
    return scenes


def _messages(turns: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """LLaVA's messages of questions and answers about one picture."""
    out = []
    for i, (question, answer) in enumerate(turns):
        picture = "" if i else "<image>\n"
        out += [
            {"from": "human", "value": picture + question},
            {"from": "gpt", "value": answer},
        ]
    return out
