"""What a benchmark is made of: questions, read from local files as they are published."""

import collections
import csv
import dataclasses
import hashlib
import io
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from vfjax.atomic import contents, findable
from vfjax.errors import InputError, counted
from vfjax.eval.stats import Metric

T = TypeVar("T")
Picture = Path | bytes
"""A file, or an encoded picture."""


@dataclasses.dataclass(frozen=True)
class Question:
    """One thing to ask a model.

    Attributes:
        id: unique in the benchmark.
        prompt: words of the user's turn, without placeholders for pictures.
        images: pictures that stand before the words.
        video: in place of pictures.
        answers: what is right; empty if that is not published.
        cluster: questions of one cluster are not independent, such as those about one picture.
        extra: what else the scorer reads.
    """

    id: str
    prompt: str
    images: tuple[Picture, ...] = ()
    video: Path | None = None
    answers: tuple[str, ...] = ()
    cluster: str = ""
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def labelled(questions: Iterable[Question]) -> None:
    """Passes if every question has an answer.

    Raises:
        InputError: one has none.
    """
    for question in questions:
        if not question.answers:
            raise InputError(
                f"question {question.id}",
                found="no published answers",
                expected="a split, or annotations, with answers",
                fix="add them, or pass --config.mode=predict and hand the answers to the server",
            )


Options = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """How a benchmark is read and scored.

    Attributes:
        read: the files -> questions.
        score: questions and a text for each -> metrics; None if there is nothing to score by.
        max_new_tokens: of an answer, as the authors' scripts have it: of LLaVA 128 (its
            model_vqa_loader.py) or 1024 (its other scripts). It has none for captions and
            boxes: 64.
        options: names and defaults of what `read` and `score` can be told.
        judged: scoring asks a judge; see `vfjax.eval.judge`.
    """

    read: Callable[["Data", Options], list[Question]]
    score: Callable[[Sequence[Question], Sequence[str], Options], dict[str, Metric]] | None
    max_new_tokens: int = 128
    options: Options = dataclasses.field(default_factory=dict)
    judged: bool = False


class Data:
    """A benchmark's folder, or one file of it.

    Attributes:
        path: the folder or file.
        pictures: folder that names of pictures start from; None looks below `path`.
    """

    def __init__(self, path: Path, pictures: Path | None = None):
        for each, what in ((path, "a benchmark's files"), (pictures, "a folder of pictures")):
            if each is not None and not findable(each).exists():
                raise InputError(each, found="nothing", expected=what, fix="check the path")
        self.path, self.pictures = path, pictures
        self._folders: dict[tuple[str, ...], Path] = {}

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    def files(self, *patterns: str) -> list[Path]:
        """The files of the first pattern that has any, by name; or the one that was named.

        Raises:
            InputError: there is none.
        """
        if self.path.is_file():
            return [self.path]
        for pattern in patterns:
            if found := sorted(self.path.glob(pattern)):
                return found
        raise InputError(
            self.path,
            found="no such file",
            expected=" or ".join(patterns),
            fix="name the file itself, or its folder",
        )

    def file(self, *patterns: str) -> Path:
        """The one file of the first pattern that has any.

        Raises:
            InputError: there is none, or several.
        """
        first, *others = self.files(*patterns)
        if others:
            raise InputError(
                self.path,
                found=", ".join(path.name for path in (first, *others)),
                expected=f"one {patterns[0]}",
                fix="name the file that is meant",
            )
        return first

    def picture(self, name: str, *folders: str) -> Path:
        """Where a picture should lie: below the first of the folders that is there."""
        if self.pictures is not None:
            return self.pictures / name
        if folders not in self._folders:
            places = [self.folder / sub for sub in (*folders, "images")]
            self._folders[folders] = next((p for p in places if p.is_dir()), self.folder)
        return self._folders[folders] / name


