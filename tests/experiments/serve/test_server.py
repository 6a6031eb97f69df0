"""The server as a process, under load."""

import asyncio
import contextlib
import random
import signal
import subprocess
import sys

import httpx2
import pytest

from tests.experiments.serving import MODEL, QUESTIONS, ROOT, URL, ask, data, picture

SIZES = ["queue=48", "timeout=120", "grace=60", "batch=4", "every=2", "max_new_tokens=64"]


def test_a_process_under_load():
    """64 clients as VLMEvalKit sends; some leave; SIGTERM finishes what runs and ends with 0."""
    config = [f"--config.model={MODEL}", "--config.port=0", "--config.dtype=float32"]
    command = [sys.executable, "experiments/run.py", "--config=experiments/configs/serve.py"]
    process = subprocess.Popen(
        [*command, *config, *(f"--config.{key}" for key in SIZES)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        base = process.stdout.readline().split()[-1].removesuffix("/v1")
        codes, texts = asyncio.run(load(base, process))
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert err == ""
    assert set(codes) <= {200, 429}, codes
    assert codes.count(200) >= 64
    assert all(len(set(found)) == 1 for found in texts.values())  # whatever the batch


async def load(base: str, process: subprocess.Popen) -> tuple[list[int], dict[int, list[str]]]:
    rng = random.Random(0)
    codes: list[int] = []
    texts: dict[int, list[str]] = {}
    limits = httpx2.Limits(max_connections=100)
    async with httpx2.AsyncClient(base_url=base, timeout=120, limits=limits) as client:

        async def one(kind: int) -> None:
            body = ask(QUESTIONS[kind], data(picture(kind), "JPEG"), max_tokens=32768)
            while True:
                answer = await client.post(URL, json=body)
                codes.append(answer.status_code)
                if answer.status_code != 429:
                    break
                await asyncio.sleep(0.2 + rng.random())
            content = answer.json()["choices"][0]["message"]["content"]
            texts.setdefault(kind, []).append(content)

        async def leave() -> None:
            with contextlib.suppress(httpx2.TimeoutException):
                body = ask("red", temperature=3, max_tokens=400, stream=True)
                await client.post(URL, json=body, timeout=0.3)

        await asyncio.gather(*(one(i % 3) for i in range(64)), *(leave() for _ in range(4)))
        before = len(codes)
        last = [asyncio.create_task(one(i % 3)) for i in range(16)]
        taken = 0
        while taken < 16:  # until all are in the house, or through
            taken = (await client.get("/health")).json()["requests"] + len(codes) - before
        process.send_signal(signal.SIGTERM)
        await asyncio.gather(*last)
        with pytest.raises(httpx2.ConnectError):
            async with httpx2.AsyncClient(base_url=base) as late:
                await late.get("/health")
    return codes, texts
