"""GGUF files (llama.cpp's) of causal LMs: their headers as configs, their tensors by HF names.

A file, or an LLM's beside the `mmproj` file of what it sees with, stands for a folder: its
config.json, tokenizer and links to them, made when it is opened and removed at the process's end.
The package `gguf` names the tensors and dequantises them; headers are read by `gguf_header`.
"""

import dataclasses
import functools
import math
import re
import tempfile
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from types import EllipsisType

import ml_dtypes
import numpy as np

from converters.files import paths
from converters.files.gguf_header import Header, join, package, parts, read_header
from vfjax import InputError
from vfjax.atomic import UNFINISHED
from vfjax.errors import SHOWN

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
    path = header.files.get(name, header.path)
    return GGUFTensor(path, shape, dtype, kind, offset, name, heads=heads, less=less)


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
    # by the names that were given: in the hub's cache they are links to others
    files = [[part.resolve() for part in parts(path)] for path in paths]
    facts = [(path, path.stat()) for each in files for path in each]
    key = tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in facts)
    if key not in _MADE:
        own = files[-1][0]
        place = Path(tempfile.mkdtemp(dir=_root())) / own.name
        place.mkdir()
        headers = []
        for each, name in zip(files, LINKS, strict=False):
            links = [place / name, *(place / f"{n}-{name}" for n in range(2, len(each) + 1))]
            for path, link in zip(each, links, strict=True):
                link.symlink_to(path)
                SHOWN[str(link)] = str(path)  # before its folder, the first that fits is said
            found = zip(map(read_header, each), links, strict=True)
            headers.append(join([dataclasses.replace(head, path=link) for head, link in found]))
        SHOWN[str(place)] = str(own)
        tensors = write(headers, place)
        for header in headers:
            held = {header.path, *header.files.values()}
            _TENSORS[header.path] = {n: each for n, each in tensors.items() if each.path in held}
        _MADE[key] = place
    return _MADE[key]


PROJECTOR = "clip"
"""`general.architecture` of `mmproj` files."""


def is_projector(path: Path) -> bool:
    """Whether a file is an `mmproj`; errors as `read_header`."""
    return read_header(path).values.get("general.architecture") == PROJECTOR


def pair(folder: Path) -> list[Path]:
    """A folder's LLM and what it sees with, if its weights are one GGUF model of each.

    As llama.cpp tells them apart, by "mmproj" in the name (common/download.cpp).
    """
    later = re.compile(r".+-(?!00001)\d{5}-of-\d{5}\.gguf")  # parts but the first
    names = sorted(name for name in folder.glob("*.gguf") if not later.fullmatch(name.name))
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
