"""The request of a chat completion: its body against its schema, pictures decoded."""

import dataclasses
import inspect
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from experiments.serve.addresses import Budget
from experiments.serve.keys import IGNORED, MESSAGE, ONLY, PART, ROLES, TEMPLATE, allowed
from experiments.serve.logprobs import TOP
from experiments.serve.refused import Limits, Refused, bad, cut
from vfjax import InputError, Processor, Sampling
from vfjax.atomic import JSON
from vfjax.text.chat import CHAT_TEMPLATE
from vfjax.text.messages import Message, tokenize
from vfjax.vision.images import File

Kind = TypeVar("Kind")
Absent = TypeVar("Absent", bound=None)
"""None where that is the default, else nothing."""


@dataclasses.dataclass(frozen=True)
class ChatRequest:
    """A chat completion.

    Attributes:
        ids: of the prompt, -200 at each picture.
        pictures: in that order.
        stream: whether the answer comes in pieces.
        usage: whether its last piece counts tokens.
        choices: how many answers; the i-th has the seed of the first + i.
        schema: JSON schema that they keep to; None: none.
        max_new_tokens: None for as many as the server gives.
        sampling: but for the seed.
        seed: of the first answer.
        stop: strings that end an answer.
        logprobs: alternatives whose log-probabilities are told beside the chosen token's; None: no
            log-probabilities.
        ignored: keys that are nothing here, as paths in the body.
    """

    ids: list[int]
    pictures: list[Any]
    stream: bool
    usage: bool
    choices: int
    schema: dict[str, Any] | None
    max_new_tokens: int | None
    sampling: Sampling
    seed: int
    stop: tuple[str, ...]
    logprobs: int | None
    ignored: tuple[str, ...] = ()


