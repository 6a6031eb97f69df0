"""The OpenAPI description of what the server takes, as far as a schema can say it."""

from collections.abc import Mapping, Sequence

from experiments.serve import keys
from experiments.serve.logprobs import TOP
from experiments.serve.refused import Limits
from experiments.serve.request import DETAILS
from vfjax.atomic import JSON

Schema = Mapping[str, JSON]


def _object(required: tuple[str, ...] = (), **properties: JSON) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required)}


def _array(items: Schema, **more: JSON) -> Schema:
    return {"type": "array", "items": items, **more}


def _answer(description: str, schema: Schema) -> Schema:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _only(known: Mapping[str, Sequence[JSON]]) -> Schema:
    """Keys that are taken at some values alone."""
    return {key: {"enum": [*values, None]} for key, values in known.items()}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


STRING, INTEGER, FLAG = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
COUNT = _or_null({"type": "integer", "minimum": 1, "maximum": 1 << 31})
STOP: Schema = {"type": "string", "minLength": 1, "maxLength": 255}
TEXT = _object(("type", "text"), **{**_only(keys.PART), "type": {"const": "text"}, "text": STRING})
ADDRESS = {"type": "string", "description": "data:image/...;base64,..."}
HELD = {**_only(keys.PART), "url": ADDRESS, "detail": {"enum": [*DETAILS, None]}}
PICTURE = _object(
    ("type", "image_url"),
    **{
        **_only(keys.PART),
        "type": {"const": "image_url"},
        "image_url": {"anyOf": [_object(("url",), **HELD), ADDRESS]},
    },
)
MESSAGE = _object(
    ("role", "content"),
    role={"enum": keys.ROLES},
    content={"anyOf": [STRING, _array({"anyOf": [TEXT, PICTURE, STRING]}, minItems=1)]},
    name=_or_null(STRING),
    **_only(keys.MESSAGE),
)
PLAIN: Schema = {**_object(("type",), type={"const": "text"}), "additionalProperties": False}
FORMATS = [
    PLAIN,
    {**PLAIN, "properties": {"type": {"const": "json_object"}}},
    {
        **_object(
            ("type", "json_schema"),
            type={"const": "json_schema"},
            json_schema=_object(("schema",), schema={"type": "object"}),
        ),
        "additionalProperties": False,
    },
]
TOKEN = {"token": STRING, "logprob": {"type": "number"}, "bytes": _array(INTEGER)}
LOGS = _object(
    ("content",),
    content=_array(
        _object((*TOKEN, "top_logprobs"), **TOKEN, top_logprobs=_array(_object((*TOKEN,), **TOKEN)))
    ),
)
USAGE = _object(
    ("prompt_tokens", "completion_tokens", "total_tokens"),
    prompt_tokens=INTEGER,
    completion_tokens=INTEGER,
    total_tokens=INTEGER,
)
CHOICE = _object(
    ("index", "message", "finish_reason"),
    index=INTEGER,
    message=_object(("role", "content"), role=STRING, content=STRING),
    finish_reason={"enum": ["stop", "length"]},
    logprobs=_or_null(LOGS),
)
COMPLETION = _object(
    ("id", "object", "created", "model", "choices", "usage"),
    id=STRING,
    object={"const": "chat.completion"},
    created=INTEGER,
    model=STRING,
    choices=_array(CHOICE),
    usage=USAGE,
)
MODEL = _object(("id", "object"), id=STRING, object=STRING, created=INTEGER, owned_by=STRING)
ERROR = _object(
    ("error",),
    error=_object(
        ("message", "type"),
        message=STRING,
        type=STRING,
        param=_or_null(STRING),
        code=_or_null(STRING),
    ),
)
FAULTS = {
    "400": "a fault of the request",
    "404": "no such model",
    "408": "the body came too slowly",
    "413": "the body is too large",
    "429": "too many requests; Retry-After says when to come back",
    "500": "a fault of the server",
    "504": "no answer in time",
}


