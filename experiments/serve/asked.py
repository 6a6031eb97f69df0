"""What a client asks for: the body of a chat completion, checked, pictures decoded."""

import base64
import binascii
import dataclasses
import json
import secrets
from collections.abc import Mapping
from typing import Any, NoReturn
from urllib.parse import urlsplit

import httpx2

from experiments.serve.pictures import read_picture
from vfjax import InputError, Processor
from vfjax.images import File
from vfjax.messages import Message, tokenize

IGNORED = {
    *("user", "metadata", "store", "service_tier", "parallel_tool_calls"),
    *("safety_identifier", "prompt_cache_key"),
}
"""Keys that don't change an answer."""

ONLY: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "top_k": (-1, 0),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
}
"""Keys that are taken with these values only."""


class Refused(Exception):
    """An answer that is an error.

    Attributes:
        status: HTTP's.
        code: a word for programs.
        param: the key at fault.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(" ".join(message.split()))
        self.status, self.code, self.param, self.headers = status, code, param, headers


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a request may hold.

    Attributes:
        model: name of the model, which requests must give.
        body: bytes of a body, and of a picture that is fetched.
        pixels: of all pictures of a request.
        pictures: of a request.
        hosts: "host" or "host:port" from which pictures may be fetched.
        fetch_timeout: seconds for each read from there.
    """

    model: str
    body: int = 20 << 20
    pixels: int = 32_000_000
    pictures: int = 16
    hosts: tuple[str, ...] = ()
    fetch_timeout: float = 10.0


@dataclasses.dataclass(frozen=True)
class Asked:
    """A chat completion.

    Attributes:
        ids: of the prompt, -200 at each picture.
        pictures: in that order.
        stream: whether the answer comes in pieces.
        usage: whether its last piece counts tokens.
        sampling: the job's remaining arguments.
    """

    ids: list[int]
    pictures: list[Any]
    stream: bool
    usage: bool
    sampling: dict[str, Any]


def read(body: bytes, limits: Limits, processor: Processor) -> Asked:
    """Reads a request; takes a while where pictures are large.

    Raises:
        Refused: anything that is wrong with it, status 400, or 404 for another model.
    """
    try:
        found = json.loads(body, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        _bad("body", f"no JSON ({error})", "an object")
    if not isinstance(found, dict):
        _bad("body", f"a JSON {type(found).__name__}", "an object")
    taken = _Taken({key: value for key, value in found.items() if value is not None})
    name = taken.text("model")
    if name != limits.model:
        message = f"model: found {name!r}, expected {limits.model!r}; ask for that one"
        raise Refused(404, message, code="model_not_found", param="model")
    stream = taken.flag("stream")
    options = taken.get("stream_options", {}, dict, "an object")
    if options and not stream:
        _bad("stream_options", "it without stream", "stream: true")
    usage = _Taken(options).flag("include_usage")
    sampling = _sampling(taken)
    messages = _messages(taken.get("messages", None, list, "a list"), limits)
    _others(taken)
    try:
        ids, pictures = tokenize(processor, messages)
    except InputError as error:
        raise Refused(400, str(error), param="messages") from None
    context = processor.config.llm.context
    if len(ids) >= context:
        _bad("messages", f"{len(ids)} tokens", f"fewer than {context}, the LLM's context")
    return Asked(ids, pictures, stream, usage, sampling)


class _Taken:
    """An object's keys, each asked for once; the rest is unknown."""

    def __init__(self, found: Mapping[str, Any]):
        self.rest = dict(found)

    def get(self, key: str, default: Any, kind: type | tuple[type, ...], expected: str) -> Any:
        value = self.rest.pop(key, default)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            _bad(key, "nothing" if value is None else f"a {type(value).__name__}", expected)
        return value

    def text(self, key: str) -> str:
        return self.get(key, None, str, "a string")

    def flag(self, key: str) -> bool:
        return self.get(key, False, bool, "true or false")

    def number(self, key: str, default: float, low: float, high: float) -> float:
        value = self.get(key, default, (int, float), "a number")
        if not low <= value <= high:
            _bad(key, value, f"{low} to {high}")
        return float(value)

    def count(self, key: str, low: int, high: int) -> int | None:
        if key not in self.rest:
            return None
        value = self.get(key, None, int, "an integer")
        if not low <= value <= high:
            _bad(key, value, f"{low} to {high}")
        return value


def _sampling(taken: _Taken) -> dict[str, Any]:
    """OpenAI's defaults: temperature and top-p are 1."""
    counts = [taken.count(key, 1, 1 << 31) for key in ("max_completion_tokens", "max_tokens")]
    seed = taken.count("seed", -(1 << 63), (1 << 63) - 1)
    stop = taken.get("stop", [], (str, list), "a string or a list of them")
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > 16 or not all(isinstance(text, str) and 0 < len(text) < 256 for text in stops):
        _bad("stop", "something else", "up to 16 strings of 1 to 255 letters")
    return {
        "max_new_tokens": next((count for count in counts if count is not None), None),
        "temperature": taken.number("temperature", 1.0, 0.0, 100.0),
        "top_p": max(taken.number("top_p", 1.0, 0.0, 1.0), 1e-6),  # 0 takes the likeliest
        "seed": secrets.randbits(31) if seed is None else seed,
        "stop": stops,
    }


def _others(taken: _Taken) -> None:
    """Refuses what would be asked for in vain."""
    for key, value in taken.rest.items():
        if key in IGNORED:
            continue
        if key not in ONLY:
            _bad(key, "a key that this server does not know", "none of that name")
        if not any(value == allowed for allowed in ONLY[key]):
            _bad(key, json.dumps(value)[:40], " or ".join(map(json.dumps, ONLY[key])))


def _messages(found: list[Any], limits: Limits) -> list[Message]:
    out = []
    budget = _Budget(limits)
    for i, message in enumerate(found):
        where = f"messages[{i}]"
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str):
            _bad(where, "no role", "an object with role and content")
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        role = "system" if role == "developer" else role
        read = [_part(part, f"{where}.content[{k}]", budget) for k, part in enumerate(parts)]
        out.append(Message(role, tuple(read)))
    if not out:
        _bad("messages", "none", "at least one")
    return out


