"""Weights files as safetensors has them, planned before anything is read.

The safetensors library serialises whole dictionaries: all tensors of a file must be in memory. Here
the header is computed from shapes and dtypes and the data follows block by block, so the format
(https://github.com/huggingface/safetensors#format) is spelled out by hand. The bytes are the same.
"""

import dataclasses
import json
import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

from converters.files.reader import DTYPES
from vfjax import InputError
from vfjax.merge import LazyTensor

NAMES = {dtype: name for name, dtype in DTYPES.items()}
ORDER = ["BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "I16", "U16", "F16", "BF16"]
ORDER += ["I32", "U32", "F32", "F64", "I64", "U64"]
"""The library sorts tensors by dtype, the last of these first, then by name."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """A safetensors file to be.

    Attributes:
        folder: sub-folder that it is in.
        path: in the whole folder.
        header: its first bytes.
        tensors: in file order.
    """

    folder: str
    path: str
    header: bytes
    tensors: Mapping[str, LazyTensor]

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.header) + sum(map(_nbytes, self.tensors.values()))


def plan_shards(
    weights: Mapping[str, Mapping[str, LazyTensor]],
    shard_bytes: float = 5e9,
    metadata: Mapping[str, str] | None = None,
) -> list[Shard]:
    """The weights files that `write_folder` makes of these arguments; nothing is read.

    Raises:
        InputError: a dtype has no safetensors name.
    """
    keep = metadata or {"format": "pt"}
    groups = (_shards(folder, tensors, shard_bytes, keep) for folder, tensors in weights.items())
    return [shard for group in groups for shard in group]


def _shards(
    folder: str, tensors: Mapping[str, LazyTensor], limit: float, metadata: Mapping[str, str]
) -> list[Shard]:
    """Splits tensors, in their order, over files of at most `limit` bytes."""
    parts: list[dict[str, LazyTensor]] = [{}]
    total = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in NAMES:
            raise InputError(
                name, found=f"dtype {tensor.dtype}", expected=", ".join(DTYPES), fix="convert it"
            )
        if parts[-1] and total + _nbytes(tensor) > limit:
            parts.append({})
            total = 0
        parts[-1][name] = tensor
        total += _nbytes(tensor)
    shards = []
    for i, part in enumerate(parts, 1):
        file = f"model-{i:05}-of-{len(parts):05}" if len(parts) > 1 else "model"
        ordered = dict(sorted(part.items(), key=lambda x: (-ORDER.index(NAMES[x[1].dtype]), x[0])))
        path = join(folder, f"{file}.safetensors")
        shards.append(Shard(folder, path, _header(ordered, metadata), ordered))
    return shards


def _header(tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> bytes:
    """Its length as 8 bytes, little-endian, then JSON padded with spaces to a multiple of 8."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + _nbytes(tensor)
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def index(shards: Iterable[Shard]) -> bytes:
    """The JSON that tells transformers which tensor is in which file."""
    places = {name: PurePosixPath(shard.path).name for shard in shards for name in shard.tensors}
    total = sum(_nbytes(tensor) for shard in shards for tensor in shard.tensors.values())
    found = {"metadata": {"total_size": total}, "weight_map": places}
    return (json.dumps(found, indent=2, sort_keys=True) + "\n").encode()


def _nbytes(tensor: LazyTensor) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def join(folder: str, name: str) -> str:
    """A file's path in the whole folder; "" is that folder itself."""
    return f"{folder}/{name}" if folder else name
