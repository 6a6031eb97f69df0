"""Folders of other layouts, one member each, as a fused folder's tensors."""

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from converters.source import Source


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