def _part(part: Any, where: str, budget: "_Budget") -> Any:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        if any(0xD800 <= ord(letter) < 0xE000 for letter in part["text"]):
            _bad(where, "half of a surrogate pair", "whole characters")
        return part["text"]
    address = part.get("image_url") if kind == "image_url" else None
    address = address.get("url") if isinstance(address, dict) else address
    if not isinstance(address, str):
        _bad(where, f"a part of type {str(kind)[:40]!r}", "text with text, or image_url with url")
    return budget.picture(address, where)


class _Budget:
    """Decodes pictures while a request has room for them."""

    def __init__(self, limits: Limits):
        self.limits, self.pictures, self.pixels = limits, limits.pictures, limits.pixels

    def picture(self, address: str, where: str) -> File:
        self.pictures -= 1
        if self.pictures < 0:
            _bad(where, "another picture", f"at most {self.limits.pictures} in a request")
        scheme = address.split(":", 1)[0].lower()
        if scheme == "data":
            data = _data(address, where)
        elif scheme in ("http", "https"):
            data = fetch(address, where, self.limits)
        else:
            _bad(where, "an address of another kind", "data: with base64, or http(s):")
        try:
            image = read_picture(data, where, self.pixels)
        except InputError as error:
            raise Refused(400, str(error), param="messages") from None
        self.pixels -= image.width * image.height
        return image


def _data(address: str, where: str) -> bytes:
    head, comma, text = address.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        _bad(where, "a data address without base64", "data:image/...;base64,...")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        _bad(where, f"broken base64 ({error})", "base64")


def fetch(address: str, where: str, limits: Limits) -> bytes:
    """A picture from a host that the operator named; redirections are not followed.

    Raises:
        Refused: another host, or it doesn't answer as it should.
    """
    try:
        url = urlsplit(address)
        host = url.netloc
    except ValueError:
        host = ""
    if not host or host.lower() not in limits.hosts:
        _bad(where, f"an address at {host[:60]!r}", "data:, or a host that allow_hosts names")
    parts = []
    try:
        with httpx2.stream("GET", address, timeout=limits.fetch_timeout) as answer:
            if answer.status_code != 200:
                _bad(where, f"status {answer.status_code} at {host}", "200")
            for part in answer.iter_bytes(1 << 16):
                parts.append(part)
                if sum(map(len, parts)) > limits.body:
                    _bad(where, f"more than {limits.body} bytes at {host}", "fewer")
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        _bad(where, f"no answer from {host} ({type(error).__name__})", "a picture")
    return b"".join(parts)


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _bad(where: str, found: object, expected: str) -> NoReturn:
    text = f"{where}: found {found}, expected {expected}; correct the request"
    raise Refused(400, text, param=where.split("[")[0])