def read_json(path: Path) -> object:
    """A JSON file.

    Raises:
        InputError: it is missing or holds something else.
    """
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, f"no JSON ({error})") from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A file of one JSON object a line, or a JSON list of objects.

    Raises:
        InputError: it is missing or holds something else.
    """
    text = read_text(path)
    rows: list[dict[str, Any]] = []
    if text.lstrip().startswith("["):
        rows += _of_kind(read_json(path), (list,), path, "the file", "a list")
    else:
        for number, line in enumerate(text.split("\n"), 1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except (ValueError, RecursionError) as error:
                raise _unreadable(f"{path} line {number}", f"no JSON ({error})") from None
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise _unreadable(f"{path} row {number}", f"a {type(row).__name__}")
    return rows


def read_object(path: Path, key: str) -> dict[str, Any]:
    """A JSON object, which should have a key.

    Raises:
        InputError: it is missing or holds something else.
    """
    return _of_kind(read_json(path), (dict,), path, "the whole", f"an object with {key!r}")


def read_table(path: Path, delimiter: str) -> list[dict[str, str]]:
    """A file of delimited columns with a line of names.

    Raises:
        InputError: it is missing, has no rows, two columns of one name, or a row of more columns
            than names.
    """
    csv.field_size_limit(sys.maxsize)  # pictures stand in columns
    lines = io.StringIO(read_text(path), newline="")  # which ends lines as an open file does
    try:
        table = csv.DictReader(lines, delimiter=delimiter)
        names = table.fieldnames or ()
        rows = list(table)
    except csv.Error as error:
        raise _unreadable(path, f"no table ({error})") from None
    if not rows:
        raise _unreadable(path, "no rows")
    if twice := [name for name, count in collections.Counter(names).items() if count > 1]:
        raise _unreadable(path, f"two columns {ascii(twice[0])}")
    for number, row in enumerate(rows, 1):
        rest: Any = row.pop(None, ())
        if any(rest):
            found = f"{counted(len(row) + len(rest), 'column')}, {counted(len(row), 'name')}"
            raise _unreadable(f"{path} row {number}", found)
    return rows


def read_by_id(path: Path) -> dict[str, dict[str, Any]]:
    """A JSON object of rows, each under its id.

    Raises:
        InputError: it is missing or holds something else.
    """
    rows = _of_kind(read_json(path), (dict,), path, "the file", "rows by id")
    for id, row in rows.items():
        _of_kind(row, (dict,), f"{path} {id}", "a row", "an object")
    return rows


def objects(value: object, where: object, key: str) -> list[dict[str, Any]]:
    """The objects of a list; raises InputError if it is none."""
    found = _of_kind(value, (list, tuple), where, key, "a list of objects")
    return [_of_kind(each, (dict,), where, f"in {key}", "an object") for each in found]


def as_texts(value: object, where: object, key: str) -> tuple[str, ...]:
    """The texts of a list; raises InputError if it is none."""
    return tuple(
        as_text(each, where, f"in {key}")
        for each in _of_kind(value, (list, tuple), where, key, "a list of texts")
    )


def as_text(value: object, where: object, key: str) -> str:
    """A text, or a number as text; raises InputError if it is neither."""
    kinds = (str,) if isinstance(value, bool) else (str, int, float)
    return str(_of_kind(value, kinds, where, key, "a text"))


def text_fields(row: object, where: object, *keys: str) -> list[str]:
    """Values of a row that are texts, or numbers, as an id may be.

    Raises:
        InputError: it lacks one, or one is neither.
    """
    found = zip(fields(row, where, *keys), keys, strict=True)
    return [as_text(value, where, key) for value, key in found]


def _of_kind(
    value: object, kinds: tuple[type[T], ...], where: object, what: str, expected: str
) -> T:
    if not isinstance(value, kinds):
        raise InputError(
            where,
            found=f"{what} {ascii(value)[:60]}",
            expected=expected,
            fix="use the file as it is published",
        )
    return value


def fields(row: object, where: object, *keys: str) -> list[Any]:
    """Values of a row.

    Raises:
        InputError: it is no object, or lacks one.
    """
    found = _of_kind(row, (dict,), where, "the whole", f"an object with {keys[0]!r}")
    for key in keys:
        if key not in found or found[key] is None:
            raise InputError(
                where,
                found=f"columns {', '.join(map(str, found))}",
                expected=f"a value in {key!r}",
                fix="use the file as it is published",
            )
    return [found[key] for key in keys]


def number(value: object, where: object, key: str) -> float:
    """A number of a row, which a table may hold as text.

    Raises:
        InputError: it is none, or not finite.
    """
    try:
        found = math.nan
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            found = float(value)
    except (ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise InputError(
            where,
            found=f"{key} {ascii(value)[:60]}",
            expected="a number",
            fix="use the file as it is published",
        )
    return found


def integer(value: object, where: object, key: str) -> int:
    """A whole number of a row: 7, "7", or what pandas makes of it beside an empty cell, "7.0".

    Raises:
        InputError: it is none.
    """
    if isinstance(value, str) and value.strip().isdecimal():
        return int(value)
    found = number(value, where, key)
    if not found.is_integer():
        raise InputError(
            where,
            found=f"{key} {ascii(value)[:60]}",
            expected="a whole number",
            fix="use the file as it is published",
        )
    return int(value) if isinstance(value, int) else int(found)


def read_text(path: Path) -> str:
    """A file in UTF-8, its ends of lines as they are, without a byte order mark.

    Raises:
        InputError: it is missing or something else.
    """
    try:
        return contents(path).decode("utf-8-sig")
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from None
    except UnicodeDecodeError as error:
        raise _unreadable(path, f"no UTF-8 ({error})") from None


def _unreadable(where: object, found: str) -> InputError:
    return InputError(
        where, found=found, expected="the benchmark's file", fix="copy it again, or correct it"
    )


def check(questions: Sequence[Question], where: Path) -> None:
    """Raises InputError if there is no question or two have the same id."""
    if not questions:
        raise _unreadable(where, "no questions")
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise InputError(
                where,
                found=f"two questions with id {question.id}",
                expected="another id each",
                fix="correct the file",
            )
        seen.add(question.id)


def check_pictures(questions: Iterable[Question]) -> None:
    """Raises InputError for the first picture or video that is not there."""
    known: set[Path] = set()
    for question in questions:
        media = [*question.images, *([question.video] if question.video else [])]
        for path in media:
            if isinstance(path, bytes) or path in known:
                continue
            if not path.is_file():
                raise InputError(
                    path,
                    found="no file",
                    expected=f"the picture of question {question.id}",
                    fix="pass the folder of the pictures as --config.images",
                )
            known.add(path)


def first(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """The first questions, at least `limit`, with all others of their clusters; None: all.

    A pair, or the rotations of a question, are scored together: half of one would be another score.
    """
    if limit is None:
        return list(questions)
    wanted: set[str] = set()
    sizes = collections.Counter(q.cluster for q in questions)
    count = 0
    for q in questions:
        if count >= limit:
            break
        if q.cluster not in wanted:
            wanted.add(q.cluster)
            count += sizes[q.cluster]
    return [q for q in questions if q.cluster in wanted]


def digest(questions: Iterable[Question]) -> str:
    """SHA-256 of what is asked: ids, words and names of pictures, in order."""
    sha = hashlib.sha256()
    for q in questions:
        names = [image.name if isinstance(image, Path) else _sha(image) for image in q.images]
        video = q.video.name if q.video else None
        sha.update(json.dumps([q.id, q.prompt, names, video]).encode() + b"\n")
    return sha.hexdigest()


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
