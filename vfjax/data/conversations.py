"""Conversations about pictures, in LLaVA's JSON format, checked before training starts.

The format of LLaVA's `docs/Finetune_Custom_Data.md`. Upstream's `train/train.py` meets a missing
picture or an odd conversation hours into the training; here every row is checked on opening.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

import numpy as np

from vfjax.atomic import contents, findable
from vfjax.errors import InputError, counted
from vfjax.text.prompts import IMAGE_TOKEN

VIDEO_TOKEN = "<video>"
"""Stands for a video in a question; `<image>` may, too, in a row without pictures (LLaVA-NeXT)."""

_ROLES = ("human", "gpt")
_READ = frozenset({"id", "image", "video", "conversations"})
_READ_OF_MESSAGE = frozenset({"from", "value"})

_MEDIUM = re.compile(
    r"(?:^|_|-)(?:images?|img|imgs|pictures?|photos?|pixels?|frames?|videos?|movies?|clips?"
    r"|audios?|sounds?|speech|voice|wave?|media|mm|documents?|pdf|depth|point_?clouds?)"
    r"(?:$|_(?:path|paths|file|files|name|names|url|urls|list|dir|folder|root|bytes|base64|b64"
    r"|data|token|tokens|start|end|input|inputs)s?$)",
    re.IGNORECASE,
)
"""In a key that names a medium."""

_LEARNING = re.compile(
    r"system|system_?prompt|instruction|prompt|tools?|functions?|labels?|loss|loss_?mask|mask"
    r"|(?:loss_?|sample_?)?weights?|chosen|rejected|messages|history|reward|train|trainable",
    re.IGNORECASE,
)
"""A key that says what is to be learnt."""

_SPAN = re.compile(
    r"(?:video_?)?(?:start|end|begin|stop|time_?(?:span|range)|timestamps?|span|segments?)"
    r"(?:_?(?:time|sec|secs|seconds?|s|ms|frames?|index|idx|timestamps?))?",
    re.IGNORECASE,
)
"""A key that says which part of a video is meant."""

_MEDIUM_FILE = re.compile(
    r"\.(?:png|jpe?g|webp|gif|bmp|tiff?|mp4|avi|mkv|mov|webm|wav|mp3|flac|ogg|m4a|npy)$",
    re.IGNORECASE,
)

_PLACEHOLDER = re.compile(
    # Alone on its line or at an end of the question; within a sentence it may be HTML's name.
    r"(?:^|\n)[ \t]*(<(?:video|audio)>)|(<(?:video|audio)>)[ \t]*(?:\n|$)"
    # What no text has but for a medium.
    r"|(<(?:image|video|audio|img|frame|speech|sound|picture)[ _-]?\d+>)"
    r"|(<\|?(?:image|video|audio|vision|img)(?:[ _-]?(?:pad|start|end|placeholder|token|\d+))?\|>)"
    r"|(<(?:image-placeholder|ImageHere|image_placeholder|speech|sound)>)|(<img>[^<]*</img>)",
    re.IGNORECASE,
)
"""Placeholders of other media, or of other codes' pictures, in a question."""

_Row = tuple[int, str, tuple[str, ...], frozenset[int], tuple[tuple[str, str], ...]]
"""Number in the file, id, names of pictures and videos, which are videos, turns."""


@dataclass(frozen=True)
class Sample:
    """One conversation.

    Attributes:
        id: of the row; its number in the file if it has none.
        pictures: files of pictures and videos, in the order of the placeholders.
        turns: (question, answer) pairs; questions hold one `<image>` for each picture or video.
        videos: which of `pictures`, by number, are videos.
    """

    id: str
    pictures: tuple[Path, ...]
    turns: tuple[tuple[str, str], ...]
    videos: frozenset[int] = frozenset()


