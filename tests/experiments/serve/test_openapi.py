"""The server's description of itself."""

import pytest

from experiments.serve.keys import ONLY
from tests.experiments.answers import FULL
from tests.experiments.serving import URL, ask, data, part, picture


def test_the_description_names_every_route(service, client):
    found = client.get("/openapi.json").json()
    routes = {route.path.replace(":path", ""): route.methods for route in service.app().routes}
    named = {path: {method.upper() for method in by} for path, by in found["paths"].items()}
    assert named == {path: methods - {"HEAD"} for path, methods in routes.items()}


def test_the_description_is_true(client):
    """It is valid, takes what is answered and nothing else, and knows the answers."""
    jsonschema = pytest.importorskip("jsonschema")
    chat = client.get("/openapi.json").json()["paths"][URL]["post"]
    takes = chat["requestBody"]["content"]["application/json"]["schema"]
    gives = {
        status: answer["content"]["application/json"]["schema"]
        for status, answer in chat["responses"].items()
    }
    for schema in (takes, *gives.values()):
        jsonschema.Draft202012Validator.check_schema(schema)
    bodies = [ask("a", data(picture()), stop=["b"], seed=1, n=2), ask("a", n=17), ask("a", best=1)]
    bodies += [
        ask("a", logprobs=True, top_logprobs=2),
        ask("a", top_logprobs=2),
        ask("a", stream_options={"include_usage": True}),
    ]
    kinds = ("text", "json_object", "xml")  # the model's tokenizer is one of words
    bodies += [ask("a", response_format={"type": kind}) for kind in kinds]
    bodies += [ask("a", **{key: value}) for key, values in ONLY.items() for value in values[:1]]
    bodies += [ask("a", tools=[{}]), ask("a", min_tokens=1), ask("a", messages=[FULL])]
    bodies += [ask("a", messages=[]), ask("a", stop=""), ask("a", model=None)]
    bodies += [ask("a", max_tokens=2.0), ask("a", max_tokens=2.5), ask("a", images=["data:"])]
    contents = ("", [], None, [""], [{"type": "text", "text": ""}], 3)
    said = [{"role": "user", "content": content} for content in contents]
    said += [{"role": role, "content": "a"} for role in ("developer", "tool", "assistant")]
    said += [
        {"role": "user", "content": [{**part(data(picture())), "text": text}]} for text in ("", "a")
    ]
    bodies += [ask("a", messages=[m, *ask("a")["messages"]]) for m in said[:-3]]
    bodies += [ask("a", messages=[m]) for m in said if m["role"] == "user"]
    for body in bodies:
        answer = client.post(URL, json=body)
        jsonschema.validate(answer.json(), gives[str(answer.status_code)])
        valid = jsonschema.Draft202012Validator(takes).is_valid(body)
        assert valid == (answer.status_code == 200), body
