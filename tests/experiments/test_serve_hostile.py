"""Hostile clients on real sockets: each is refused or dropped, and nobody else notices."""

import asyncio
import base64
import contextlib
import dataclasses
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import httpx2
import pytest

import converters
import vfjax
from experiments.serve.app import Service
from experiments.serve.batcher import LENGTHS, Batcher
from experiments.serve.refused import Limits
from experiments.serve.server import listen, server
from tests.experiments.pictures import black_png

MODEL = Path(__file__).resolve().parents[2] / "experiments" / "family" / "models" / "clip"
URL = "/v1/chat/completions"
HEAD = f"POST {URL} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
QUESTION = "how many digits ?"


def png(side: int) -> str:
    return "data:image/png;base64," + base64.b64encode(black_png(side)).decode()


def ask(text: str, *images: str, **more) -> dict:
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    content = [{"type": "text", "text": text}, *pictures]
    messages = [{"role": "user", "content": content}]
    return {"model": "clip", "messages": messages, "temperature": 0, "max_tokens": 8} | more


@pytest.fixture(scope="module")
def service():
    model, processor = converters.load(MODEL, dtype="float32")
    batcher = Batcher(model, processor, batch=4, every=2, max_new_tokens=400)
    limits = Limits("clip", body=1 << 20, pixels=200_000, pictures=3)
    yield Service(batcher, limits, queue=64, patience=1, timeout=300)
    batcher.close()


Address = tuple[str, int]


@contextlib.contextmanager
def running(service: Service, rest: int) -> Iterator[Address]:
    """A server's host and port."""
    with listen("127.0.0.1", 0) as listener:
        runs = server(service.app(), timeout=5, log_level="critical", rest=rest)
        thread = threading.Thread(target=runs.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()[:2]
        finally:
            runs.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def address(service) -> Iterator[Address]:
    with running(service, rest=75) as found:
        yield found


@pytest.fixture(scope="module")
def expected(service) -> str:
    batcher = service.batcher
    processor = dataclasses.replace(batcher.processor, lengths=LENGTHS)
    batch = processor([], [processor.chat(QUESTION, images=0)])
    (text,) = vfjax.generate(batcher.model, processor, batch, max_new_tokens=8)
    return text


Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def rest_of(reader: asyncio.StreamReader) -> bytes:
    """What still comes; a reset ends it too."""
    parts = []
    with contextlib.suppress(ConnectionError):
        while part := await reader.read(1 << 16):
            parts.append(part)
    return b"".join(parts)


async def dribble(connection: Connection, text: bytes) -> bytes:
    """Sends a byte at a time for as long as somebody listens; what comes back."""
    reader, writer = connection
    answer = asyncio.create_task(rest_of(reader))
    with contextlib.suppress(ConnectionError):
        for byte in text:
            if answer.done():
                break
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0.05)
    return await answer


async def whole(connection: Connection, text: bytes) -> bytes:
    reader, writer = connection
    writer.write(text)
    with contextlib.suppress(ConnectionError):
        await writer.drain()
    return await rest_of(reader)


async def slow_body(connection: Connection) -> None:
    head = f"{HEAD}Content-Length: 4000\r\n\r\n".encode()
    connection[1].write(head)
    assert (await dribble(connection, b" " * 4000)).startswith(b"HTTP/1.1 408 ")


async def slow_head(connection: Connection) -> None:
    assert await dribble(connection, HEAD.encode() * 20) == b""


async def silent(connection: Connection) -> None:
    assert await rest_of(connection[0]) == b""


