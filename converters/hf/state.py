"""Folders of other layouts, one member each, as a fused folder's tensors."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import PreTrainedConfig

from converters.files.names import TOKENIZER_FILES
from converters.source import Source

HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token")
"""Arguments of `from_pretrained` that say how files of the hub are found."""

Place = str | os.PathLike[str]
"""A folder, or a name on the hub."""


def is_fused(path: Place, kwargs: Mapping[str, object]) -> bool:
    """Whether a folder, or name on the hub, is for transformers to open by itself.

    Args:
        path: the folder or name.
        kwargs: of `from_pretrained`, which say how files of the hub are found.
    """
    if isinstance(kwargs.get("config"), PreTrainedConfig) or "state_dict" in kwargs:
        return True
    try:
        found, _ = PreTrainedConfig.get_config_dict(path, **_hub(kwargs))
    except OSError:
        return not Path(path).is_dir()  # an adapter has no config.json; of others let it say so
    return found.get("model_type") == "visionfuse"


def small_files(path: Place, kwargs: Mapping[str, object]) -> Path:
    """The folder of config.json and the tokenizer; of a name on the hub in its cache.

    Args:
        path: the folder or name.
        kwargs: of `from_pretrained`.
    """
    if Path(path).is_dir():
        return Path(path)
    files = ["config.json", *TOKENIZER_FILES]
    return Path(snapshot_download(str(path), allow_patterns=files, **_hub(kwargs)))


def _hub(kwargs: Mapping[str, object]) -> dict[str, Any]:
    return {key: kwargs[key] for key in HUB if key in kwargs}


def state_of(source: Source) -> dict[str, Tensor]:
    """A folder's tensors under the names that a fused folder has them by.

    Args:
        source: of any layout; tensors that its model leaves out (a tied head) are not there.
    """
    starts = {part: "" if part == "llm" else f"{part}." for part in source.parts}
    return {
        starts[part] + name: tensor_of(lazy[...])
        for part, tensors in source.parts.items()
        for name, lazy in tensors.items()
    }


def tensor_of(array: np.ndarray) -> Tensor:
    """An array as a tensor, of bfloat16 too."""
    array = np.ascontiguousarray(array)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)
