"""Answers on disk: a header line and one line an answer, appended, so that a killed run goes on."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from vfjax.atomic import contents, lock, refuse_link, replacing
from vfjax.errors import InputError

NAME = "predictions.jsonl"

Header = Mapping[str, Any]


class Log:
    """A file of {"id": ..., "text": ...} lines below a header line, open for appending.

    A last line that was torn by a kill is cut off. Every answer is flushed as it is written.
    """

    def __init__(self, path: Path, header: Header):
        """Goes on with a file, or starts it.

        Raises:
            InputError: it belongs to a run with another header, is damaged, a link, or being
                written by another run.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        refuse_link(path)
        if path.exists():
            read(path)  # before it is opened: a pipe would wait
        self._file = path.open("a+b")
        try:
            lock(self._file.fileno(), path)
            size = _whole(path)[1]
            start = contents(path).rstrip(bytes(1))[:2]
            if size:
                read(path, header)
            elif not b'{"'.startswith(start):  # not the beginning of a header
                raise _damaged(path, 1)
        except InputError:
            self._file.close()
            raise
        self._file.truncate(size)
        if not size:
            self._line(header)

    def write(self, id: str, text: str) -> None:
        """Appends an answer."""
        self._line({"id": id, "text": text})

    def _line(self, value: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(value).encode() + b"\n")
        self._file.flush()

    def __enter__(self) -> "Log":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _whole(path: Path) -> tuple[list[bytes], int]:
    """The lines of a file that were written whole, and the bytes they take."""
    try:
        data = contents(path)
    except OSError as error:
        raise InputError(
            path, found=error.strerror, expected="predictions", fix="check the path"
        ) from None
    end = data.rfind(b"\n") + 1
    lines = data[:end].split(b"\n")[:-1]
    if lines and not _parsed(lines[-1]):  # zeros, after the machine went down
        end -= len(lines.pop()) + 1
    return lines, end


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read(path: Path, header: Header | None = None) -> tuple[Header, dict[str, str]]:
    """Header and answers by id.

    Args:
        path: the file.
        header: what it should be of; None takes any.

    Raises:
        InputError: no such file, other settings, a damaged line, an id that comes twice.
    """
    lines, _ = _whole(path)
    first = _parsed(lines[0]) if lines else None
    if lines and (first is None or "benchmark" not in first):
        raise _damaged(path, 1)
    found = first or {}
    if header is not None and lines:
        check(path, found, header)
    texts: dict[str, str] = {}
    for number, line in enumerate(lines[1:], 2):
        row = _parsed(line)
        if row is None or not all(isinstance(row.get(key), str) for key in ("id", "text")):
            raise _damaged(path, number)
        if row["id"] in texts:
            raise InputError(
                f"{path} line {number}",
                found=f"a second answer to {row['id']}",
                expected="one a question",
                fix="remove the file, or one of the two lines",
            )
        texts[row["id"]] = row["text"]
    return found, texts


def check(path: Path, found: Header, header: Header) -> None:
    """Raises InputError, naming the first setting of a file that is not as it should be."""
    for key in {**header, **found}:
        if found.get(key) != header.get(key):
            what = "other questions" if key == "questions" else f"{key} {found.get(key)!r}"
            expected = "this benchmark's" if key == "questions" else repr(header.get(key))
            raise InputError(
                path,
                found=f"predictions of {what}",
                expected=expected,
                fix="pass another --workdir, or the settings of that run",
            )


def _damaged(path: Path, number: int) -> InputError:
    return InputError(
        f"{path} line {number}",
        found="a damaged line",
        expected='{"id": ..., "text": ...} below a header',
        fix="remove that line or the file",
    )


def parts(folder: Path) -> list[Path]:
    """The files of a run: the joined one, and those of chunks."""
    names = NAME.replace(".", r"(-\d+-of-\d+)?\.")
    return sorted(path for path in folder.glob("*") if re.fullmatch(names, path.name))


def part(folder: Path, chunk: int, chunks: int) -> Path:
    """The file that a chunk writes."""
    return folder / NAME.replace(".", f"-{chunk}-of-{chunks}.")


def read_parts(folder: Path, header: Header) -> dict[str, str]:
    """Answers of all files of a run, by id.

    Raises:
        InputError: as `read`; or two files answer one question otherwise.
    """
    out: dict[str, str] = {}
    for path in parts(folder):
        for id, text in read(path, header)[1].items():
            if out.setdefault(id, text) != text:
                raise InputError(
                    path,
                    found=f"another answer to {id} than in the other files",
                    expected="one a question",
                    fix="remove the file that is not of this run",
                )
    return out


def join(folder: Path, header: Header, texts: Mapping[str, str]) -> Path:
    """Writes answers in the given order to one file, whole or not at all; removes the parts."""
    out = folder / NAME
    with replacing(out) as temporary, temporary.open("wb") as file:
        for row in (header, *({"id": id, "text": text} for id, text in texts.items())):
            file.write(json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    for path in parts(folder):
        if path != out:
            path.unlink()
    return out
