"""English texts that ship in packages, to measure perplexity on."""

import dataclasses
import hashlib
import importlib.metadata
import importlib.resources
import platform
import pydoc_data.topics
from collections.abc import Callable, Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class Text:
    """A document.

    Attributes:
        name: of the file, or of the manual's topic.
        words: all of it.
    """

    name: str
    words: str


def descriptions() -> list[Text]:
    """What scikit-learn says of the data sets that it ships or fetches (datasets/descr/*.rst)."""
    folder = importlib.resources.files("sklearn.datasets") / "descr"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".rst")), key=lambda f: f.name)
    return [Text(file.name, file.read_text(encoding="utf-8")) for file in files]


def manual() -> list[Text]:
    """Python's language reference, as `help()` shows it (pydoc_data/topics.py)."""
    return [Text(name, words) for name, words in sorted(pydoc_data.topics.topics.items())]


TEXTS: Mapping[str, tuple[Callable[[], list[Text]], Callable[[], str]]] = {
    "descriptions": (
        descriptions,
        lambda: f"scikit-learn {importlib.metadata.version('scikit-learn')}",
    ),
    "manual": (manual, lambda: f"Python {platform.python_version()}"),
}
"""Kind -> its documents, and where they are from."""


def digest(texts: Sequence[Text]) -> str:
    """SHA-256, in hex, of the documents and their names."""
    whole = hashlib.sha256()
    for text in texts:
        for part in (text.name, text.words):
            data = part.encode()
            whole.update(len(data).to_bytes(8, "little") + data)
    return whole.hexdigest()


def windows(ids: Sequence[int], length: int, most: int) -> list[list[int]]:
    """The beginning of a document, cut into windows; one of a single token is left out.

    Args:
        ids: of the document.
        length: tokens of a window; the last may have fewer.
        most: tokens of the beginning.
    """
    cut = list(ids)[:most]
    parts = [cut[i : i + length] for i in range(0, len(cut), length)]
    return [part for part in parts if len(part) > 1]
