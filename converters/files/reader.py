"""Lazy tensors of checkpoint files: safetensors (single, sharded) and PyTorch `.bin`.

safetensors files are checked by the safetensors library when opened, then read at the offsets of
their header. They are not mapped: a shard that shrinks under us ends in an error, not a bus error.
"""

import dataclasses
import json
import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import EllipsisType
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from converters.files import gguf, paths
from vfjax import InputError
from vfjax.atomic import findable, read_json
from vfjax.errors import cut
from vfjax.merge import Inner, LazyTensor, aligned

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""safetensors dtype names."""

LARGEST = 1 << 59
"""Elements of an array that numpy can address, of the widest dtype."""

INDEX = ".index.json"

STEMS = ("model", "pytorch_model")
"""Names of a checkpoint's weights files, without their ending."""


@dataclasses.dataclass(frozen=True)
class FileTensor:
    """A tensor at an offset of a file; `tensor[a:b]` reads only those rows, `tensor[...]` all."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int
    name: str = ""

    def __getitem__(self, index: slice | EllipsisType) -> np.ndarray:
        """Rows of the first axis as a new array; the file is read where they are.

        Raises:
            InputError: the file is shorter than its header said.
        """
        shape, offset, count = self._place(index)
        flat = aligned(math.prod(shape), self.dtype)
        if count and paths.read_into(self.path, flat.view(np.uint8).data, offset) < count:
            raise self._cut_short(offset + count)
        return flat.reshape(shape)

    def peek(self, index: slice | EllipsisType) -> np.ndarray:
        """The same rows to be copied elsewhere: where a bucket's one request brings them, its
        answer itself, which can't be written to.

        Raises:
            InputError: as `[]`.
        """
        shape, offset, count = self._place(index)
        found = paths.answer(self.path, offset, count) if count else None
        if found is None:
            return self[index]
        if len(found) < count:
            raise self._cut_short(offset + count)
        return np.frombuffer(found, self.dtype).reshape(shape)

    def _place(self, index: slice | EllipsisType) -> tuple[tuple[int, ...], int, int]:
        """Shape of some rows, and the offset and number of their bytes in the file."""
        start, stop = 0, self.shape[0] if self.shape else 1
        if isinstance(index, slice):
            start, stop, step = index.indices(stop)
            assert step == 1, "only contiguous rows"
        shape = (stop - start, *self.shape[1:]) if self.shape else ()
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        return shape, self.offset + start * row, math.prod(shape) * self.dtype.itemsize

    def _cut_short(self, end: int) -> InputError:
        return InputError(
            self.path,
            found=f"{paths.size(self.path)} bytes",
            expected=f"{end}",
            fix="the file was cut short; copy it again",
        )


def inner(tensor: LazyTensor, index: int, start: int, stop: int) -> LazyTensor:
    """Rows `start` to `stop` of the `index`-th of the tensors that one holds, read when sliced."""
    if not isinstance(tensor, FileTensor):
        return Inner(tensor, index, start, stop)
    _, rows, *rest = tensor.shape
    row = int(np.prod(rest, dtype=np.int64)) * tensor.dtype.itemsize
    place = tensor.offset + (index * rows + start) * row
    return FileTensor(tensor.path, (stop - start, *rest), tensor.dtype, place)


@dataclasses.dataclass(frozen=True)
class TorchTensor:
    """A tensor of a `.bin` file, converted to numpy when read."""

    path: Path
    tensor: Any
    shape: tuple[int, ...]
    dtype: np.dtype
    name: str = ""

    def __getitem__(self, index: slice | EllipsisType) -> np.ndarray:
        """Rows of the first axis as a new array."""
        import torch

        part = self.tensor[index].contiguous()
        if part.dtype == torch.bfloat16:
            return part.view(torch.int16).numpy().view(self.dtype)
        if part.is_floating_point() and part.itemsize == 1:
            return part.view(torch.uint8).numpy().view(self.dtype)
        return part.numpy().copy()


Stored = FileTensor | TorchTensor | gguf.Held
"""A tensor in a file."""


def read_weights(folder: Path, stems: Sequence[str] = STEMS) -> dict[str, Stored]:
    """All tensors of a checkpoint folder, none of them read yet.

    Args:
        folder: holds `model.safetensors[.index.json]` or `pytorch_model.bin[.index.json]`.
        stems: names of the files without their ending, in the order they are looked for.

    Raises:
        InputError: no weights, not a safetensors file, a shard that is truncated, absent or outside
            the folder, or an index that disagrees with its shards.
    """
    name = weights_file(lambda name: (folder / name).is_file(), stems)
    if name is None:
        raise InputError(
            folder,
            found="no weights",
            expected=" or ".join(x for x in _names(stems) if not x.endswith(".gguf"))
            + ", or their .index.json",
            fix="check the path, or download the missing files",
        )
    if name.endswith(".gguf"):
        return dict(gguf.read_folder(folder / name))
    return _sharded(folder / name) if name.endswith(INDEX) else read_file(folder / name)


def has_weights(folder: Path, stems: Sequence[str] = STEMS) -> bool:
    """Whether `read_weights` has something to read."""
    return weights_file(lambda name: (folder / name).is_file(), stems) is not None


def weights_file(there: Callable[[str], bool], stems: Sequence[str] = STEMS) -> str | None:
    """Which of a folder's files its weights are read from, or which index; None if there is none.

    Args:
        there: whether the folder has a file of this name.
        stems: see `read_weights`.
    """
    # in the order of transformers' from_pretrained
    names = (name + end for name in _names(stems) for end in ("", INDEX))
    return next(filter(there, names), None)


def _names(stems: Sequence[str]) -> list[str]:
    return [stem + end for end in (".safetensors", ".bin", ".gguf") for stem in stems]


def weight_map(index: Path) -> dict[str, str]:
    """Tensor -> shard, of an index.

    Raises:
        InputError: it says none.
    """
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(x, str) for x in places.values()):
        raise InputError(
            index, found="no weight_map", expected="tensor -> shard", fix="download it again"
        )
    return places


def _sharded(index: Path) -> dict[str, Stored]:
    places = weight_map(index)
    shards: dict[str, Mapping[str, Stored]] = {}
    for shard in sorted(set(places.values())):
        if "/" in shard:
            raise InputError(
                index,
                found=f"shard {cut(repr(shard), 200)} outside the folder",
                expected="file names only",
                fix="do not use this checkpoint; its index is malformed",
            )
        path = findable(index.parent / shard, index)
        if not path.is_file():
            raise InputError(
                path, found="no file", expected=f"a shard of {index.name}", fix="download it again"
            )
        shards[shard] = read_file(path)
    for shard, tensors in shards.items():
        listed = {name for name, place in places.items() if place == shard}
        if odd := sorted(listed ^ set(tensors)):
            raise InputError(
                index.parent / shard,
                found=f"{cut(repr(odd[0]), 200)} only in the "
                + ("index" if odd[0] in listed else "shard"),
                expected=f"the tensors that {index.name} lists",
                fix="download index and shards again, from one revision",
            )
    return {name: shards[place][name] for name, place in places.items()}


def read_file(path: Path) -> dict[str, Stored]:
    """The tensors of one weights file, none of them read yet; errors as `read_weights`."""
    if path.suffix == ".gguf":
        return dict(gguf.read_tensors(path))
    return dict(_safetensors(path) if path.suffix == ".safetensors" else _torch(path))


def _safetensors(path: Path) -> Iterator[tuple[str, Stored]]:
    try:
        with (
            paths.header(path) as start,
            safe_open(start, framework="numpy"),
            start.open("rb") as f,
        ):
            (size,) = struct.unpack("<Q", f.read(8))
            header = json.loads(f.read(size))
    except (SafetensorError, OSError) as error:
        raise InputError(
            path,
            found=f"{paths.size(path)} bytes that are no safetensors file ({error})",
            expected="a whole safetensors file",
            fix="download it again",
        ) from error
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise _bad_dtype(f"{path}: {name}", entry["dtype"])
        start, shape = 8 + size + entry["data_offsets"][0], tuple(entry["shape"])
        if math.prod(max(side, 1) for side in shape) >= LARGEST:  # of no elements
            raise InputError(
                f"{path}: {name}",
                found=f"shape {shape}",
                expected=f"sides whose product is below {LARGEST}",
                fix="download it again",
            )
        yield name, FileTensor(path, shape, DTYPES[entry["dtype"]], start, name)


def _bad_dtype(where: str, dtype: str) -> InputError:
    return InputError(
        where,
        found=f"dtype {dtype}",
        expected=", ".join(map(str, DTYPES.values())),
        fix="dequantise the checkpoint first",
    )


def _torch(path: Path) -> Iterator[tuple[str, Stored]]:
    path = paths.whole(path)
    try:
        import torch
    except ImportError as error:
        raise InputError(
            path,
            found="no torch to read it with",
            expected="torch",
            fix="pip install 'vfjax[torch]', or convert the file to safetensors",
        ) from error
    try:
        try:
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except RuntimeError:  # files from before the zip format cannot be mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(
            path,
            found=f"a file that torch refuses ({_reason(error)})",
            expected="a pickle of tensors only",
            fix="download it again; if it holds code, do not use it",
        ) from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]  # a training checkpoint, as OpenCLIP's
    if not isinstance(state, Mapping):
        state = {"": state}
    dtypes = {dtype.name: dtype for dtype in DTYPES.values()}
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise InputError(
                f"{path}: {name}",
                found=type(tensor).__name__,
                expected="a tensor",
                fix="save the state dict alone",
            )
        if tensor.layout != torch.strided or tensor.is_meta:
            raise InputError(
                f"{path}: {name}",
                found="a sparse tensor" if tensor.layout != torch.strided else "one without values",
                expected="a dense tensor",
                fix="save it dense (tensor.to_dense()), or take the model it was made from",
            )
        kind = str(tensor.dtype).removeprefix("torch.")
        if kind not in dtypes:
            raise _bad_dtype(f"{path}: {name}", kind)
        yield name, TorchTensor(path, tensor.detach(), tuple(tensor.shape), dtypes[kind], name)


def _reason(error: Exception) -> str:
    """Why torch refuses a file, without its advice to turn the check off."""
    if asked := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"it asks for {asked[1]}"
    if "TorchScript" in str(error):
        return "a TorchScript archive"
    return "no pickle of torch.save" if "weights_only" in str(error) else first_line(error)


def first_line(error: BaseException) -> str:
    """The first line of what another library says."""
    return (str(error).splitlines() or [type(error).__name__])[0]


QUANTISED = ("quantization_config", "compression_config", "quantization")
"""Keys of a config.json beside quantised weights: transformers', older ones', MLX's."""


def read_config(path: Path) -> dict[str, Any]:
    """A config.json, or another model's config, of plain weights; errors as `read_json`.

    Raises:
        InputError: its weights are quantised.
    """
    return refuse_quantised(read_json(path), path)


def refuse_quantised(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """A config that does not say that its weights are quantised.

    Raises:
        InputError: it does, in a place or way in which `converters.quantised` can't read them.
    """
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in QUANTISED:
            if found := part.get(key):
                method = found.get("quant_method") if isinstance(found, dict) else None
                name = cut(str(method or "a method that is not named"))
                raise InputError(
                    f"{path}: {key}",
                    found=f"weights quantised by {name}",
                    expected="plain ones",
                    fix=f"{name} is not supported: dequantise them first (in transformers "
                    "model.dequantize(), then save_pretrained), or take the model they were made "
                    "from",
                )
    return config
