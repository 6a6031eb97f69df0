"""Conversations about pictures, in LLaVA's JSON format, checked before training starts.

The format of LLaVA's `docs/Finetune_Custom_Data.md`. Upstream's `train/train.py` meets a missing
picture or an odd conversation hours into the training; here every row is checked on opening.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from vfjax.errors import InputError
from vfjax.prompts import IMAGE_TOKEN

_ROLES = ("human", "gpt")
_Row = tuple[int, str, tuple[str, ...], tuple[tuple[str, str], ...]]
"""Number in the file, id, names of pictures, turns."""


@dataclass(frozen=True)
class Sample:
    """One conversation.

    Attributes:
        id: of the row; its number in the file if it has none.
        pictures: files, in the order of the placeholders.
        turns: (question, answer) pairs; questions hold one `<image>` for each picture.
    """

    id: str
    pictures: tuple[Path, ...]
    turns: tuple[tuple[str, str], ...]


class Conversations:
    """The rows of a conversation file, by number.

    A row is `{"id": ..., "image": name | [name, ...], "conversations": [{"from": "human", "value":
    "<image> What is it?"}, {"from": "gpt", "value": "A cat."}, ...]}`; id and image may be
    missing, other keys are not read. That pictures exist is looked up in one listing a folder;
    that they can be decoded shows when they are read (`Batches`).

    Attributes:
        path: the file.
        skip_broken: see `__init__`.
        broken: what is wrong with each row that was dropped, one line each.
        pictures: int32[n], pictures of each row.
        characters: int32[n], characters of each row's questions and answers.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        images: str | os.PathLike[str],
        *,
        skip_broken: bool = False,
    ):
        """Reads and checks the whole file.

        Args:
            path: a JSON list of rows, or, if its name ends in .jsonl, one row a line.
            images: the folder that names of pictures start from.
            skip_broken: drop rows with a fault, and count and name them in `broken`, rather than
                stop at the first. (Of a row that starts with gpt's words, upstream drops those.)

        Raises:
            InputError: a missing file or folder, a file that isn't JSON, no rows; and, unless
                they are skipped, rows without conversations, not question and answer by turns
                from a human's question on, with an empty text, with other than one `<image>` a
                picture, all in questions, or with a picture that is missing or outside `images`.
        """
        self.path, self.skip_broken = Path(path), skip_broken
        self.broken: list[str] = []
        self._images, self._rows = Path(images), list[_Row]()
        folder = _Folder(self._images)
        for number, row in enumerate(_read(self.path)):
            try:
                self._rows.append(_checked(row, f"{self.path} row {number}", number, folder))
            except InputError as error:
                if not skip_broken:
                    raise
                self.broken.append(str(error))
        if not self._rows:
            raise InputError(
                self.path,
                found=f"no usable row ({len(self.broken)} broken)",
                expected="at least one conversation",
                fix="correct the file" + (f", such as {self.broken[0]}" if self.broken else ""),
            )
        self.pictures = np.array([len(row[2]) for row in self._rows], np.int32)
        self.characters = np.array(
            [sum(len(q) + len(a) for q, a in row[3]) for row in self._rows], np.int32
        )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Sample:
        _, name, pictures, turns = self._rows[i]
        return Sample(name, tuple(self._images / p for p in pictures), turns)

    def where(self, i: int) -> str:
        """File, number in the file and id of row `i`, for messages."""
        number, name, *_ = self._rows[i]
        return f"{self.path} row {number} (id {name})"


class _Folder:
    """Whether files exist under a folder, by one listing of each folder that is asked about."""

    def __init__(self, root: Path):
        if not root.is_dir():
            raise InputError(
                root, found="no such folder", expected="the pictures' folder", fix="check the path"
            )
        self._root, self._files = root, dict[str, frozenset[str]]()

    def __contains__(self, name: str) -> bool:
        folder, _, file = os.path.normpath(name).rpartition("/")
        if folder not in self._files:
            self._files[folder] = self._list(folder)
        return file in self._files[folder]

    def _list(self, folder: str) -> frozenset[str]:
        try:
            with os.scandir(self._root / folder) as entries:
                return frozenset(e.name for e in entries if not e.is_dir(follow_symlinks=False))
        except (OSError, ValueError):  # ValueError: a zero byte in the name
            return frozenset()


