"""Serves a model as OpenAI's chat completions."""

from pathlib import Path

import jax
from ml_collections import ConfigDict

from experiments.serve.app import Service
from experiments.serve.batcher import Batcher
from experiments.serve.refused import Limits
from experiments.serve.server import address, listen, serve
from experiments.tasks.common import load, positive, required
from vfjax import InputError
from vfjax.text.chat import known


def run(config: ConfigDict, workdir: Path) -> None:
    del workdir  # nothing is written
    required(config, "model")
    _check(config)
    with listen(config.host, config.port) as listener:
        model, processor = load(config, config.model)
        processor.require_tokenizer()
        processor.settings.check()
        if config.template:
            processor.template = known(config.template)
        batcher = Batcher(
            model,
            processor,
            batch=config.batch,
            window=config.window,
            every=config.every,
            max_new_tokens=config.max_new_tokens,
        )
        if config.warm_up:
            batcher.warm_up()
        limits = Limits(
            model=config.name or Path(config.model).resolve().name,
            body=config.max_body,
            pixels=config.max_pixels,
            pictures=config.max_images,
            hosts=tuple(host.lower() for host in config.allow_hosts),
        )
        service = Service(
            batcher,
            limits,
            queue=config.queue,
            pixels=config.max_queue_pixels,
            timeout=config.timeout,
        )
        print(f"{limits.model} at {address(listener)}/v1", flush=True)
        serve(service.app(), listener, config.grace)
        batcher.close()


def _check(config: ConfigDict) -> None:
    positive(config, "max_new_tokens", "batch", "every", "queue", "timeout", "grace")
    positive(config, "max_body", "max_pixels", "max_queue_pixels")
    if jax.process_count() > 1:
        raise InputError(
            "VFJAX_DISTRIBUTED",
            found=f"{jax.process_count()} processes",
            expected="one, which the requests reach",
            fix="serve from one host",
        )