def read(body: bytes, limits: Limits, processor: Processor) -> ChatRequest:
    """Reads a request; takes a while where pictures are large.

    Raises:
        Refused: anything that is wrong with it, status 400, or 404 for another model.
    """
    try:
        found = json.loads(body, parse_constant=_constant, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        bad("body", f"no JSON ({error})", "an object")
    if not isinstance(found, dict):
        bad("body", f"a JSON {type(found).__name__}", "an object")
    taken = _Taken(_given(found))
    name = taken.text("model")
    if name != limits.model:
        message = f"model: found {name!r}, expected {limits.model!r}; ask for that one"
        raise Refused(404, message, code="model_not_found", param="model")
    stream = taken.flag("stream")
    ignored: list[str] = []
    usage = _stream_options(taken, stream, ignored)
    choices = taken.count("n", 1, limits.choices) or 1
    schema = _schema(taken, ignored)
    new = _counts(taken, ignored)
    sampling, seed = _sampling(taken), taken.count("seed", -(1 << 63), (1 << 63) - 1)
    stop, logprobs = _stop(taken), _logprobs(taken)
    messages = _messages(taken.get("messages", None, list, "a list"), limits, processor, ignored)
    variables = _variables(taken, processor, ignored)
    for key in sorted(taken.rest.keys() & IGNORED):
        del taken.rest[key]
    ignored += _others(taken.rest, ONLY, "")
    try:
        ids, pictures = tokenize(processor, messages, variables)
    except InputError as error:
        raise Refused(400, str(error), param="messages") from None
    context = processor.config.llm.context
    if len(ids) >= context:
        bad("messages", f"{len(ids)} tokens", f"fewer than {context}, the LLM's context")
    return ChatRequest(
        ids,
        pictures,
        stream=stream,
        usage=usage,
        choices=choices,
        schema=schema,
        max_new_tokens=new,
        sampling=sampling,
        seed=secrets.randbits(31) if seed is None else seed,
        stop=stop,
        logprobs=logprobs,
        ignored=tuple(ignored),
    )


class _Taken:
    """An object's keys, each asked for once; the rest is unknown."""

    def __init__(self, found: Mapping[str, object]):
        self.found, self.rest = found, dict(found)

    def get(
        self, key: str, default: object, kind: type[Kind] | tuple[type[Kind], ...], expected: str
    ) -> Kind:
        value = self.rest.pop(key, default)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            bad(key, "nothing" if value is None else f"a {type(value).__name__}", expected)
        return value

    def text(self, key: str) -> str:
        return self.get(key, None, str, "a string")

    def flag(self, key: str) -> bool:
        return self.get(key, False, bool, "true or false")

    def number(self, key: str, default: float | Absent, low: float, high: float) -> float | Absent:
        """A float; None where there is neither the key nor a default."""
        if default is None and key not in self.rest:
            return default
        value = self.get(key, default, (int, float), "a number")
        if not low <= value <= high:
            bad(key, value, f"{low} to {high}")
        return float(value)

    def count(self, key: str, low: int, high: int) -> int | None:
        if key not in self.rest:
            return None
        value = self.get(key, None, (int, float), "an integer")
        if not low <= value <= high:
            bad(key, value, f"{low} to {high}")
        if value != int(value):
            bad(key, value, "an integer")
        return int(value)


def _stream_options(taken: _Taken, stream: bool, ignored: list[str]) -> bool:
    """Whether a stream ends with its usage."""
    options = _Taken(_given(taken.get("stream_options", {}, dict, "an object")))
    usage = options.flag("include_usage")
    options.flag("include_obfuscation")  # letters that hide lengths; there are none
    ignored += _others(options.rest, {"continuous_usage_stats": (False,)}, "stream_options.")
    if usage and not stream:
        bad("stream_options.include_usage", "it without stream", "stream: true")
    return usage


def _variables(taken: _Taken, processor: Processor, ignored: list[str]) -> dict[str, Any]:
    """Those of the model's own chat template; what it does not read is ignored."""
    options = _given(taken.get("chat_template_kwargs", {}, dict, "an object"))
    efforts = {key: taken.rest.pop(key) for key in TEMPLATE if key in taken.rest}
    template = _own_template(processor)
    arguments = inspect.signature(processor.require_tokenizer().apply_chat_template).parameters
    read = {}
    for where, found in (("", efforts), ("chat_template_kwargs.", options)):
        for key, value in found.items():
            if key in arguments or key == "messages":
                bad(where + key, cut(value), "none of that name, as it is not supported")
            if re.search(rf"\b{re.escape(key)}\b", template):
                read[key] = value
            else:
                ignored.append(where + key)
    return read


def _schema(taken: _Taken, ignored: list[str]) -> dict[str, Any] | None:
    """Of response_format; its name is for people, and every schema is kept to, strict or not."""
    found = _given(taken.get("response_format", {"type": "text"}, dict, "an object"))
    kind = found.pop("type", None)
    held = found.pop("json_schema", None) if kind == "json_schema" else {"schema": {}}
    held = _given(held) if isinstance(held, dict) else {}
    schema = held.pop("schema", None)
    if kind not in ("text", "json_object", "json_schema") or found or not isinstance(schema, dict):
        bad(
            "response_format",
            cut(taken.found.get("response_format")),
            '{"type": "text"}, {"type": "json_object"} or one of json_schema with a schema',
        )
    ignored += [f"response_format.json_schema.{key}" for key in held.keys() - {"name", "strict"}]
    return {"text": None, "json_object": {"type": "object"}, "json_schema": schema}[kind]


def _own_template(processor: Processor) -> str:
    return processor.chat_template if processor.template == CHAT_TEMPLATE else ""


def _counts(taken: _Taken, ignored: list[str]) -> int | None:
    """Tokens of the answer at most; of two keys for it the later one of OpenAI's counts."""
    counts = [taken.count(key, 1, 1 << 31) for key in ("max_completion_tokens", "max_tokens")]
    if None not in counts and counts[0] != counts[1]:
        ignored.append("max_tokens")
    return next((count for count in counts if count is not None), None)


def _stop(taken: _Taken) -> tuple[str, ...]:
    stop = taken.get("stop", [], (str, list), "a string or a list of them")
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > 16 or not all(isinstance(text, str) and 0 < len(text) < 256 for text in stops):
        bad("stop", "something else", "up to 16 strings of 1 to 255 letters")
    return stops


def _logprobs(taken: _Taken) -> int | None:
    wanted, top = taken.flag("logprobs"), taken.count("top_logprobs", 0, TOP)
    if top and not wanted:
        bad("top_logprobs", "it without logprobs", "logprobs: true")
    return (top or 0) if wanted else None


def _sampling(taken: _Taken) -> Sampling:
    """OpenAI's defaults: temperature and top-p are 1."""
    top_k = taken.count("top_k", -1, 1 << 31)
    return Sampling(
        temperature=taken.number("temperature", 1.0, 0.0, 100.0),
        top_k=None if top_k in (None, -1, 0) else top_k,
        top_p=max(taken.number("top_p", 1.0, 0.0, 1.0), 1e-6),  # 0 takes the likeliest
        min_p=taken.number("min_p", 0.0, 0.0, 1.0),
        repetition_penalty=taken.number("repetition_penalty", None, 0.01, 100.0),
    )


def _others(
    rest: Mapping[str, object], only: Mapping[str, Sequence[JSON]], where: str
) -> list[str]:
    """Refuses what would be asked for in vain; the keys that nothing is known of."""
    unknown = []
    for key, value in rest.items():
        if value is None:
            continue
        if key not in only:
            unknown.append(where + key)
        elif not allowed(value, only[key]) and not _no_bias(key, value):
            values = " or ".join(map(json.dumps, only[key])) or "none"
            bad(where + key, cut(value), f"{values}, as it is not supported")
    return unknown


def _no_bias(key: str, value: object) -> bool:
    return (
        key == "logit_bias"
        and isinstance(value, dict)
        and all(allowed(v, (0,)) for v in value.values())
    )


def _given(found: Mapping[str, object]) -> dict[str, Any]:
    """Without the keys that are null."""
    return {key: value for key, value in found.items() if value is not None}


def _messages(
    found: list[object], limits: Limits, processor: Processor, ignored: list[str]
) -> list[Message]:
    out = []
    budget = Budget(limits)
    template = _own_template(processor)
    for i, message in enumerate(found):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            bad(where, f"a {type(message).__name__}", "an object with role and content")
        rest = _given(message)
        role, content = rest.pop("role", None), rest.pop("content", None)
        if role not in ROLES:
            bad(f"{where}.role", cut(role), " or ".join(ROLES))
        if not isinstance(content, str | list) or content == []:
            bad(f"{where}.content", cut(content), "a text, or a list of parts")
        if not isinstance(rest.get("name", ""), str):
            bad(f"{where}.name", cut(rest["name"]), "a string")
        more = {
            key: value
            for key, value in rest.items()
            if key not in MESSAGE and re.search(rf"[.'\"]{re.escape(key)}\b", template)
        }
        rest = {key: value for key, value in rest.items() if key not in more}
        ignored += _others(rest, MESSAGE, f"{where}.")
        parts = content if isinstance(content, list) else [content]
        read = [
            _part(part, f"{where}.content[{k}]", budget, ignored) for k, part in enumerate(parts)
        ]
        out.append(Message("system" if role == "developer" else role, tuple(read), more))
    if not out:
        bad("messages", "none", "at least one")
    return out


DETAILS = ("auto", "low", "high", "original")
"""Of a picture, by OpenAI; the model alone decides how it looks at it."""


def _part(part: object, where: str, budget: Budget, ignored: list[str]) -> str | File:
    rest = {"type": "text", "text": part} if isinstance(part, str) else part
    rest = _given(rest) if isinstance(rest, dict) else {}
    kind = rest.pop("type", None)
    value = rest.pop(kind, None) if kind in ("text", "image_url") else None
    if kind == "text" and isinstance(value, str):
        if any(0xD800 <= ord(letter) < 0xE000 for letter in value):
            bad(where, "half of a surrogate pair", "whole characters")
        ignored += _others(rest, PART, f"{where}.")
        return value
    if kind == "image_url":
        holds = _given(value) if isinstance(value, dict) else {"url": value}
        value, detail = holds.pop("url", None), holds.pop("detail", "auto")
        if detail not in DETAILS:
            bad(f"{where}.image_url.detail", cut(detail), " or ".join(DETAILS))
        if detail != "auto":
            ignored.append(f"{where}.image_url.detail")
        ignored += _others(rest, PART, f"{where}.")
        ignored += _others(holds, PART, f"{where}.image_url.")
    if kind != "image_url" or not isinstance(value, str):
        bad(where, f"a part of type {str(kind)[:40]!r}", "text with text, or image_url with url")
    return budget.picture(value, where)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of two values for a key one would be lost."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {cut(key)} is there twice")
        found[key] = value
    return found


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