def describe(limits: Limits, able: bool) -> Schema:
    """The description of a server of a model.

    Args:
        limits: of requests.
        able: whether answers in JSON are, with the model's tokenizer.

    Other keys are taken, and named by the answer's header `X-Ignored`. What it leaves to words:
    roles come in the order of a conversation, the prompt fits the context, pictures can be decoded,
    usage is asked for with `stream`, a schema is one that
    llguidance keeps to, `logit_bias` may hold zeros, and `chat_template_kwargs` has no arguments
    of transformers' apply_chat_template.
    """
    name: Schema = {"name": "name", "in": "path", "required": True, "schema": STRING}
    models: Schema = _object(("object", "data"), object={"const": "list"}, data=_array(MODEL))
    health = _object(("status", "requests"), status=STRING, requests=INTEGER)
    completed: Schema = {
        "description": "the answer; with `stream` as server-sent events",
        "content": {
            "application/json": {"schema": COMPLETION},
            "text/event-stream": {"schema": STRING},
        },
        "headers": {"X-Ignored": {"description": "keys not used", "schema": STRING}},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "vfjax", "version": "1"},
        "paths": {
            "/v1/chat/completions": {
                "post": {
                    "requestBody": {
                        "required": True,
                        "content": {"application/json": {"schema": _chat(limits, able)}},
                    },
                    "responses": {
                        "200": completed,
                        **{status: _answer(text, ERROR) for status, text in FAULTS.items()},
                    },
                }
            },
            "/v1/models": _get(_answer("the model", models)),
            "/v1/models/{name}": _get(
                _answer("the model", MODEL), {"404": _answer("another", ERROR)}, parameters=[name]
            ),
            "/health": _get(_answer("it runs", health)),
            "/openapi.json": _get(_answer("this", {"type": "object"})),
        },
    }


def _get(answer: Schema, others: Schema | None = None, **more: JSON) -> Schema:
    return {"get": {**more, "responses": {"200": answer, **(others or {})}}}


def _chat(limits: Limits, able: bool) -> Schema:
    """A request; a key that is null counts as absent."""
    properties: Schema = {
        "model": {"enum": [limits.model]},
        "messages": _array(MESSAGE, minItems=1),
        "stream": _or_null(FLAG),
        "stream_options": _or_null(
            _object(
                include_usage=_or_null(FLAG),
                include_obfuscation=_or_null(FLAG),
                continuous_usage_stats={"enum": [False, None]},
            )
        ),
        "chat_template_kwargs": _or_null({"type": "object"}),
        "max_tokens": COUNT,
        "max_completion_tokens": COUNT,
        "temperature": _or_null({"type": "number", "minimum": 0, "maximum": 100}),
        "top_p": _or_null({"type": "number", "minimum": 0, "maximum": 1}),
        "stop": {"anyOf": [STOP, _array(STOP, maxItems=16), {"type": "null"}]},
        "seed": _or_null({"type": "integer", "minimum": -(1 << 63), "maximum": (1 << 63) - 1}),
        "top_k": _or_null({"type": "integer", "minimum": -1, "maximum": 1 << 31}),
        "min_p": _or_null({"type": "number", "minimum": 0, "maximum": 1}),
        "repetition_penalty": _or_null({"type": "number", "minimum": 0.01, "maximum": 100}),
        "n": _or_null({"type": "integer", "minimum": 1, "maximum": limits.choices}),
        "logprobs": _or_null(FLAG),
        "top_logprobs": _or_null({"type": "integer", "minimum": 0, "maximum": TOP}),
        "response_format": _or_null({"anyOf": FORMATS} if able else PLAIN),
        **_only(keys.ONLY),
        **{key: {} for key in sorted(keys.IGNORED | keys.TEMPLATE)},
    }
    required = ["model", "messages"]
    alternatives = _object(("top_logprobs",), top_logprobs={"type": "integer", "minimum": 1})
    usage = _object(("include_usage",), include_usage={"const": True})
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "allOf": [
            {"if": alternatives, "then": _object(("logprobs",), logprobs={"const": True})},
            {
                "if": _object(("stream_options",), stream_options=usage),
                "then": _object(("stream",), stream={"const": True}),
            },
        ],
    }