class Conversations:
    """The rows of a conversation file, by number.

    A row is `{"id": ..., "image": name | [name, ...], "conversations": [{"from": "human", "value":
    "<image> What is it?"}, {"from": "gpt", "value": "A cat."}, ...]}`; id and image may be
    missing. `"video": name | [name, ...]` are files that `vfjax.open_video` reads, at `<video>`, or
    at `<image>` if the row has no picture. A first message that is not a human's is left out, as
    LLaVA does (llava/train/train.py, preprocess_v1). Other keys are notes (`source`, `model`), and
    not read; those that name other media or change what is learnt are a fault, as are the
    placeholders of other media. That pictures exist is looked up in one listing a folder; that they
    can be decoded shows when they are read (`Batches`).

    Attributes:
        path: the file.
        skip_broken: see `__init__`.
        broken: what is wrong with each row that was dropped, one line each.
        openings: rows whose first message is left out.
        pictures: int32[n], pictures and videos of each row.
        videos: bool[n], whether any of them is a video.
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
                stop at the first.

        Raises:
            InputError: a missing file or folder, a file that isn't JSON, no rows, videos without
                the extra "video"; and, unless they are skipped, rows without conversations, not
                question and answer by turns, with an empty text, with other than one placeholder a
                picture or video, all in questions, with a picture or video that is missing or
                outside `images`, or with keys or placeholders of media that are not read.
        """
        self.path, self.skip_broken = findable(path), skip_broken
        self.broken: list[str] = []
        self.openings = 0
        self._images, self._rows = findable(images), list[_Row]()
        folder = _Folder(self._images)
        for number, row in enumerate(_read(self.path)):
            try:
                checked, opening = _checked(row, f"{self.path} row {number}", number, folder)
                self._rows.append(checked)
                self.openings += opening
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
        self.videos = np.array([bool(row[3]) for row in self._rows])
        self.characters = np.array(
            [sum(len(q) + len(a) for q, a in row[4]) for row in self._rows], np.int32
        )
        if self.videos.any() and find_spec("av") is None:
            raise InputError(
                self.path,
                found="videos, and no PyAV",
                expected="it",
                fix="pip install 'vfjax[video]'",
            )

    def __len__(self) -> int:
        return len(self._rows)

    def digest(self) -> str:
        """Some hex digits of SHA-256 of the rows: ids, words, names of pictures, in order."""
        total = hashlib.sha256()
        for *row, videos, turns in self._rows:
            total.update(repr((row, sorted(videos), turns)).encode())
        return total.hexdigest()[:16]

    def __getitem__(self, i: int) -> Sample:
        _, name, pictures, videos, turns = self._rows[i]
        return Sample(name, tuple(self._images / p for p in pictures), turns, videos)

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


def _read(path: Path) -> Iterator[object]:
    """The rows as they are parsed."""
    try:
        text = contents(path).decode(
            "utf-8-sig"
        )  # some editors begin a file with a byte order mark
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


def _parsed(text: str, where: object) -> object:
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


def _checked(row: object, where: str, number: int, folder: _Folder) -> tuple[_Row, int]:
    """A row in short form, and messages before its first pair; raises InputError with a fault."""
    if not isinstance(row, dict) or "conversations" not in row:
        raise InputError(
            where,
            found=f"keys {', '.join(map(_name, row))}"[:200]
            if isinstance(row, dict)
            else _short(row),
            expected="the keys id, image (if there is a picture) and conversations",
            fix="rename the keys, or drop the row",
        )
    name = _name(row.get("id", number))
    where = f"{where} (id {name})"
    _check_keys(row, _READ, where)
    messages, opening = _messages(row["conversations"], where)
    images, videos = (_names(row.get(key), key, where) for key in ("image", "video"))
    pictures, films, turns = _placed(_turns(messages, opening, where), images, videos, where)
    for i, picture in enumerate(pictures):
        _check_picture(picture, "video" if i in films else "image", where, folder)
    return (number, name, pictures, films, turns), opening


def _name(id: object) -> str:
    """A row's id in messages."""
    name = str(id)
    return name if name.isprintable() and name.isascii() and len(name) <= 80 else _short(id)


def _check_keys(row: Mapping[str, object], read: frozenset[str], where: str) -> None:
    """Raises InputError for a key that is not read and has an effect elsewhere."""
    for key, value in row.items():
        if key in read or value is None or value in ("", [], {}):
            continue
        first = value[0] if isinstance(value, list) else value
        is_file = isinstance(first, str) and _MEDIUM_FILE.search(first)
        if is_file or _MEDIUM.search(key):
            meaning = "a medium that is not read"
        elif _LEARNING.fullmatch(key):
            meaning = "what is to be learnt, which is not read"
        elif row.get("video") and _SPAN.fullmatch(key):
            meaning = "a part of the video, which is read whole"
        else:
            continue
        raise InputError(
            where,
            found=f"{_short(key)} {_short(value)}: {meaning}",
            expected=f"the keys {', '.join(sorted(read))}, and notes",
            fix="rename the key if it is one of these, remove it, or drop the row",
        )


