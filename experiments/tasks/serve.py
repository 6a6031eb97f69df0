"""Serves a model as OpenAI's chat completions."""

import signal
import socket
from pathlib import Path

import jax
import uvicorn
from ml_collections import ConfigDict

from experiments.serve.app import Service
from experiments.serve.asked import Limits
from experiments.serve.batcher import Batcher
from experiments.tasks.common import load, required
from vfjax import InputError
from vfjax.prompts import get_template


def run(config: ConfigDict, workdir: Path) -> None:
    del workdir  # nothing is written
    required(config, "model")
    _check(config)
    with _listen(config.host, config.port) as listener:
        model, processor = load(config, config.model)
        processor.require_tokenizer()
        if config.template:
            processor.template = get_template(config.template).name
        batcher = Batcher(
            model,
            processor,
            batch=config.batch,
            window=config.window,
            every=config.every,
            max_new_tokens=config.max_new_tokens,
        )
        limits = Limits(
            model=config.name or Path(config.model).resolve().name,
            body=config.max_body,
            pixels=config.max_pixels,
            pictures=config.max_images,
            hosts=tuple(host.lower() for host in config.allow_hosts),
        )
        service = Service(batcher, limits, queue=config.queue, timeout=config.timeout)
        # The server ends what runs, then sends itself the signal that it was ended by.
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.signal(signal.SIGINT, lambda *_: None)
        server = uvicorn.Server(
            uvicorn.Config(
                service.app(),
                access_log=False,
                log_level="warning",
                timeout_keep_alive=75,  # longer than clients keep a connection that rests
                timeout_graceful_shutdown=max(1, int(config.timeout)),
            )
        )
        host, port = listener.getsockname()[:2]
        print(f"{limits.model} at http://{host}:{port}/v1", flush=True)
        server.run(sockets=[listener])
        batcher.close()


def _check(config: ConfigDict) -> None:
    for key in ("max_new_tokens", "batch", "every", "queue", "timeout", "max_body", "max_pixels"):
        if not config[key] > 0:
            raise InputError(
                f"config.{key}", found=config[key], expected="more than 0", fix="raise it"
            )
    if jax.process_count() > 1:
        raise InputError(
            "VFJAX_DISTRIBUTED",
            found=f"{jax.process_count()} processes",
            expected="one, which the requests reach",
            fix="serve from one host",
        )


def _listen(host: str, port: int) -> socket.socket:
    """Before the model is loaded, so that a port in use is told at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        raise InputError(
            "config.port",
            found=f"{host}:{port}, which can't be had ({error})",
            expected="a free port of this machine",
            fix="pass another --config.port, or 0",
        ) from None
