"""Answers that keep to a JSON schema."""

import json

import pytest
from starlette.testclient import TestClient

import converters
from experiments.serve.app import Service
from experiments.serve.batcher import Batcher
from experiments.serve.refused import Limits
from tests import checkpoints
from tests.experiments.serving import URL, ask

SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "count": {"type": "boolean"}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}


def test_answers_keep_to_a_schema(tmp_path):
    """A random model's, greedy and drawn; beside free ones; what can't be kept to is refused."""
    jsonschema = pytest.importorskip("jsonschema")
    checkpoints.llama_folder(tmp_path, 3)
    batcher = Batcher(*converters.load(tmp_path), batch=2, max_new_tokens=256)
    asked = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}}
    body = ask(
        "a", response_format=asked, max_tokens=256, temperature=1, seed=3, n=2, logprobs=True
    )
    with TestClient(Service(batcher, Limits("clip")).app()) as client:
        chat = client.get("/openapi.json").json()["paths"][URL]["post"]["requestBody"]
        found = client.post(URL, json=body)
        free = client.post(URL, json=body | {"response_format": None, "max_tokens": 20})
        wrong = []
        for schema in ({"type": "word"}, {"$ref": "#"}, {"not": {}}, {"enum": ["a" * 70_000]}):
            asked["json_schema"]["schema"] = schema
            wrong.append(client.post(URL, json=body))
    batcher.close()
    assert found.status_code == 200, found.text
    jsonschema.validate(body, chat["content"]["application/json"]["schema"])
    for choice in found.json()["choices"]:
        answer = json.loads(choice["message"]["content"])
        assert answer.keys() == {"colour", "count"} and answer["colour"] in ("red", "blue")
        assert isinstance(answer["count"], bool) and choice["finish_reason"] == "stop"
        data = b"".join(bytes(token["bytes"]) for token in choice["logprobs"]["content"])
        assert json.loads(data) == answer
    assert "{" not in free.json()["choices"][0]["message"]["content"][:1]
    for answer in wrong:
        assert answer.status_code == 400
        assert answer.json()["error"]["message"].startswith("response_format: found a schema ")
