"""Prompts and pictures -> what `VisionFuseForConditionalGeneration` is called with.

All is made by `vfjax.Processor` on the host; here arrays become tensors.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature

from vfjax.architectures.base import Inputs
from vfjax.model import Batch


def tensors(batch: Batch) -> BatchFeature:
    """The arguments of `forward` for a batch; columns that only pad are left out."""
    read = np.flatnonzero(np.asarray(batch.mask).any(axis=0))
    used = slice(read[0], read[-1] + 1)
    fields = {
        "input_ids": batch.tokens,
        "attention_mask": batch.mask,
        "visual": batch.visual,
        "segments": batch.segments,
        "labels": batch.labels,
        "place": batch.place,
        "steps": batch.steps,
    }
    found: dict[str, Any] = {
        key: torch.from_numpy(np.array(x)[:, used]).long()
        for key, x in fields.items()
        if x is not None
    }
    pictures = {}
    for name, seen in batch.images.items():
        assert isinstance(seen.given, Inputs)
        own = _flat(vars(seen.given))
        if seen.gather is not None:
            own |= {f"gather.{key}": x for key, x in _flat(vars(seen.gather)).items()}
        if seen.prompt is not None:
            own |= {f"prompt.{key}": x for key, x in _flat(vars(seen.prompt)).items()}
        pictures[name] = own
    return BatchFeature({**found, "pictures": pictures})


def _flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields by their names, of a mapping by both; arrays as tensors, without what is None."""
    found: dict[str, Any] = {}
    for key, value in fields.items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{name}": x for name, x in _flat(value).items()}
        elif value is not None:
            found[key] = _tensor(value) if hasattr(value, "dtype") else value
    return found


def _tensor(array: np.ndarray) -> Tensor:
    made = torch.from_numpy(np.array(array))
    return made.long() if made.dtype in (torch.int32, torch.int16, torch.int8) else made
