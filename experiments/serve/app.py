"""HTTP: OpenAI's chat completions over a `Batcher`."""

import asyncio
import contextlib
import dataclasses
import functools
import json
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, NoReturn

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from experiments.serve.batcher import Batcher, Event, Job, Piece
from experiments.serve.guides import Grammars, Guide
from experiments.serve.openapi import describe
from experiments.serve.refused import Limits, Refused
from experiments.serve.request import ChatRequest, read
from vfjax import InputError
from vfjax.atomic import JSON

LOG = logging.getLogger(__name__)
LOGGED: set[str] = set()
"""Ignored keys that the log has."""
IGNORED_HEADER = "X-Ignored"
"""Header of an answer that names the keys of its request that were nothing to it."""
RETRY = {"Retry-After": "1"}
READERS = 4
"""Requests whose pictures are decoded at a time."""


@dataclasses.dataclass
class Service:
    """A model behind HTTP.

    Attributes:
        batcher: that runs the requests.
        limits: of each.
        queue: requests in the house at a time, whether read, waiting or running.
        pixels: of their pictures, once read; a lone request may have more.
        patience: seconds for a body.
        timeout: seconds for a request.
    """

    batcher: Batcher
    limits: Limits
    queue: int = 128
    pixels: int = 512_000_000
    patience: float = 60.0
    timeout: float = 600.0

    def __post_init__(self) -> None:
        self.reading = 0
        self.started = int(time.time())
        self.grammars = Grammars(self.batcher.processor)
        self.readers = anyio.CapacityLimiter(READERS)

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.models),
            Route("/health", self.health),
            Route("/openapi.json", self.openapi),
        ]
        handlers: dict[Any, Any] = {
            Refused: _refuse,
            HTTPException: _no_route,
            Exception: _broken,
            ClientDisconnect: _gone,
        }
        return Starlette(routes=routes, exception_handlers=handlers)

    async def health(self, request: Request) -> Response:
        return _json({"status": "ok", "requests": self.reading + self.batcher.pending})

    async def openapi(self, request: Request) -> Response:
        able = await anyio.to_thread.run_sync(lambda: self.grammars.able)
        return _json(describe(self.limits, able))

    async def models(self, request: Request) -> Response:
        own = self.limits.model
        card: JSON = {"id": own, "object": "model", "created": self.started, "owned_by": "vfjax"}
        name = request.path_params.get("name")
        if name is None:
            return _json({"object": "list", "data": [card]})
        if name != own:
            message = f"model: found {name!r}, expected {own!r}; ask for that one"
            raise Refused(404, message, code="model_not_found")
        return _json(card)

    async def chat(self, request: Request) -> Response:
        deadline = asyncio.get_running_loop().time() + self.timeout
        if self.reading + self.batcher.pending >= self.queue:
            await self._body(request, keep=False)  # a client that still writes reads no answer
            _full(f"{self.queue} requests")
        self.reading += 1
        try:
            body = await self._body(request, keep=True)
            work = functools.partial(self._read, body)
            asked, guides = await anyio.to_thread.run_sync(work, limiter=self.readers)
            if asked.choices > 1 and 0 < self.batcher.pending > self.queue - asked.choices:
                _full(f"{self.batcher.pending} requests and {asked.choices} more choices")
            pixels = sum(picture.width * picture.height for picture in asked.pictures)
            pixels *= asked.choices
            if self.batcher.pixels and self.batcher.pixels + pixels > self.pixels:
                _full(f"pictures of {self.batcher.pixels} pixels")
            answer = _Answer(asked, guides, self.batcher, self.limits.model, deadline)
            del body, work, asked, guides  # what the job needs, it holds
        finally:
            self.reading -= 1
        return await answer.respond(request)

    def _read(self, body: bytes) -> tuple[ChatRequest, list[Guide | None]]:
        asked = read(body, self.limits, self.batcher.processor)
        if asked.schema is None:
            return asked, [None] * asked.choices
        try:
            return asked, [self.grammars.guide(asked.schema) for _ in range(asked.choices)]
        except InputError as error:
            raise Refused(400, str(error), param="response_format") from None

    async def _body(self, request: Request, *, keep: bool) -> bytes:
        """The body; what is too large, or not to be kept, is read and dropped."""
        parts, size = [], 0
        try:
            async with asyncio.timeout(min(self.timeout, self.patience)):
                async for part in request.stream():
                    size += len(part)
                    if keep and size <= self.limits.body:
                        parts.append(part)
                    else:
                        parts.clear()
        except TimeoutError:
            message = f"body: found {size} bytes in the time there is, expected all; send it faster"
            raise Refused(408, message, headers={"Connection": "close"}) from None
        if keep and size > self.limits.body:
            message = (
                f"body: found more than {self.limits.body} bytes, expected fewer; "
                "scale the pictures down"
            )
            raise Refused(413, message)
        return b"".join(parts)


