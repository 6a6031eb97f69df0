"""Headers of GGUF files (llama.cpp's): their keys, and where their tensors are.

Read within the file's bounds, as the format says (github.com/ggml-org/ggml, docs/gguf.md). A model
that gguf-split has cut into parts is one here.
"""

import dataclasses
import math
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from vfjax import InputError
from vfjax.atomic import JSON
from vfjax.errors import cut

MAGIC = b"GGUF"
SCALARS = dict(zip(range(13), (*"BbHhIif?", "", "", *"Qqd"), strict=True))
"""Number of a value's type -> its `struct` format; 8 is a text, 9 an array."""

TEXT, ARRAY = 8, 9
NESTED = 4
"""Arrays within arrays, at most."""


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file says before its tensors.

    Attributes:
        path: of the file.
        values: its keys.
        tensors: name -> its shape as numpy has it, type, and offset in the file.
        files: name -> the file of a tensor that is not in `path`.
    """

    path: Path
    values: Mapping[str, Any]
    tensors: Mapping[str, tuple[tuple[int, ...], str, int]]
    files: Mapping[str, Path] = dataclasses.field(default_factory=dict)


def package(path: Path) -> ModuleType:
    """The package `gguf`.

    Raises:
        InputError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise InputError(
            path,
            found="no package gguf to read it with",
            expected="it",
            fix="pip install 'vfjax[gguf]'",
        ) from error
    return gguf


class _Bytes:
    """A file's bytes, read one after another and never beyond its end."""

    def __init__(self, path: Path, data: np.ndarray):
        self.path, self.data, self.at = path, data, 0

    def take(self, size: int) -> np.ndarray:
        if size > len(self.data) - self.at:
            raise self.error(f"{len(self.data)} bytes, and a header that is longer")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, form: str) -> int:
        """A number in a `struct` format; a float, or True or False, in theirs."""
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")).data)[0]

    def text(self) -> str:
        found = bytes(self.take(self.number("Q")))
        try:
            return found.decode()
        except UnicodeDecodeError:  # a vocabulary may hold halves of letters
            return found.decode(errors="replace")

    def value(self, kind: int, depth: int = 0) -> JSON:
        if kind == TEXT:
            return self.text()
        if kind != ARRAY:
            if kind not in SCALARS:
                raise self.error(f"a value of type {kind}")
            return self.number(SCALARS[kind])
        kind, count = self.number("I"), self.number("Q")
        if SCALARS.get(kind):
            form = f"<{SCALARS[kind]}".replace("b", "i1").replace("B", "u1")
            return np.frombuffer(self.take(count * struct.calcsize(form[:2])), form).tolist()
        least = 8 if kind == TEXT else 12
        if depth >= NESTED or count * least > len(self.data) - self.at:
            raise self.error(f"an array of {count} values")
        return [self.value(kind, depth + 1) for _ in range(count)]

    def error(self, found: str) -> InputError:
        return InputError(
            self.path, found=found, expected="a whole GGUF file", fix="download it again"
        )


