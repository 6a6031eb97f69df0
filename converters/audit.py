"""Looks at all source files before a merge: their SHA-256, and NaN and infinities in them.

Both need every byte, and the hash takes longer than the merge, so what was found is kept for files
that have not changed since, by size, time and inode.
"""

import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from converters.reader import read_file
from converters.writer import sha256
from vfjax import InputError
from vfjax.merge.tensors import EXPONENTS, blocks, count_nonfinite, has_nonfinite, nonfinite_error

Stat = tuple[int, int, int]
"""Size, time of the last change in nanoseconds, inode."""


def stat(path: Path) -> Stat:
    """What tells whether a file has changed."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


def audit(files: Mapping[str, Path], checksums: bool = True) -> dict[str, str]:
    """Reads the weights files, several at a time, those that are not known to be good.

    Args:
        files: label -> safetensors or `.bin` file.
        checksums: hash them too.

    Returns:
        Label -> SHA-256, in hex; empty without `checksums`.

    Raises:
        InputError: a float tensor holds NaN or infinity, or a file cannot be read.
    """
    known = _load()
    # A file is remembered by its real path and read by its own: the suffix says what it is, and
    # what a link of the hub's cache leads to has none.
    paths = {str(path.resolve()): path for path in files.values()}
    todo = {}
    for real, path in paths.items():
        entry = known.get(real)
        if not (entry and entry["stat"] == list(stat(path)) and (entry["sha256"] or not checksums)):
            todo[real] = stat(path)
    with ThreadPoolExecutor(max(1, min(len(todo), os.cpu_count() or 1))) as pool:
        digests = list(pool.map(lambda real: _look(paths[real], checksums), todo))
    for (real, before), digest in zip(todo.items(), digests, strict=True):
        known[real] = {"stat": list(before), "sha256": digest}
    if todo:
        _save(known)
    return {label: known[str(p.resolve())]["sha256"] for label, p in files.items() if checksums}


def _look(path: Path, checksums: bool) -> str | None:
    try:
        for name, tensor in read_file(path).items():
            if tensor.dtype in EXPONENTS and any(
                has_nonfinite(np.asarray(tensor[rows])) for rows in blocks(tensor.shape)
            ):
                raise nonfinite_error(f"{path}: {name}", tensor, count_nonfinite(tensor))
        return sha256(path) if checksums else None
    except OSError as error:
        raise InputError(
            path,
            found=f"{error.strerror or error}",
            expected="a readable file",
            fix="copy it again",
        ) from error


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "vfjax" / "sources.json"


def _load() -> dict[str, Any]:
    """What is known of files; nothing if the cache is absent or not what `_save` writes."""
    try:
        found = json.loads(_cache().read_text())
        return {path: {k: entry[k] for k in ("stat", "sha256")} for path, entry in found.items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return {}


def _save(known: Mapping[str, Any]) -> None:
    """Best effort: without a cache, files are read again."""
    part = _cache().with_name(f".sources-{os.getpid()}.tmp")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({p: e for p, e in known.items() if Path(p).is_file()}, indent=1))
        part.replace(_cache())
    except OSError:
        part.unlink(missing_ok=True)
