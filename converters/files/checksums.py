"""Looks at all source files before a merge: their SHA-256, and NaN and infinities in them.

Both need every byte, and the hash takes longer than the merge, so what was found is kept for files
that have not changed since, by size, inode and the times of the last changes to content and inode:
the second cannot be set back.
"""

import dataclasses
import json
import os
import warnings
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from converters.files import paths
from converters.files.paths import stat
from converters.files.reader import read_file
from converters.load import check, model_config, structure
from converters.params.table import restored
from converters.source import Source
from converters.towers import Tensors
from vfjax import InputError
from vfjax.atomic import JSON, contents
from vfjax.merge.tensors import (
    EXPONENTS,
    blocks,
    count_nonfinite,
    has_nonfinite,
    nonfinite_error,
)


def mapped(source: Source, export: str = "model") -> dict[str, Tensors]:
    """Component -> the tensors that its parameters need; the ignorable ones are left behind.

    Args:
        source: an opened folder.
        export: "llm" leaves out the branches.

    Raises:
        InputError: parameters and tensors don't fit one to one.
    """
    if export == "llm":
        source = dataclasses.replace(source, branches=(), parts={"llm": source.parts["llm"]})
    _, shapes = structure(model_config(source))
    return {
        part: {
            one.source: source.parts[part][one.source]
            for path, rule in rules.items()
            for one in rule.each(shapes[path].shape)
        }
        for part, rules in check(source, shapes).items()
    }


def unread(source: Source, read: Mapping[str, Tensors]) -> set[str]:
    """Names, in a source's files, of tensors that are not among those that are read.

    Args:
        source: the opened folder.
        read: component -> its tensors that are, such as `mapped`'s.
    """
    known = {id(tensor) for tensors in read.values() for tensor in tensors.values()}
    out = set(source.unread)
    for tensors in source.spare.values():
        out |= {name for name, tensor in tensors.items() if id(tensor) not in known}
    for part, tensors in source.parts.items():
        prefixes = source.prefixes.get(part, ())
        for name, tensor in tensors.items():
            if id(tensor) not in known and any(name.startswith(new) for _, new in prefixes):
                out.add(restored(name, prefixes))
    return out


def audit_source(source: Source) -> dict[str, str]:
    """`audit` of all files that a folder is loaded from."""
    skip = unread(source, mapped(source))
    files = source.weight_files()
    return audit(files, skip=dict.fromkeys(files, skip))


def audit(
    files: Mapping[str, Path],
    checksums: bool = True,
    skip: Mapping[str, Collection[str]] | None = None,
) -> dict[str, str]:
    """Reads the weights files, several at a time, those that are not known.

    Args:
        files: label -> safetensors or `.bin` file.
        checksums: hash them too.
        skip: label -> names of tensors that nothing reads; what is not finite there is said in a
            warning.

    Returns:
        Label -> SHA-256, in hex; empty without `checksums`.

    Raises:
        InputError: a float tensor holds NaN or infinity, or a file cannot be read.
    """
    known = _load()
    # A file is remembered by its real path and read by its own: the suffix says what it is, and
    # what a link of the hub's cache leads to has none.
    named = {paths.name(path): path for path in files.values()}
    todo = {}
    for real, path in named.items():
        entry = known.get(real)
        if entry and entry["nonfinite"] and not entry["nonfinite"].keys() <= read_file(path).keys():
            entry = None  # a GGUF file's tensors have other names beside another's
        if not (entry and entry["stat"] == list(stat(path)) and (entry["sha256"] or not checksums)):
            todo[real] = stat(path)
    several = paths.threads(list(named.values()), os.cpu_count() or 1)
    with ThreadPoolExecutor(max(1, min(len(todo), several))) as pool:
        entries = list(pool.map(lambda real: _look(named[real], checksums), todo))
    for (real, before), entry in zip(todo.items(), entries, strict=True):
        known[real] = {"stat": list(before), **entry}
    if todo:
        _save(known)
    for label, path in files.items():
        for name, count in known[paths.name(path)]["nonfinite"].items():
            error = nonfinite_error(f"{path}: {name}", read_file(path)[name], count)
            if name not in (skip or {}).get(label, ()):
                raise error
            warnings.warn(f"{str(error).partition(',')[0]}; nothing reads it", stacklevel=2)
    return {label: known[paths.name(p)]["sha256"] for label, p in files.items() if checksums}


def _look(path: Path, checksums: bool) -> dict[str, Any]:
    """SHA-256, if it is asked for, and how much is not finite, by tensor."""
    nonfinite = {}
    try:
        for name, tensor in read_file(path).items():
            if tensor.dtype in EXPONENTS and any(
                has_nonfinite(np.asarray(tensor[rows])) for rows in blocks(tensor.shape)
            ):
                nonfinite[name] = count_nonfinite(tensor)
        return {"sha256": paths.sha256(path) if checksums else None, "nonfinite": nonfinite}
    except OSError as error:
        raise InputError(
            path,
            found=f"{error.strerror or error}",
            expected="a readable file",
            fix="copy it again",
        ) from error


KEPT = ("stat", "sha256", "nonfinite")
"""What is remembered of a file."""


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "vfjax" / "sources.json"


def _load() -> dict[str, Any]:
    """What is known of files; nothing if the cache is absent or not what `_save` writes."""
    try:
        found = json.loads(contents(_cache()))
        return {path: {k: entry[k] for k in KEPT} for path, entry in found.items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return {}


def _save(known: Mapping[str, JSON]) -> None:
    """Best effort: without a cache, files are read again."""
    part = _cache().with_name(f".sources-{os.getpid()}.tmp")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        there = {p: e for p, e in known.items() if paths.is_url(p) or Path(p).is_file()}
        part.write_text(json.dumps(there, indent=1))
        part.replace(_cache())
    except OSError:
        part.unlink(missing_ok=True)
