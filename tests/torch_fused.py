"""A fused folder in vfjax and in transformers, compared."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers
from PIL import Image

import vfjax
from converters import hf
from converters.hf.processor import tensors
from tests.checkpoints import fused_folder, make_connector, make_llama, make_tower
from vfjax.generate import generate_ids
from vfjax.model import Batch

BRANCHES: Mapping[str, Mapping[str, Any]] = {
    "clip": {"taps": (-2,), "drop": 1, "aspect": "pad"},
    "dinov2": {"taps": (1, -1), "drop": 1, "aspect": "crop"},
    "siglip": {"taps": (-1,), "drop": 0, "aspect": "crop", "code": "transformers"},
    "dinov2_with_registers": {"taps": (2,), "drop": 5, "aspect": "pad"},
}
"""Kind of tower -> how its branch is used, see `fused_folder`."""


def toy_folder(path: Path, kinds: Sequence[str] = ("clip", "dinov2"), **text: Any) -> Path:
    """A fused folder of random towers and an LLM whose config has the keys `text`."""
    llm, branches = make_llama(1, **text), {}
    for i, kind in enumerate(kinds):
        tower, entry = make_tower(kind, 10 * i), BRANCHES[kind]
        width, out = tower.config.hidden_size * len(entry["taps"]), llm.config.hidden_size
        branches[kind] = (tower, make_connector((width, out, out), i), entry)
    fused_folder(path, llm, branches)
    return path


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise, which every position of a picture moves."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def open_in_torch(folder: Path, **config: Any) -> transformers.PreTrainedModel:
    """By the Auto class, without code of the folder; `config` are other keys of config.json."""
    assert transformers.AutoConfig.for_model("visionfuse").__class__ is hf.VisionFuseConfig
    auto = transformers.AutoModelForImageTextToText
    return auto.from_pretrained(folder, trust_remote_code=False, **config).eval()


@torch.no_grad()
def logits_of(model: transformers.PreTrainedModel, batch: Batch) -> np.ndarray:
    """Logits float32[k, vocab] of all tokens of a batch that are read."""
    found = model(**(given := tensors(batch)))
    mask = given["attention_mask"] if found.attention_mask is None else found.attention_mask
    return found.logits[mask.bool()].float().numpy()


@jax.jit
def read(model: vfjax.Model, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Logits float32[b, t, vocab], and bool[b, t] which tokens are read."""
    hidden, mask, _ = model.read(batch)
    return model.llm.logits(hidden), mask


@torch.no_grad()
def greedy(
    model: transformers.PreTrainedModel, batch: Batch, new: int = 30, **more: Any
) -> list[list[int]]:
    """New tokens of each row, no token ending one."""
    given = tensors(batch)
    made = model.generate(
        **given, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0, **more
    )
    return made[:, given["input_ids"].shape[1] :].tolist()


def assert_same(
    loaded: tuple[vfjax.Model, vfjax.Processor],
    model: transformers.PreTrainedModel,
    images: Sequence[Any],
    input_ids: Sequence[Sequence[int]],
    *,
    limit: float = 1e-4,
    new: int = 30,
    sides: Sequence[str] = ("right", "left"),
) -> None:
    """Logits within `limit` of the largest, and greedy tokens equal, on each side of padding.

    Args:
        loaded: of `converters.load`.
        model: of `open_in_torch`, on the same folder.
        images: of the rows.
        input_ids: of the rows, -200 at each picture.
        limit: of the logits, relative.
        new: tokens that are compared.
        sides: of padding.
    """
    jax_model, processor = loaded
    for side in sides:
        batch = processor(images, input_ids=input_ids, padding=side)
        expected, mask = (np.asarray(x) for x in read(jax_model, batch))
        expected = expected[mask]
        found = logits_of(model, batch)
        assert np.abs(found - expected).max() <= limit * np.abs(expected).max(), side
        if new:
            ids = generate_ids(jax_model, batch, max_new_tokens=new)
            assert greedy(model, batch, new) == ids, side