def read_header(path: Path) -> Header:
    """A file's keys and where its tensors are.

    Raises:
        InputError: `gguf` is not installed, no GGUF file, another version or byte order, or one
            that is cut short or whose header does not fit it.
    """
    gguf = package(path)
    size = path.stat().st_size
    data = np.memmap(path, np.uint8, "r") if size else np.zeros(0, np.uint8)
    file = _Bytes(path, data)
    if bytes(data[:4]) != MAGIC:
        raise file.error(f"{size} bytes that are no GGUF file")
    file.at = 4
    version = file.number("I")
    if version not in (2, 3):
        odd = version & 0xFFFF == 0
        raise file.error("numbers with the highest byte first" if odd else f"version {version}")
    count, keys = file.number("Q"), file.number("Q")
    values = {}
    for _ in range(keys):
        key = file.text()
        values[key] = file.value(file.number("I"))
    found = []
    for _ in range(count):
        name, dims = file.text(), file.number("I")
        if not 0 < dims <= 4:
            raise file.error(f"{cut(repr(name))} of {dims} dimensions")
        shape = tuple(file.number("Q") for _ in range(dims))[::-1]
        found.append((name, shape, file.number("I"), file.number("Q")))
    align = values.get("general.alignment", 32)
    if not isinstance(align, int) or not 0 < align <= 1 << 20:
        raise file.error(f"general.alignment {cut(repr(align))}")
    start = -(-file.at // align) * align
    tensors = {}
    for name, shape, number, offset in found:
        try:
            kind = gguf.GGMLQuantizationType(number)
        except ValueError:
            raise file.error(f"{cut(name)} of type {number}, which gguf does not know") from None
        block, stored = gguf.GGML_QUANT_SIZES[kind]
        if shape[-1] % block or start + offset + math.prod(shape) // block * stored > size:
            raise file.error(f"{size} bytes, and {cut(name)} of shape {shape} beyond them")
        tensors[name] = (shape, kind.name, start + offset)
    return Header(path, values, tensors)


COUNT, NUMBER = "split.count", "split.no"
"""Keys of a file that was split: how many parts it has, and which this is, from 0."""

TENSORS = "split.tensors.count"
"""Key of its first part: tensors of all."""


def parts(path: Path) -> list[Path]:
    """All files of a model of which one is named: itself, or what gguf-split has made of it.

    As llama.cpp names them (`llama_split_path`, src/llama.cpp): `NAME-00001-of-00003.gguf`.

    Raises:
        InputError: as `read_header`, a part with another name, or one that is not there.
    """
    count = read_header(path).values.get(COUNT, 1)
    if count == 1:
        return [path]
    end = f"-of-{count:05d}.gguf" if isinstance(count, int) else ""
    named = re.fullmatch(rf"(.+)-\d{{5}}{re.escape(end)}", path.name)
    if named is None:
        raise InputError(
            path,
            found=f"one of {cut(repr(count))} parts ({COUNT})",
            expected=f"the name NAME-00001{end or '-of-00002.gguf'}, as llama.cpp names parts",
            fix="name it so",
        )
    found = [path.with_name(f"{named[1]}-{number:05d}{end}") for number in range(1, count + 1)]
    if missing := [each.name for each in found if not each.is_file()]:
        raise InputError(
            path,
            found=f"one of {count} parts, and no {missing[0]}"
            + (f" nor {len(missing) - 1} more" if missing[1:] else ""),
            expected="all parts beside it",
            fix="download them, too",
        )
    return found


def join(headers: Sequence[Header]) -> Header:
    """The header of a whole model of its parts', the first of which has the keys.

    Raises:
        InputError: a part of another model or place, a tensor in two of them, or tensors too few.
    """
    first = headers[0]
    tensors, files = dict(first.tensors), dict[str, Path]()
    for number, part in enumerate(headers if headers[1:] else ()):
        found = part.values.get(NUMBER), part.values.get(COUNT)
        if found != (number, len(headers)):
            raise InputError(
                part.path,
                found=f"{NUMBER}, {COUNT} {cut(repr(found))}",
                expected=f"{(number, len(headers))}",
                fix="download it again",
            )
        if number and (twice := tensors.keys() & part.tensors.keys()):
            raise InputError(
                f"{part.path}: {min(twice)}",
                found="a tensor that another part has, too",
                expected="each in one part",
                fix="download the parts again, from one revision",
            )
        if number:
            tensors |= part.tensors
            files |= dict.fromkeys(part.tensors, part.path)
    whole = first.values.get(TENSORS, len(tensors)) if headers[1:] else len(tensors)
    if whole != len(tensors):
        raise InputError(
            f"{first.path}: {TENSORS}",
            found=f"{cut(repr(whole))}, and {len(tensors)} in all parts",
            expected="the same",
            fix="download the parts again, from one revision",
        )
    values = {k: v for k, v in first.values.items() if k not in (COUNT, NUMBER, TENSORS)}
    return Header(first.path, values, tensors, files)
