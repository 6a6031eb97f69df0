"""The OpenAPI description of what the server takes."""

from typing import Any


def _object(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required)}


def _array(items: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, **more}


def _answer(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


STRING, INTEGER, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}
ANY_NUMBER = {"type": ["number", "null"]}
COUNT = {"type": ["integer", "null"], "minimum": 1}
TEXT = _object(("type", "text"), type={"const": "text"}, text=STRING)
PICTURE = _object(
    ("type", "image_url"),
    type={"const": "image_url"},
    image_url=_object(("url",), url={"type": "string", "description": "data:image/...;base64,..."}),
)
MESSAGE = _object(
    ("role", "content"),
    role={"enum": ["system", "developer", "user", "assistant"]},
    content={"oneOf": [STRING, _array({"oneOf": [TEXT, PICTURE]})]},
)
CHAT = _object(
    ("model", "messages"),
    model=STRING,
    messages=_array(MESSAGE, minItems=1),
    stream={"type": ["boolean", "null"]},
    stream_options={"type": ["object", "null"]},
    max_tokens=COUNT,
    max_completion_tokens=COUNT,
    temperature=ANY_NUMBER | {"minimum": 0, "maximum": 100},
    top_p=ANY_NUMBER | {"minimum": 0, "maximum": 1},
    n={"enum": [1, None]},
    stop={"oneOf": [STRING, _array(STRING), {"type": "null"}]},
    seed={"type": ["integer", "null"]},
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
)
COMPLETION = _object(
    ("id", "object", "created", "model", "choices", "usage"),
    id=STRING,
    object=STRING,
    created=INTEGER,
    model=STRING,
    choices=_array(CHOICE),
    usage=USAGE,
)
MODEL = _object(("id", "object"), id=STRING, object=STRING, created=INTEGER, owned_by=STRING)
ERROR = _object(
    ("error",),
    error=_object(("message", "type"), message=STRING, type=STRING),
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
COMPLETED = _answer("the answer; with `stream` as server-sent events", COMPLETION)
COMPLETED["content"]["text/event-stream"] = {"schema": STRING}
NAME = {"name": "name", "in": "path", "required": True, "schema": STRING}

DESCRIPTION: dict[str, Any] = {
    "openapi": "3.1.0",
    "info": {"title": "vfjax", "version": "1"},
    "paths": {
        "/v1/chat/completions": {
            "post": {
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": CHAT}},
                },
                "responses": {
                    "200": COMPLETED,
                    **{status: _answer(text, ERROR) for status, text in FAULTS.items()},
                },
            }
        },
        "/v1/models": {
            "get": {
                "responses": {"200": _answer("the model", _object(("data",), data=_array(MODEL)))}
            }
        },
        "/v1/models/{name}": {
            "get": {
                "parameters": [NAME],
                "responses": {
                    "200": _answer("the model", MODEL),
                    "404": _answer("another", ERROR),
                },
            }
        },
        "/health": {
            "get": {
                "responses": {
                    "200": _answer("it runs", _object(("status",), status=STRING, requests=INTEGER))
                }
            }
        },
    },
}
