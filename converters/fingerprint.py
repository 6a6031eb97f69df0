"""What tells, in little time, whether two processes read the same checkpoint."""

import hashlib
from pathlib import Path
from typing import Any

from converters.files import paths
from converters.source import Source
from vfjax import __version__

WHOLE = 16 << 20
"""Bytes of the largest weights file that is read whole."""
HEAD = 1 << 20
"""Bytes at the beginning of a larger one, its header among them, and at its end."""
BLOCKS, BLOCK = 256, 4096
"""So many blocks of so many bytes in between: in a file of 5 GB every matrix of an LLM has one."""

KINDS = {".json", ".model", ".txt", ".jinja"}
"""Of files beside the weights: configs, tokenizer, templates."""


def fingerprint(source: Source, label: str = "") -> dict[str, Any]:
    """Facts of `vfjax.processes`: config by key, digests of other files, samples of all weights.

    Args:
        source: an opened folder.
        label: of the folder, where there are several.
    """
    name = f"{label}: " if label else ""
    out: dict[str, Any] = {"vfjax": __version__}
    out |= {f"{name}config.json: {key}": value for key, value in source.config.items()}
    out |= {f"{name}{key}": getattr(source, key) for key in ("layout", "template")}
    out |= {f"{name}{part}: config": tower.config for part, tower in source.towers.items()}
    own = (path for path in source.home.iterdir() if path.name != source.generation.name)
    for path in sorted((*own, source.generation)):
        if path.suffix in KINDS and path.name != "config.json" and path.is_file():
            out[f"{name}{path.name}"] = sampled(path)
    for file, path in source.weight_files().items():
        out[f"{name}weights {file}"] = sampled(path)
    return out


def sampled(path: Path) -> str:
    """Some hex digits of SHA-256 of a file's size and bytes; of a large one's, of samples."""
    size = paths.size(path)
    total, spans = hashlib.sha256(str(size).encode()), [(0, size)]
    if size > WHOLE:
        starts = [HEAD + (size - 2 * HEAD - BLOCK) * i // (BLOCKS - 1) for i in range(BLOCKS)]
        spans = [(0, HEAD), *((start, BLOCK) for start in starts), (size - HEAD, HEAD)]
    for start, count in spans:
        block = bytearray(count)
        total.update(memoryview(block)[: paths.read_into(path, memoryview(block), start)])
    return total.hexdigest()[:16]