class _Answer:
    """Jobs of a request, whose pieces arrive in the event loop."""

    def __init__(
        self,
        asked: ChatRequest,
        guides: Sequence[Guide | None],
        batcher: Batcher,
        model: str,
        deadline: float,
    ):
        self.asked, self.model, self.deadline = asked, model, deadline
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(i: int, event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(self.events.put_nowait, (i, event))

        self.jobs = []
        for i, guide in enumerate(guides):
            job = Job(
                asked.ids,
                list(asked.pictures),
                functools.partial(deliver, i),
                max_new_tokens=asked.max_new_tokens,
                sampling=dataclasses.replace(asked.sampling, seed=_wrapped(asked.seed + i)),
                logprobs=asked.logprobs,
                guide=guide,
                stop=asked.stop,
            )
            self.jobs.append(job)
        asked.pictures.clear()  # the jobs have them
        for job in self.jobs:
            batcher.submit(job)

    def cancel(self) -> None:
        for job in self.jobs:
            job.cancelled = True

    async def respond(self, request: Request) -> Response:
        gone = asyncio.create_task(_disconnected(request))
        try:
            first = await self._next(gone)
            headers = _ignored(self.asked.ignored)
            if self.asked.stream:
                events = self._stream(*first)
                return StreamingResponse(events, headers=headers, media_type="text/event-stream")
            pieces: list[list[Piece]] = [[] for _ in self.jobs]
            i, piece = first
            pieces[i].append(piece)
            while not all(each and each[-1].finish for each in pieces):
                i, piece = await self._next(gone)
                pieces[i].append(piece)
        except BaseException:
            self.cancel()
            raise
        finally:
            gone.cancel()
        choices: list[JSON] = []
        for i, each in enumerate(pieces):
            text = "".join(piece.text for piece in each)
            message = {"role": "assistant", "content": text, "refusal": None}
            tokens = [token for piece in each for token in piece.logprobs or ()]
            logs = self._logs(tokens)
            choices.append(
                {
                    "index": i,
                    "message": message,
                    "finish_reason": each[-1].finish,
                    "logprobs": logs,
                }
            )
        found = self._object("chat.completion", *choices)
        found["usage"] = _usage([each[-1] for each in pieces])
        return _json(found, headers=headers)

    def _logs(self, tokens: Sequence[JSON] | None) -> JSON:
        """A choice's log-probabilities."""
        if self.asked.logprobs is None:
            return None
        return {"content": tokens or [], "refusal": None}

    async def _next(self, gone: asyncio.Task[None] | None = None) -> tuple[int, Piece]:
        """A choice and its next piece; raises what ended it, or Refused where it takes too long."""
        event = asyncio.create_task(self.events.get())
        tasks = {event} if gone is None else {event, gone}
        left = self.deadline - asyncio.get_running_loop().time()
        try:
            done, _ = await asyncio.wait(
                tasks, timeout=max(left, 0), return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            event.cancel()
        if event not in done:
            if gone in done:
                raise ClientDisconnect
            message = "server: found no answer in time, expected one; try again"
            raise Refused(504, message, code="timeout")
        i, found = event.result()
        if isinstance(found, InputError):
            raise Refused(400, str(found), param="messages")
        if isinstance(found, Exception):
            raise Refused(500, "server: found an error of its own, expected none; see its log")
        return i, found

    async def _stream(self, i: int, piece: Piece) -> AsyncIterator[str]:
        last: dict[int, Piece] = {}
        try:
            for each in range(len(self.jobs)):
                yield self._event(each, {"role": "assistant", "content": ""})
            while True:
                if piece.text or piece.logprobs:
                    logs = self._logs(piece.logprobs)
                    yield self._event(i, {"content": piece.text}, logprobs=logs)
                if piece.finish:
                    yield self._event(i, {}, finish_reason=piece.finish)
                    last[i] = piece
                if len(last) == len(self.jobs):
                    break
                i, piece = await self._next()
            if self.asked.usage:
                usage = self._object("chat.completion.chunk")
                yield _data(usage | {"usage": _usage(list(last.values()))})
        except Refused as error:
            yield _data(_error(error))
        finally:
            self.cancel()  # ended, or nobody listens
        yield "data: [DONE]\n\n"

    def _event(self, i: int, delta: JSON, **more: JSON) -> str:
        choice = {"index": i, "delta": delta, "finish_reason": None, "logprobs": None, **more}
        usage = {"usage": None} if self.asked.usage else {}
        return _data(self._object("chat.completion.chunk", choice) | usage)

    def _object(self, kind: str, *choices: JSON) -> dict[str, JSON]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


def _wrapped(seed: int) -> int:
    """Within 64 bits."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)


def _ignored(keys: Sequence[str]) -> dict[str, str]:
    """Tells the client of keys that were nothing to the answer; the log, of each once."""
    if not keys:
        return {}
    names = [ascii(key)[1:-1][:60] for key in keys[:20]]
    for key in {re.sub(r"\[\d+\]", "[]", name) for name in names} - LOGGED:
        if len(LOGGED) < 100:  # clients choose them
            LOGGED.add(key)
            LOG.warning("%s: a key that is unknown or nothing to this model, not used", key)
    more = [f"and {len(keys) - 20} more"] if len(keys) > 20 else []
    return {IGNORED_HEADER: ", ".join(names + more)}


def _usage(pieces: Sequence[Piece]) -> dict[str, int]:
    """Of the choices' last pieces: their prompt is one."""
    prompt, written = pieces[0].prompt, sum(piece.written for piece in pieces)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
    }


def _full(found: str) -> NoReturn:
    message = f"server: found {found} in the house, expected fewer; try again"
    raise Refused(429, message, code="rate_limit_exceeded", headers=RETRY)


async def _disconnected(request: Request) -> None:
    """Returns when the client is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _json(found: JSON, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json.dumps(found), status, headers, media_type="application/json")


def _data(found: JSON) -> str:
    return f"data: {json.dumps(found)}\n\n"


def _error(error: Refused) -> JSON:
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    if error.status == 429:
        kind = "rate_limit_error"
    return {
        "error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}
    }


async def _refuse(request: Request, error: Refused) -> Response:
    return _json(_error(error), error.status, error.headers)


async def _no_route(request: Request, error: HTTPException) -> Response:
    message = f"{request.url.path}: found {error.detail}, expected a path of /openapi.json; ask it"
    headers = error.headers
    return await _refuse(request, Refused(error.status_code, message, headers=headers))


async def _gone(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _broken(request: Request, error: Exception) -> Response:
    message = "server: found an error of its own, expected none; see its log"
    return await _refuse(request, Refused(500, message))
