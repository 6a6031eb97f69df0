"""The embeddings that a merged LLM reads, written for a server that runs the LLM alone."""

from pathlib import Path

import numpy as np
from flax import nnx
from ml_collections import ConfigDict
from safetensors.numpy import save_file

import vfjax
from experiments.tasks.common import check_config, load, required
from vfjax import Batch, InputError, Model
from vfjax.atomic import replacing

NAME = "prompt_embeds"
"""Of the tensor in the file."""


def run(config: ConfigDict, workdir: Path) -> None:
    del workdir  # the file is where the user says
    required(config, "model", "prompt", "output")
    check_config(config, ("output", config.output.endswith(".safetensors"), "NAME.safetensors"))
    model, processor = load(config, config.model)
    if config.template:
        processor.template = config.template
    images = [config.image] if config.image else []
    if config.video:
        images.append(vfjax.open_video(config.video, frames=config.frames, pool=config.pool))
    batch = processor(images, [processor.chat(config.prompt, images=len(images))])
    (embeds,) = prompt_embeds(model, batch)
    file = Path(config.output)
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as part:
        save_file({NAME: embeds}, part)
    print(f"{file}: {NAME} {embeds.dtype}{list(embeds.shape)}")


def prompt_embeds(model: Model, batch: Batch) -> list[np.ndarray]:
    """Of each row [t, d], what the LLM reads, without padding.

    Raises:
        InputError: the LLM is told more than embeddings in their order: positions or a mask of
            several branches, places by row and column.
    """
    config = model.config
    several = len(config.branches) > 1
    told = {
        "parallel positions": several and config.positions == "parallel",
        "a block mask": several and config.mask == "block",
        "places by time, row and column (M-RoPE)": batch.place is not None,
    }
    if found := [name for name, is_told in told.items() if is_told and batch.images]:
        raise InputError(
            "config.model",
            found=" and ".join(found),
            expected="running positions and a causal mask, which embeddings in their order say",
            fix="run it by converters.load, or in transformers by converters.hf",
        )
    embeds, mask = (np.asarray(x) for x in nnx.jit(lambda model: model.embed(batch))(model))
    return [row[real] for row, real in zip(embeds, mask, strict=True)]
