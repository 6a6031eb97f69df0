"""Photographs with plain questions: nothing in them is made up.

Of MMVP (its photographs, its questions, its two answers each) and of those that scikit-image and
scikit-learn ship. A reader is scored by which answer it holds likelier.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import skimage.data
import sklearn.datasets
from PIL import Image

from experiments.family.members import Quiz
from experiments.family.real.english import Asked, of
from vfjax.eval.data import read_lines

SHOWN = {
    "astronaut": "woman",
    "brick": "wall",
    "camera": "photographer",
    "chelsea": "cat",
    "coffee": "cup",
    "coins": "coins",
    "grass": "grass",
    "hubble_deep_field": "galaxies",
    "moon": "moon",
    "page": "text",
    "rocket": "rocket",
    "china.jpg": "temple",
    "flower.jpg": "flower",
}
"""Photograph -> the word for what it shows; those with a suffix are scikit-learn's."""

WAYS = (
    ("What does this picture show?", "It shows a"),
    ("What can be seen in this photograph?", "The photograph shows a"),
)


def plain(folder: Path) -> Quiz:
    """The packages' photographs: what is it, and is there such a thing, once rightly and once not.

    Args:
        folder: where they are written as PNG, unless it is there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures, whats, there, absent = [], list[Asked](), list[Asked](), list[Asked]()
    words = tuple(SHOWN.values())
    for i, (name, word) in enumerate(SHOWN.items()):
        file = folder / f"{Path(name).stem}.png"
        if not file.is_file():
            read = sklearn.datasets.load_sample_image if "." in name else _read
            array = read(name)
            Image.fromarray(np.asarray(array)).convert("RGB").save(file)
        pictures.append(file)
        way, stem = WAYS[i % len(WAYS)]
        whats.append(Asked(way, words, stem, word))
        other = words[(i + 5) % len(words)]
        for asked, what, answer in ((there, word, "Yes"), (absent, other, "No")):
            asked.append(Asked(f"Does this picture show a {what}?", ("Yes", "No"), "", answer))
    return of(pictures, {"what": whats, "there": there, "absent": absent})


def _read(name: str) -> np.ndarray:
    return getattr(skimage.data, name)()


def mmvp(folder: Path, most: int) -> Quiz | None:
    """MMVP's photographs (arXiv 2401.06209), a question each; None if they are not there.

    Args:
        folder: with questions.jsonl and images/.
        most: questions.
    """
    if not (folder / "questions.jsonl").is_file():
        return None
    rows = list(_questions(folder))[:most]
    return of([picture for picture, _ in rows], {"mmvp": [asked for _, asked in rows]})


def _questions(folder: Path) -> Iterator[tuple[Path, Asked]]:
    """Questions whose two answers begin with different words."""
    for row in read_lines(folder / "questions.jsonl"):
        first, second = (part.strip() for part in row["options"].removeprefix("(a)").split("(b)"))
        options = (first.lower(), second.lower())
        if options[0].split()[0] == options[1].split()[0]:
            continue
        word = options[row["answer"] == "(b)"]
        yield folder / row["image"], Asked(row["question"], options, "The answer is", word)
