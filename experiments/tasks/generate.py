"""Answers one question."""

from pathlib import Path

from ml_collections import ConfigDict

import converters
import vfjax
from experiments.tasks.common import bar, named, required
from vfjax.sharding import make_mesh


def run(config: ConfigDict, workdir: Path) -> None:
    del workdir  # the answer is printed
    required(config, "model", "prompt")
    with bar("load") as progress:
        model, processor = converters.load(
            config.model,
            mesh=make_mesh(*config.mesh) if config.mesh else None,
            dtype=config.dtype,
            towers=named("towers", config.towers),
            progress=progress,
        )
    if config.template:
        processor.template = config.template
    images = [config.image] if config.image else []
    if config.video:
        images.append(vfjax.open_video(config.video, frames=config.frames, pool=config.pool))
    batch = processor(images, [processor.chat(config.prompt, images=len(images))])
    (text,) = vfjax.generate(
        model,
        processor,
        batch,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed,
    )
    print(text)