def _read(path: Path) -> Iterator[Any]:
    """The rows as they are parsed."""
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise InputError(
            path, found=error.strerror, expected="a conversation file", fix="check the path"
        ) from None
    except UnicodeDecodeError as error:
        raise _not_json(path, error) from None
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield _parsed(line, f"{path} line {number}")
        return
    rows = _parsed(text, path)
    if not isinstance(rows, list):
        raise InputError(
            path,
            found=f"a JSON {type(rows).__name__}",
            expected="a list of rows",
            fix="wrap the rows in [ ], or name the file .jsonl if it has one a line",
        )
    yield from rows


def _parsed(text: str, where: object) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _not_json(where, error) from None


def _not_json(where: object, error: Exception) -> InputError:
    return InputError(
        where,
        found=f"no JSON ({error})",
        expected="a list of conversations in UTF-8, or one a line in a .jsonl",
        fix="correct or replace the file",
    )


def _checked(row: Any, where: str, number: int, folder: _Folder) -> _Row:
    """A row in short form; raises InputError with the first fault."""
    if not isinstance(row, dict) or "conversations" not in row:
        raise InputError(
            where,
            found=f"keys {', '.join(map(str, row))}" if isinstance(row, dict) else _short(row),
            expected="the keys id, image (if there is a picture) and conversations",
            fix="rename the keys, or drop the row",
        )
    name = str(row.get("id", number))
    where = f"{where} (id {name})"
    turns = _turns(row["conversations"], where)
    images = row.get("image")
    names = [] if images is None else [images] if isinstance(images, str) else images
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise InputError(
            where, found=f"image {_short(images)}", expected="a name or a list of names", fix="mend"
        )
    places = sum(question.count(IMAGE_TOKEN) for question, _ in turns)
    if places != len(names):
        raise InputError(
            where,
            found=f"{places} {IMAGE_TOKEN} placeholders for {len(names)} pictures",
            expected="as many of one as of the other",
            fix=f"put one {IMAGE_TOKEN} into a question for each picture, or drop the row",
        )
    for picture in names:
        _check_picture(picture, where, folder)
    return number, name, tuple(names), turns


def _turns(messages: Any, where: str) -> tuple[tuple[str, str], ...]:
    """(question, answer) pairs of a row's messages."""
    if not isinstance(messages, list) or not messages:
        raise InputError(
            where,
            found=f"conversations {_short(messages)}",
            expected="a list of messages",
            fix="correct or drop the row",
        )
    texts = [_text(m, f"{where} message {i}", _ROLES[i % 2]) for i, m in enumerate(messages)]
    if len(texts) % 2:
        raise InputError(
            where,
            found="a last question without answer",
            expected="an answer to every question",
            fix="answer or drop it",
        )
    return tuple(zip(texts[::2], texts[1::2], strict=True))


def _text(message: Any, where: str, role: str) -> str:
    """The words of a message that `role` should have said."""

    def wrong(found: str, expected: str) -> InputError:
        return InputError(where, found=found, expected=expected, fix="correct or drop the row")

    if not isinstance(message, dict) or not isinstance(message.get("value"), str):
        raise wrong(_short(message), f'{{"from": "{role}", "value": text}}')
    if message.get("from") != role:
        raise wrong(
            f"from {_short(message.get('from'))}",
            f"from {role!r}: human and gpt take turns, human first",
        )
    text = message["value"]
    if not text:
        raise wrong("an empty value", "text")
    if role == "gpt" and IMAGE_TOKEN in text:
        raise wrong(f"{IMAGE_TOKEN} in an answer", "pictures in questions only")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise wrong(f"half a character ({error.reason})", "valid Unicode") from None
    return text


def _check_picture(name: str, where: str, folder: _Folder) -> None:
    path = PurePosixPath(os.path.normpath(name)) if name else None
    if path is None or path.is_absolute() or path.parts[:1] == ("..",):
        raise InputError(
            where,
            found=f"image {_short(name)}",
            expected="a name inside the pictures' folder",
            fix="write it relative to that folder",
        )
    if name not in folder:
        raise InputError(
            where,
            found=f"image {_short(name)}, but no such file",
            expected="a file in the pictures' folder",
            fix="add the file, correct the name, or drop the row",
        )


def _short(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
