"""GGUF files (llama.cpp's) of causal LMs: their headers as configs, their tensors by HF names.

A file, or an LLM's beside the `mmproj` file of what it sees with, stands for a folder: its
config.json, tokenizer and links to them, made when it is opened and removed at the process's end.
The header is read here, within the file's bounds, as the format says (github.com/ggml-org/ggml,
docs/gguf.md); the package `gguf` names the tensors and dequantises them.
"""

import dataclasses
import functools
import math
import struct
import tempfile
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from types import EllipsisType, ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from converters.files import paths
from vfjax import InputError
from vfjax.atomic import JSON, UNFINISHED
from vfjax.errors import SHOWN, cut

MAGIC = b"GGUF"
SCALARS = dict(zip(range(13), (*"BbHhIif?", "", "", *"Qqd"), strict=True))
"""Number of a value's type -> its `struct` format; 8 is a text, 9 an array."""

TEXT, ARRAY = 8, 9
NESTED = 4
"""Arrays within arrays, at most."""

PLAIN: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Types of tensors that are stored as they are."""

PIECE = 1 << 22
"""Elements that are dequantised at once."""


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file says before its tensors.

    Attributes:
        path: of the file.
        values: its keys.
        tensors: name -> its shape as numpy has it, type, and offset in the file.
    """

    path: Path
    values: Mapping[str, Any]
    tensors: Mapping[str, tuple[tuple[int, ...], str, int]]


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


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """A tensor of a GGUF file, in float32 if it is quantised; `tensor[a:b]` reads only those rows.

    Attributes:
        path: of the file.
        shape: as numpy has it.
        dtype: of its values here.
        kind: its type in the file.
        offset: of its first byte.
        name: in the file.
        heads: llama.cpp stores a head's rows in pairs, the first half's with the second's: so many
            heads; 0: rows stand as they are.
        less: what was added to its values in the file (Gemma's norms: 1).
    """

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    kind: str
    offset: int
    name: str = ""
    heads: int = 0
    less: float = 0.0

    def __getitem__(self, index: slice | EllipsisType) -> np.ndarray:
        """Rows of the first axis as a new array."""
        rows = self.shape[0]
        start, stop, _ = (slice(None) if index is ... else index).indices(rows)
        if not self.heads:
            return self._rows(start, stop)
        size = rows // self.heads  # of a head
        low, high = start // size * size, -(-stop // size) * size
        found = self._rows(low, high)
        pairs = found.reshape(-1, size // 2, 2, *self.shape[1:])
        return pairs.swapaxes(1, 2).reshape(found.shape)[start - low : stop - low]

    def _rows(self, start: int, stop: int) -> np.ndarray:
        """Rows as the file has them, dequantised in pieces."""
        gguf = package(self.path)
        kind = gguf.GGMLQuantizationType[self.kind]
        block, stored = gguf.GGML_QUANT_SIZES[kind]
        wide = math.prod(self.shape[1:])
        row = (wide if len(self.shape) > 1 else 1) // block * stored
        out = np.empty((max(stop - start, 0), *self.shape[1:]), self.dtype)
        if len(self.shape) == 1 and block > 1:  # one row, whatever is asked of it
            whole = gguf.dequantize(self._read(0, self.shape[0] // block * stored), kind)
            out[:] = whole[start:stop]
            return out
        step = max(PIECE // max(wide, 1), 1)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            raw = self._read(first * row, (last - first) * row)
            if self.kind in PLAIN:
                part = raw.view(PLAIN[self.kind])
            else:
                part = gguf.dequantize(raw.reshape(-1, self.shape[-1] // block * stored), kind)
            out[first - start : last - start] = part.reshape(-1, *self.shape[1:])
        return out - np.asarray(self.less, self.dtype) if self.less else out

    def _read(self, offset: int, count: int) -> np.ndarray:
        raw = np.empty(count, np.uint8)
        if paths.read_into(self.path, raw.data, self.offset + offset) < count:
            raise InputError(
                self.path,
                found="fewer bytes than its header says",
                expected="a whole GGUF file",
                fix="download it again",
            )
        return raw


@dataclasses.dataclass(frozen=True)
class Filled:
    """A tensor of one value, that a file leaves out as nothing reads it."""

    path: Path
    shape: tuple[int, ...]
    value: float
    dtype: np.dtype = np.dtype(np.float32)
    name: str = ""

    def __getitem__(self, index: slice | EllipsisType) -> np.ndarray:
        """Rows of the first axis as a new array."""
        rows = len(range(self.shape[0])[slice(None) if index is ... else index])
        return np.full((rows, *self.shape[1:]), self.value, self.dtype)


Held = GGUFTensor | Filled


def read_tensors(path: Path) -> dict[str, Held]:
    """The tensors of a folder's GGUF file by their HF names, none of them read yet.

    Raises:
        InputError: a file that was not opened by itself.
    """
    if path not in _TENSORS:
        raise InputError(
            path,
            found="a GGUF file among others",
            expected="it alone",
            fix=f"pass the file, {path}",
        )
    return _TENSORS[path]


def read_folder(path: Path) -> dict[str, Held]:
    """Those of all files of a folder, of its `model.gguf`; errors as `read_tensors`."""
    beside = _TENSORS.get(path.with_name(LINKS[1]), {})
    return {**read_tensors(path), **beside}


def tensor(header: Header, name: str, *, heads: int = 0, less: float = 0.0) -> GGUFTensor:
    """A tensor of a file by its name there; see `GGUFTensor`.

    Raises:
        InputError: it is of a type that `gguf` does not dequantise.
    """
    shape, kind, offset = header.tensors[name]
    if kind not in PLAIN and not _known(kind):
        raise InputError(
            f"{header.path}: {name}",
            found=f"a tensor of type {kind}, which the package gguf does not dequantise",
            expected="another",
            fix="take a file of another quantisation, or update gguf",
        )
    dtype = PLAIN.get(kind, np.dtype(np.float32))
    return GGUFTensor(header.path, shape, dtype, kind, offset, name, heads=heads, less=less)


@functools.cache
def _known(kind: str) -> bool:
    """Whether the package dequantises a type."""
    import gguf

    number = gguf.GGMLQuantizationType[kind]
    try:
        gguf.dequantize(np.zeros(gguf.GGML_QUANT_SIZES[number][1], np.uint8), number)
    except NotImplementedError:
        return False
    return True


@functools.cache
def _root() -> Path:
    """Holds this process's folders, and is removed at its end."""
    made = tempfile.TemporaryDirectory(prefix="vfjax-gguf-")
    _KEPT.append(made)
    UNFINISHED.add(Path(made.name))
    return Path(made.name)


_KEPT: list[object] = []
_MADE: dict[tuple[tuple[Path, int, int], ...], Path] = {}

_TENSORS: dict[Path, dict[str, Held]] = {}
"""Link in a folder -> the tensors of its files."""

Writer = Callable[[Sequence[Header], Path], dict[str, Held]]
"""Writes the JSON files of an LLM's header, and of an `mmproj` file's beside, into a folder; their
tensors by HF names."""

LINKS = ("model.gguf", "mmproj.gguf")
"""Names of the files in their folder."""


def folder(paths: Sequence[Path], write: Writer) -> Path:
    """The folder that GGUF files stand for: their JSON files, and links to them, see `LINKS`.

    Args:
        paths: of an LLM's file, and of an `mmproj` file.
        write: see `Writer`.

    Raises:
        InputError: as `read_header`, or by `write`.
    """
    paths = [path.resolve() for path in paths]
    facts = [path.stat() for path in paths]
    key = tuple((p, f.st_size, f.st_mtime_ns) for p, f in zip(paths, facts, strict=True))
    if key not in _MADE:
        place = Path(tempfile.mkdtemp(dir=_root())) / paths[-1].name
        place.mkdir()
        headers = []
        for path, name in zip(paths, LINKS, strict=False):
            link = place / name
            link.symlink_to(path)
            SHOWN[str(link)] = str(path)  # before its folder, the first that fits is said
            headers.append(dataclasses.replace(read_header(path), path=link))
        SHOWN[str(place)] = str(paths[-1])
        tensors = write(headers, place)
        for header in headers:
            own = {name: tensor for name, tensor in tensors.items() if tensor.path == header.path}
            _TENSORS[header.path] = own
        _MADE[key] = place
    return _MADE[key]


PROJECTOR = "clip"
"""`general.architecture` of `mmproj` files."""


def is_projector(path: Path) -> bool:
    """Whether a file is an `mmproj`; errors as `read_header`."""
    return read_header(path).values.get("general.architecture") == PROJECTOR


def pair(folder: Path) -> list[Path]:
    """A folder's LLM and what it sees with, if its weights are one GGUF file of each.

    As llama.cpp tells them apart, by "mmproj" in the name (common/download.cpp).
    """
    names = sorted(folder.glob("*.gguf"))
    seen = [name for name in names if "mmproj" in name.name.lower()]
    alone = len(seen) == 1 and len(names) == 2 and not (folder / "config.json").exists()
    return [next(name for name in names if name not in seen), *seen] if alone else []


def opened(path: Path) -> Path:
    """The folder that a GGUF file, or a folder of an LLM's and an `mmproj` file, stands for.

    Any other path is returned as it is.

    Raises:
        InputError: as `folder`, or an `mmproj` file without its LLM.
    """
    if path.is_dir():
        return folder(found, _WRITERS[0]) if (found := pair(path)) else path
    if path.suffix != ".gguf" or not path.is_file():
        return path
    if not is_projector(path):
        return folder([path], _WRITERS[0])
    if not (found := pair(path.parent)):
        raise InputError(
            path,
            found="what an LLM sees with, alone",
            expected="its LLM, the only other GGUF file beside it",
            fix="pass base=LLM.gguf",
        )
    return folder(found, _WRITERS[0])


def register(write: Writer) -> None:
    """Lets GGUF files be named wherever a folder is."""
    _WRITERS.append(write)


_WRITERS: list[Writer] = []


def joined(path: str | PathLike[str], base: str | PathLike[str] | None) -> str | PathLike[str]:
    """The folder of an `mmproj` file with the LLM that is named as its base; else the path."""
    files = [Path(x) for x in (base, path) if x is not None]
    if len(files) < 2 or not all(x.suffix == ".gguf" and x.is_file() for x in files):
        return path
    return folder(files, _WRITERS[0]) if is_projector(files[1]) else path
