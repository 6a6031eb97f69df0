"""Reads a folder's config.json and weights, quantised or not."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from converters.files.reader import QUANTISED, STEMS, Stored, read_weights, refuse_quantised
from converters.params.table import FLOATS
from converters.quantised.bitsandbytes import bitsandbytes
from converters.quantised.compressed import compressed_tensors
from converters.quantised.fp8 import fp8
from converters.quantised.gptq import awq, beside, gptq
from converters.quantised.lazy import Dequantised
from converters.values import Values
from vfjax import InputError
from vfjax.atomic import read_json
from vfjax.merge import LazyTensor

Method = Callable[[Values, Mapping[str, LazyTensor], np.dtype | None], dict[str, LazyTensor]]
"""(quantization_config, tensors by name, dtype of the model) -> tensors, none of them quantised."""

METHODS: dict[str, Method] = {
    "awq": awq,
    "bitsandbytes": bitsandbytes,
    "compressed-tensors": compressed_tensors,
    "fp8": fp8,
    "gptq": gptq,
}
"""`quant_method` -> what dequantises."""

KEY = QUANTISED[0]

BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""File beside the weights in which older versions of AutoGPTQ and AutoAWQ say how it is quantised
-> whose it is."""


class Folder(NamedTuple):
    """A folder's contents.

    Attributes:
        config: config.json, without how its weights are quantised.
        tensors: by name, none of them read yet; what is quantised is so in its files alone.
        files: its weights files, by name.
    """

    config: dict[str, Any]
    tensors: dict[str, LazyTensor]
    files: dict[str, Path]


def read_folder(
    path: Path, file: str = "config.json", stems: Sequence[str] | None = STEMS
) -> Folder:
    """A folder's config and weights.

    Args:
        path: the folder.
        file: name of its config.
        stems: see `read_weights`; None leaves the weights out.

    Raises:
        InputError: as `read_json` and `read_weights`; weights that are quantised in a way that is
            not known, or a tensor or key of that is missing, wrong or not known.
    """
    config = read_json(path / file)
    found = {} if stems is None else read_weights(path, stems)
    files = {x.path.name: x.path for x in found.values()}
    values = _settings(path, file, config, found)
    if values is None:
        return Folder(refuse_quantised(config, path / file), dict(found), files)
    config = {key: value for key, value in config.items() if key != KEY}
    refuse_quantised(config, path / file)
    if stems is None:
        return Folder(config, {}, files)
    method = METHODS[str(values.data["quant_method"])]
    tensors = method(values, found, _dtype(config))
    if not any(isinstance(x, Dequantised) for x in tensors.values()):
        raise InputError(
            values.where,
            found=f"weights quantised by {values.data['quant_method']}, by the config",
            expected="tensors that are",
            fix="remove the key if they are plain",
        )
    return Folder(config, tensors, files)


def _settings(
    path: Path, file: str, config: Mapping[str, Any], tensors: Mapping[str, Stored]
) -> Values | None:
    """How a folder is quantised; None if it is not, or in a way that `read_config` refuses."""
    found, where = config.get(KEY), f"{path / file}: {KEY}"
    if not found and beside(tensors):
        name = next((name for name in BESIDE if (path / name).is_file()), None)
        if name is not None:
            where = str(path / name)
            found = {"quant_method": BESIDE[name], **read_json(path / name)}
    if not isinstance(found, Mapping):
        return None
    four, eight = (found.get(f"load_in_{n}bit") for n in (4, 8))
    method = found.get("quant_method") or ("bitsandbytes" if four or eight else None)
    return Values({**found, "quant_method": method}, where) if method in METHODS else None


def _dtype(config: Mapping[str, Any]) -> np.dtype | None:
    """What config.json says of the model's dtype, or of its LLM's."""
    known = {x.name: x for x in FLOATS}
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        for key in ("dtype", "torch_dtype"):
            if found := known.get(str(part.get(key)).removeprefix("torch.")):
                return found
    return None