def _names(value: object, key: str, where: str) -> list[str]:
    """A row's pictures or videos."""
    names = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise InputError(
            where, found=f"{key} {_short(value)}", expected="a name or a list of names", fix="mend"
        )
    return names


def _placed(
    turns: tuple[tuple[str, str], ...], images: list[str], videos: list[str], where: str
) -> tuple[tuple[str, ...], frozenset[int], tuple[tuple[str, str], ...]]:
    """Pictures and videos in the order of their placeholders, and turns with `<image>` at each."""
    words = "".join(question for question, _ in turns)
    places = re.findall(f"{IMAGE_TOKEN}|{VIDEO_TOKEN}" if videos else IMAGE_TOKEN, words)
    if videos and not images and VIDEO_TOKEN not in places:
        places = [VIDEO_TOKEN] * len(places)
    for names, token, what in (
        (images, IMAGE_TOKEN, "picture"),
        (videos, VIDEO_TOKEN, "video"),
    ):
        if places.count(token) != len(names):
            raise InputError(
                where,
                found=f"{counted(places.count(token), f'{token} placeholder')} for "
                + counted(len(names), what),
                expected="as many of one as of the other",
                fix=f"put one {token} into a question for each {what}, or drop the row",
            )
    rest = {IMAGE_TOKEN: iter(images), VIDEO_TOKEN: iter(videos)}
    pictures = tuple(next(rest[place]) for place in places)
    films = frozenset(i for i, place in enumerate(places) if place == VIDEO_TOKEN)
    if videos:
        turns = tuple((q.replace(VIDEO_TOKEN, IMAGE_TOKEN), a) for q, a in turns)
    for question, _ in turns:
        other = _PLACEHOLDER.search(question)
        token = next((group for group in other.groups() if group), "") if other else ""
        if token and f"</{token[1:]}" not in question:
            raise InputError(
                where,
                found=f"{_short(token)} in a question",
                expected=f"{IMAGE_TOKEN} for a picture, {VIDEO_TOKEN} for a video of the row",
                fix="name the medium in the row if it is one of these, or drop the row",
            )
    return pictures, films, turns


def _messages(messages: object, where: str) -> tuple[list[object], int]:
    """A row's messages from a human's on, and the number of the first of them."""
    if not isinstance(messages, list) or not messages:
        raise InputError(
            where,
            found=f"conversations {_short(messages)}",
            expected="a list of messages",
            fix="correct or drop the row",
        )
    first = messages[0]
    opening = isinstance(first, dict) and first.get("from") in ("gpt", "system")
    start = int(opening and len(messages) > 1)
    return messages[start:], start


def _turns(messages: Sequence[object], first: int, where: str) -> tuple[tuple[str, str], ...]:
    """(question, answer) pairs of messages, the first of which is the row's `first`."""
    texts = [
        _text(message, f"{where} message {first + i}", _ROLES[i % 2])
        for i, message in enumerate(messages)
    ]
    if len(texts) % 2:
        raise InputError(
            where,
            found="a last question without answer",
            expected="an answer to every question",
            fix="answer or drop it",
        )
    return tuple(zip(texts[::2], texts[1::2], strict=True))


def _text(message: object, where: str, role: str) -> str:
    """The words of a message that `role` should have said."""

    def wrong(found: str, expected: str) -> InputError:
        return InputError(where, found=found, expected=expected, fix="correct or drop the row")

    if not isinstance(message, dict) or not isinstance(message.get("value"), str):
        raise wrong(_short(message), f'{{"from": "{role}", "value": text}}')
    _check_keys(message, _READ_OF_MESSAGE, where)
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


def _check_picture(name: str, kind: str, where: str, folder: _Folder) -> None:
    path = PurePosixPath(os.path.normpath(name)) if name else None
    if path is None or path.is_absolute() or path.parts[:1] == ("..",):
        raise InputError(
            where,
            found=f"{kind} {_short(name)}",
            expected="a name inside the pictures' folder",
            fix="write it relative to that folder",
        )
    if name not in folder:
        raise InputError(
            where,
            found=f"{kind} {_short(name)}, but no such file",
            expected="a file in the pictures' folder",
            fix="add the file, correct the name, or drop the row",
        )


def _short(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