async def silent_afterwards(connection: Connection) -> None:
    found = await whole(connection, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /he")
    assert found.count(b"HTTP/1.1 ") == found.count(b"HTTP/1.1 200 ") <= 1


async def no_http(connection: Connection) -> None:
    assert (await whole(connection, b"\x16\x03\x01\x02\x00\x01")).startswith(b"HTTP/1.1 400 ")


async def endless_head(connection: Connection) -> None:
    found = await whole(connection, HEAD.encode() + b"X: " + b"x" * (4 << 20))
    assert found[:13] in (b"HTTP/1.1 400 ", b"")  # closed while it writes, so it may miss that


async def broken_chunks(connection: Connection) -> None:
    head = f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode()
    assert (await whole(connection, head + b"2\r\n{}\r\nzz\r\n"))[:11] in (b"HTTP/1.1 40", b"")


async def large_body(connection: Connection) -> None:
    """Far above the limit, but the client is told, not cut off."""
    size = 24 << 20
    head = f"{HEAD}Connection: close\r\nContent-Length: {size}\r\n\r\n".encode()
    assert (await whole(connection, head + b"A" * size)).startswith(b"HTTP/1.1 413 ")


async def gone_while_it_asks(connection: Connection) -> None:
    connection[1].write(f"{HEAD}Content-Length: 4000\r\n\r\n".encode() + b"{" * 100)
    await asyncio.sleep(0.2)
    connection[1].transport.abort()


async def gone_while_it_is_told(connection: Connection) -> None:
    """A long answer, of which it takes the first bytes; then it resets the connection."""
    reader, writer = connection
    body = json.dumps(ask("red", temperature=3, max_tokens=400, stream=True)).encode()
    writer.write(f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
    writer.transport.abort()


RUDE: list[Callable[[Connection], Awaitable[None]]] = [
    *(slow_body, no_http, endless_head, broken_chunks, large_body),
    *(gone_while_it_asks, gone_while_it_is_told),
]
WRONG = {
    "no JSON": (b'{"model": ', 400),
    "100 megapixels": (json.dumps(ask("a", png(10_000))).encode(), 400),
    "base64 that is none": (json.dumps(ask("a", "data:image/png;base64,%%%%")).encode(), 400),
    "base64 of nothing": (
        json.dumps(ask("a", "data:image/png;base64," + "A" * 900_000)).encode(),
        400,
    ),
    "base64 without end": (
        json.dumps(ask("a", "data:image/png;base64," + "A" * 3_000_000)).encode(),
        413,
    ),
    "a long question": (json.dumps(ask("red " * 200_000)).encode(), 400),
}


@pytest.mark.parametrize("how", [slow_head, silent, silent_afterwards])
def test_who_asks_nothing_is_left(service, how: Callable[[Connection], Awaitable[None]]) -> None:
    """It would wait for good otherwise."""
    with running(service, rest=1) as address:
        asyncio.run(rude(address, how))


async def rude(address: Address, how: Callable[[Connection], Awaitable[None]]) -> None:
    """A client of one connection."""
    reader, writer = await asyncio.open_connection(*address)
    try:
        async with asyncio.timeout(120):
            await how((reader, writer))
    finally:
        writer.transport.abort()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_others_do_not_notice_hostile_clients(service, address, expected: str) -> None:
    asyncio.run(crowd(address, expected))
    assert service.reading == 0
    assert service.batcher.pending == service.batcher.pixels == 0


async def crowd(address: Address, expected: str) -> None:
    base = "http://{}:{}".format(*address)
    over = asyncio.Event()

    async def polite() -> int:
        """Asks until the others have gone, each time by a new connection."""
        count = 0
        once = httpx2.Limits(max_keepalive_connections=0)
        async with httpx2.AsyncClient(base_url=base, timeout=300, limits=once) as client:
            while not over.is_set() or count < 3:
                answer = await client.post(URL, json=ask(QUESTION))
                assert answer.status_code == 200, answer.text
                assert answer.json()["choices"][0]["message"]["content"] == expected
                count += 1
        return count

    async def wrong(body: bytes, status: int) -> None:
        async with httpx2.AsyncClient(base_url=base, timeout=300) as client:
            answer = await client.post(URL, content=body)
        assert answer.status_code == status, answer.text
        assert answer.json()["error"]["type"] == "invalid_request_error"

    others = [asyncio.create_task(polite()) for _ in range(3)]
    try:
        async with asyncio.timeout(240):
            for _ in range(2):
                hostile = [rude(address, how) for how in RUDE] + [
                    wrong(*each) for each in WRONG.values()
                ]
                await asyncio.gather(*hostile)
    finally:
        over.set()
    assert min(await asyncio.gather(*others)) >= 3
    async with httpx2.AsyncClient(base_url=base, timeout=300) as client:
        while (await client.get("/health")).json()["requests"]:  # the answers nobody waits for
            await asyncio.sleep(0.1)
