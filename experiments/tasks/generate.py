"""Answers one question."""

from pathlib import Path

from ml_collections import ConfigDict

import vfjax
from experiments.tasks.common import load, required


def run(config: ConfigDict, workdir: Path) -> None:
    del workdir  # the answer is printed
    required(config, "model", "prompt")
    model, processor = load(config, config.model)
    if config.template:
        processor.template = config.template
    images = [config.image] if config.image else []
    if config.video:
        images.append(vfjax.open_video(config.video, frames=config.frames, pool=config.pool))
    batch = processor(images, [processor.chat(config.prompt, images=len(images))])
    sampling = vfjax.Sampling(
        temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, seed=config.seed
    )
    (text,) = vfjax.generate(
        model, processor, batch, max_new_tokens=config.max_new_tokens, sampling=sampling
    )
    print(text)
