"""The fate of every key of OpenAI's client."""

import dataclasses
import json
import typing

import pytest

from experiments.serve import app
from experiments.serve.keys import IGNORED, ONLY, TEMPLATE
from experiments.serve.refused import Limits, Refused
from experiments.serve.request import read
from tests.experiments.answers import FULL
from tests.experiments.serving import QUESTIONS, URL, ask, data, direct, picture

NOTHING: dict[str, list] = {
    **{key: [*values, None] for key, values in ONLY.items()},
    **{key: [None, "x"] for key in IGNORED},
    "logit_bias": [{}, {"50": 0}],
    **{"top_k": [-1, 0, None], "min_p": [0, None], "repetition_penalty": [1, None], "n": [1, None]},
    **{"logprobs": [False, None], "top_logprobs": [0, None]},
    "response_format": [{"type": "text"}, None],
    "stream_options": [{}, None, {"include_usage": False}, {"include_obfuscation": True}],
    "chat_template_kwargs": [{}, None],
}
"""Keys and values that change nothing and that no header needs to name."""


VARIABLE = (
    {
        *(
            "top_k",
            "min_p",
            "repetition_penalty",
            "n",
            "logprobs",
            "top_logprobs",
            "response_format",
        ),
    }
    | {"model", "messages", "stream", "max_tokens", "max_completion_tokens"}
    | {
        *("temperature", "top_p", "stop", "seed"),
    }
)
"""Keys that answers depend on at most of their values."""


def test_every_key_of_openais_client_has_a_fate():
    """A key that a later client adds must be thought about."""
    params = pytest.importorskip("openai.types.chat.completion_create_params")
    keys = set(typing.get_type_hints(params.CompletionCreateParamsNonStreaming))
    assert len(keys) > 30
    assert keys <= VARIABLE | NOTHING.keys() | TEMPLATE
    assert not ONLY.keys() & (IGNORED | TEMPLATE | VARIABLE)


def test_values_that_do_nothing_are_taken(client, loaded):
    """One at a time by the reader, all at once by the server."""
    _, processor = loaded
    for key, values in NOTHING.items():
        for value in values:
            body = json.dumps(ask("a", **{key: value})).encode()
            assert read(body, Limits("clip"), processor).ignored == (), key
    body = ask(QUESTIONS[0]) | {key: values[0] for key, values in NOTHING.items()}
    found = client.post(URL, json=body)
    assert found.status_code == 200, found.text
    assert "x-ignored" not in found.headers
    expected = direct(loaded, QUESTIONS[0], max_new_tokens=8)
    assert found.json()["choices"][0]["message"]["content"] == expected


def test_keys_that_are_nothing_here_are_named(client, monkeypatch, caplog):
    """In the answer's header and, once, in the log; no key breaks either."""
    monkeypatch.setattr(app, "LOGGED", set())
    body = ask("a", messages=[FULL], reasoning_effort="low", best=1, max_completion_tokens=9)
    body["\r\nSet-Cookie: \u20ac\ud800"] = 1
    names = "max_tokens, messages[0].name, messages[0].mood, messages[0].content[1].cache_control"
    names += r", reasoning_effort, best, \r\nSet-Cookie: \u20ac\ud800"
    content = json.dumps(body).encode()
    for _ in range(2):
        found = client.post(URL, content=content)
        assert found.status_code == 200, found.text
        assert found.headers["x-ignored"] == names
    assert sum(record.message.startswith("best: a key that") for record in caplog.records) == 1
    many = client.post(URL, json=ask("a", stream=True, **{f"k{i}": i for i in range(1000)}))
    assert many.headers["x-ignored"].endswith(", k19, and 980 more")
    high = {"type": "image_url", "image_url": {"url": data(picture()), "detail": "high"}}
    seen = client.post(URL, json=ask("a", messages=[{"role": "user", "content": ["a", high]}]))
    assert seen.headers["x-ignored"] == "messages[0].content[1].image_url.detail"
    model = client.post(URL, json=ask("a", chat_template_kwargs={"enable_thinking": False}))
    assert model.headers["x-ignored"] == "chat_template_kwargs.enable_thinking"


def test_what_the_models_own_template_reads(loaded):
    """Names of people and variables reach it; others are named."""
    _, processor = loaded
    template = (
        "{% for m in messages %}{% if m.name %}{{ m.name }} : {% endif %}"
        "{{ m.content }}{% endfor %} {{ mood }}"
    )
    own = dataclasses.replace(processor, template="chat_template", chat_template=template)
    why = {"role": "assistant", "content": "3", "reasoning_content": "red", "mood": "good"}
    asked = ask(
        "a", messages=[{"role": "user", "content": "a"}, why, {"role": "user", "content": ""}]
    )
    reads = "{% for m in messages %}{{ m['reasoning_content'] }}{{ m.content }} {% endfor %}"
    thinking = dataclasses.replace(processor, template="chat_template", chat_template=reads)
    found = read(json.dumps(asked).encode(), Limits("clip"), thinking)
    assert found.ids == processor.tokenizer("a red3").input_ids
    assert found.ignored == ("messages[1].mood",)
    body = ask("a", messages=[{"role": "user", "content": "red ?", "name": "ann"}], tone=1)
    found = read(json.dumps(body).encode(), Limits("clip"), own)
    assert found.ids == processor.tokenizer("ann : red ?").input_ids
    assert found.ignored == ("tone",)
    body |= {"chat_template_kwargs": {"mood": "good", "tone": 1}, "reasoning_effort": "low"}
    found = read(json.dumps(body).encode(), Limits("clip"), own)
    assert found.ids == processor.tokenizer("ann : red ? good").input_ids
    assert found.ignored == ("reasoning_effort", "chat_template_kwargs.tone", "tone")
    for key in ("tools", "chat_template", "messages", "add_generation_prompt"):
        body["chat_template_kwargs"] = {key: "x"}
        with pytest.raises(Refused, match=f"^chat_template_kwargs.{key}: found .x., expected none"):
            read(json.dumps(body).encode(), Limits("clip"), own)
