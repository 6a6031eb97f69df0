"""The authors' recordings against transformers on the same weights in a fused folder."""

from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

import converters
from converters import hf
from converters.folder import open_source
from converters.hf.processor import tensors
from converters.load import model_config
from converters.processor import processor
from tests.torch_fused import greedy, logits_of
from vfjax import Batch, Processor

LIMIT = 1e-4


def opened(folder: Path) -> tuple[transformers.PreTrainedModel, Processor]:
    """A fused folder in torch, every tensor of it read and none made up; nothing of JAX's runs."""
    model, told = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
    )
    assert type(model) is hf.VisionFuseForConditionalGeneration
    assert {key: found for key, found in told.items() if found} == {}
    source = open_source(folder)
    return model.eval(), processor(source, model_config(source))


def assert_recorded(case: Path, place: Path) -> None:
    """Logits within `LIMIT` of the largest, and greedy tokens equal, of all samples.

    Args:
        case: see `shared/golden/README.md`.
        place: where a fused folder of this one member is made.
    """
    converters.fuse({"m": case}, place, method="passthrough", family=False)
    assert_as_recorded(*opened(place), case)


def assert_as_recorded(model: transformers.PreTrainedModel, process: Processor, case: Path) -> None:
    """See `assert_recorded`; of a model in torch and what makes its batches."""
    inputs, outputs = (load_file(case / f"{x}.safetensors") for x in ("inputs", "outputs"))
    samples = {name.split(".")[0] for name in outputs}
    for sample in sorted(samples - {"batch"}):
        pictures = [inputs[n] for n in sorted(inputs) if n.startswith(f"{sample}.image")]
        batch = process(pictures, input_ids=[inputs[f"{sample}.input_ids"]])
        expected, found = outputs[f"{sample}.logits"], logits_of(model, batch)
        found = found[outputs.get(f"{sample}.logits.rows", slice(None))]
        assert np.abs(found - expected).max() <= LIMIT * np.abs(expected).max(), sample
        generated = outputs[f"{sample}.generated"].tolist()
        assert greedy(model, batch, len(generated)) == [generated], sample


def assert_connectors_learn(model: transformers.PreTrainedModel, batch: Batch) -> None:
    """In training, noise of connectors and all: gradients reach each of their parameters."""
    model.train()(**tensors(batch)).logits.square().sum().backward()
    for name, branch in model.branches.items():
        for part, p in branch.connector.named_parameters():
            if p.requires_grad:
                assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), (name, part)
