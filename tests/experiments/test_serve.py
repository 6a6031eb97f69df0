"""The server: OpenAI's form, answers equal to `generate`'s, what is wrong refused in one line."""

import asyncio
import base64
import contextlib
import dataclasses
import io
import json
import queue
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import typing
from pathlib import Path

import httpx2
import numpy as np
import pytest
import tokenizers
import transformers
from PIL import Image
from starlette.testclient import TestClient

import converters
import vfjax
from experiments.serve import app
from experiments.serve.addresses import fetch
from experiments.serve.app import Service
from experiments.serve.batcher import Batcher, Job
from experiments.serve.keys import IGNORED, ONLY, TEMPLATE
from experiments.serve.logprobs import Names
from experiments.serve.refused import Limits, Refused
from experiments.serve.request import read
from tests import checkpoints
from tests.experiments.pictures import black_png
from tests.experiments.serving import MODEL, QUESTIONS, ROOT, URL, ask, data, direct, part, picture
from vfjax.generate import decode, first_tokens, prefill


def programs() -> tuple[int, ...]:
    return tuple(each._cache_size() for each in (prefill, first_tokens, decode))


def test_a_warm_batcher_compiles_no_more(loaded):
    """Neither for greedy answers nor for sampled ones."""
    batcher = Batcher(*loaded, batch=2, max_new_tokens=200)
    before = programs()
    batcher.warm_up()
    warm = programs()
    assert warm[0] >= before[0] + 2 and warm[2] >= before[2] + 4  # of one row, and of two
    events: queue.SimpleQueue = queue.SimpleQueue()
    ids = batcher.processor([picture()], [batcher.processor.chat(QUESTIONS[0])]).tokens
    for temperature in (0.0, 1.0, 0.3):
        job = Job([-200, *ids[0][ids[0] > 0].tolist()], [picture()], events.put)
        batcher.submit(dataclasses.replace(job, sampling=vfjax.Sampling(temperature)))
        while not events.get(timeout=60).finish:
            pass
    batcher.close()
    assert programs() == warm
    assert batcher.pending == 0 and batcher.pixels == 0


def test_an_llm_without_eyes_is_warmed_up():
    model, processor = converters.load(MODEL.parent / "base", dtype="float32")
    batcher, before = Batcher(model, processor, batch=1, max_new_tokens=64), programs()
    batcher.warm_up()
    batcher.close()
    assert programs()[0] == before[0] + 1


def test_an_answer(client, loaded):
    found = client.post(URL, json=ask(QUESTIONS[0], data(picture()))).json()
    expected = direct(loaded, QUESTIONS[0], picture(), max_new_tokens=8)
    assert expected
    (choice,) = found["choices"]
    message = {"role": "assistant", "content": expected, "refusal": None}
    assert choice == {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
    usage = found["usage"]
    batch = loaded[1]([picture()], [loaded[1].chat(QUESTIONS[0])])
    assert usage["prompt_tokens"] == batch.mask.sum()
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert found["object"] == "chat.completion"
    assert found["model"] == "clip"


def events(answer: httpx2.Response) -> list[dict]:
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_streamed_answer(client, loaded):
    how = {"temperature": 1.5, "seed": 4, "max_new_tokens": 24}
    body = ask(QUESTIONS[1], temperature=1.5, seed=4, max_tokens=24, stream=True)
    body["stream_options"] = {"include_usage": True}
    found = events(client.post(URL, json=body))
    deltas = [event["choices"][0]["delta"] for event in found[:-1]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(d.get("content", "") for d in deltas) == direct(loaded, QUESTIONS[1], **how)
    assert len({event["id"] for event in found}) == 1
    assert found[-2]["choices"][0]["finish_reason"] in ("stop", "length")
    assert found[-1]["choices"] == []
    assert found[-1]["usage"]["completion_tokens"] > 0
    plain = client.post(URL, json={**body, "stream": False, "stream_options": None}).json()
    assert plain["choices"][0]["message"]["content"] == direct(loaded, QUESTIONS[1], **how)
    assert plain["usage"] == found[-1]["usage"]


def test_stop_length_and_the_context(client, loaded):
    whole = direct(loaded, "red", max_new_tokens=64, temperature=3.0, seed=1)
    first, second = whole.split()[:2]
    body = ask("red", temperature=3, seed=1, max_tokens=2)
    short = client.post(URL, json=body).json()
    assert short["choices"][0]["finish_reason"] == "length"
    assert short["usage"]["completion_tokens"] == 2
    body |= {"max_tokens": 32768}  # VLMEvalKit's
    full = client.post(URL, json=body).json()
    assert full["choices"][0]["message"]["content"] == whole
    cut = client.post(URL, json=body | {"stop": ["nowhere", f" {second}"]}).json()
    assert cut["choices"][0]["message"]["content"] == whole.split(f" {second}")[0].strip() == first
    assert cut["choices"][0]["finish_reason"] == "stop"
    long = client.post(URL, json=ask("red " * 508, max_completion_tokens=60)).json()
    assert long["usage"]["total_tokens"] <= 512
    assert long["usage"]["completion_tokens"] < 10


def test_a_conversation(client, loaded):
    """Roles by the template; `<image>` in a text is text; pictures between texts stay there."""
    model, processor = loaded
    messages = [
        {"role": "system", "content": "one word"},
        {"role": "user", "content": [part(data(picture(1))), {"type": "text", "text": "red ?"}]},
        {"role": "assistant", "content": "3"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "here"},
                part(data(picture(2))),
                {"type": "text", "text": "blue <image> ?"},
            ],
        },
    ]
    body = {"model": "clip", "messages": messages, "temperature": 0, "max_tokens": 8}
    found = client.post(URL, json=body)
    assert found.status_code == 200, found.text
    prompt = (
        "[INST] one word\n\n<image>\nred ? [/INST] 3 </s>[INST] here\n<image>\nblue @ ? [/INST]"
    )
    ids = vfjax.text.prompts.tokenize(processor.tokenizer, prompt)
    at = processor.tokenizer.convert_tokens_to_ids("@")
    assert at == processor.tokenizer.convert_tokens_to_ids("<image>")  # both unknown
    batch = processor([picture(1), picture(2)], input_ids=[ids])
    (expected,) = vfjax.generate(model, processor, batch, max_new_tokens=8)
    assert found.json()["choices"][0]["message"]["content"] == expected
    extra = len(processor.tokenizer("<image>").input_ids) - len(processor.tokenizer("@").input_ids)
    assert found.json()["usage"]["prompt_tokens"] == batch.mask.sum() + extra


def animated(kind: str) -> str:
    out = io.BytesIO()
    picture(0).save(out, kind, save_all=True, append_images=[picture(1)], duration=100)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(out.getvalue()).decode()


def test_choices_penalties_and_filters(client, loaded):
    """As generate's, each with the seed of the first + i; whole and streamed."""
    how = {"temperature": 5.0, "top_k": 40, "min_p": 1e-4, "repetition_penalty": 1.3}
    body = ask("red", n=2, seed=7, max_tokens=12) | how
    found = client.post(URL, json=body).json()
    expected = [direct(loaded, "red", max_new_tokens=12, seed=7 + i, **how) for i in range(2)]
    assert [choice["index"] for choice in found["choices"]] == [0, 1]
    assert [choice["message"]["content"] for choice in found["choices"]] == expected
    assert len(set(expected)) > 1
    texts = ["", ""]
    chunks = events(client.post(URL, json=body | {"stream": True}))
    for choice in (chunk["choices"][0] for chunk in chunks):
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == expected
    assert sum(chunk["choices"][0]["finish_reason"] is not None for chunk in chunks) == 2
    batch = loaded[1]([], [loaded[1].chat("red", images=0)])
    usage = found["usage"]
    assert usage["prompt_tokens"] == batch.mask.sum()
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert client.post(URL, json=body | {"seed": (1 << 63) - 1}).status_code == 200


def test_log_probabilities(client, loaded):
    """OpenAI's form, by OpenAI's own types; whole and streamed."""
    types = pytest.importorskip("openai.types.chat")
    body = ask("red", temperature=3, seed=1, max_tokens=7, logprobs=True, top_logprobs=3)
    answer = client.post(URL, json=body).json()
    (choice,) = types.ChatCompletion.model_validate(answer).choices
    tokens = choice.logprobs.content
    assert len(tokens) == answer["usage"]["completion_tokens"] == 7
    joined = b"".join(bytes(token.bytes) for token in tokens).decode()
    assert joined.split() == choice.message.content.split()
    model, processor = loaded
    batch = processor([], [processor.chat("red", images=0)])
    how = {"max_new_tokens": 7, "sampling": vfjax.Sampling(3.0, seed=1), "stop": processor.stops}
    (piece,) = vfjax.stream_ids(model, batch, every=7, logprobs=20, **how)
    (expected,) = piece.logs
    np.testing.assert_allclose([token.logprob for token in tokens], expected.chosen, atol=1e-5)
    for token, values, ids in zip(tokens, expected.top, expected.ids, strict=True):
        found = [(other.token.strip(), other.logprob) for other in token.top_logprobs]
        assert [name for name, _ in found] == processor.tokenizer.convert_ids_to_tokens(ids[:3])
        np.testing.assert_allclose([value for _, value in found], values[:3], atol=1e-5)
    chunks = events(client.post(URL, json=body | {"stream": True}))
    streamed = [
        token
        for chunk in chunks
        for token in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert streamed == answer["choices"][0]["logprobs"]["content"]
    body |= {"top_logprobs": None, "stop": joined.split()[2]}
    cut = client.post(URL, json=body).json()
    assert len(cut["choices"][0]["logprobs"]["content"]) == 3 == cut["usage"]["completion_tokens"]
    assert cut["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_names_of_tokens(tmp_path):
    """With the space before; bytes of a character's parts, of both kinds of tokenizer."""
    words = ["<unk>", "<s>", "a", "\u2581red", "<0xE2>", "\u2581"]
    engine = tokenizers.Tokenizer(
        tokenizers.models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True)
    )
    engine.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace("\u2581", " "), tokenizers.decoders.ByteFallback(),
         tokenizers.decoders.Fuse(), tokenizers.decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    names = Names(transformers.PreTrainedTokenizerFast(tokenizer_object=engine, bos_token="<s>"))
    assert [names.name(i) for i in (3, 5, 4, 1)] == [
        *((" red", b" red"), (" ", b" "), ("\N{REPLACEMENT CHARACTER}", b"\xe2"), ("<s>", b"<s>")),
    ]
    checkpoints.tokenizer_files(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    names = Names(tokenizer)
    ids = tokenizer("na\u00efve \U0001f600", add_special_tokens=False).input_ids
    assert b"".join(names.name(i)[1] for i in ids).decode() == "na\u00efve \U0001f600"


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


BOMB = "data:image/png;base64," + base64.b64encode(black_png(10_000)).decode()
GIF = "data:image/gif;base64," + base64.b64encode(b"GIF89a" + bytes(20)).decode()
WRONG = {
    "not JSON": (b"{", "body: found no JSON"),
    "nested": (b"[" * 100_000, "body: found no JSON"),
    "NaN": (b'{"temperature": NaN}', "NaN is no JSON"),
    "a list": (b"[]", "body: found a JSON list"),
    "bytes": (b"\xff\xfe\x00", "body: found no JSON"),
    "no model": (ask("a", model=None), "model: found nothing"),
    "no messages": (ask("a", messages=[]), "messages: found none"),
    "role": (
        ask("a", messages=[{"role": "tool", "content": "a"}]),
        'messages[0].role: found "tool", expected system or developer or user or assistant',
    ),
    "no message": (ask("a", messages=["a"]), "messages[0]: found a str, expected an object"),
    "no content": (ask("a", messages=[{"role": "user"}]), "messages[0].content: found null"),
    "no part": (
        ask("a", messages=[{"role": "user", "content": []}]),
        "messages[0].content: found [], expected a text, or a list of parts",
    ),
    "a picture elsewhere": (
        ask("a", messages=[{"role": "user", "content": "a", "images": ["data:"]}]),
        'messages[0].images: found ["data:"], expected []',
    ),
    "a picture of a text": (
        ask(
            "a",
            messages=[
                {"role": "user", "content": [{**part("data:"), "type": "text", "text": "a"}]}
            ],
        ),
        'messages[0].content[0].image_url: found {"url": "data:", "detail": "auto"}, expected none',
    ),
    "a text of a picture": (
        ask("a", messages=[{"role": "user", "content": [{**part("data:"), "text": "a"}]}]),
        'messages[0].content[0].text: found "a", expected "", as it is not supported',
    ),
    "no question": (ask("a", messages=[{"role": "system", "content": "a"}]), "no question"),
    "content": (
        ask("a", messages=[{"role": "user", "content": 3}]),
        "messages[0].content: found 3",
    ),
    "surrogate": (ask("\ud800"), "surrogate"),
    "many": (ask("a", n=17), "n: found 17, expected 1 to 16"),
    "true is not 1": (ask("a", best_of=True), "best_of: found true, expected 1"),
    "top_k": (ask("a", top_k=-2), "top_k: found -2, expected -1 to"),
    "min_p": (ask("a", min_p=1.5), "min_p: found 1.5, expected 0.0 to 1.0"),
    "penalty": (ask("a", repetition_penalty=0), "repetition_penalty: found 0, expected 0.01 to"),
    "top_logprobs": (ask("a", top_logprobs=2), "top_logprobs: found it without logprobs"),
    "format": (ask("a", response_format={"type": "xml"}), 'response_format: found {"type": "xml"}'),
    "words": (ask("a", response_format={"type": "json_object"}), "found a tokenizer that it can't"),
    "twice": (b'{"model": "clip", "seed": 1, "seed": 2}', 'the key "seed" is there twice'),
    "tools": (ask("a", tools=[{"type": "function"}]), "tools: found [{"),
    "bias": (ask("a", logit_bias={"50": 1}), 'logit_bias: found {"50": 1}, expected {}'),
    "bias of lists": (ask("a", logit_bias={"50": [1]}), "logit_bias: found"),
    "guided": (ask("a", guided_regex="a+"), 'guided_regex: found "a+", expected none'),
    "audio": (ask("a", modalities=["text", "audio"]), "modalities: found"),
    "search": (ask("a", web_search_options={}), "web_search_options: found {}, expected none"),
    "usage each": (
        ask("a", stream=True, stream_options={"continuous_usage_stats": True}),
        "stream_options.continuous_usage_stats: found true, expected false",
    ),
    "name": (ask("a", messages=[{"role": "user", "content": "a", "name": 3}]), "messages[0].name"),
    "calls": (
        ask("a", messages=[{"role": "assistant", "tool_calls": [{"id": "a"}], "content": ""}]),
        "messages[0].tool_calls: found [{",
    ),
    "detail": (
        ask(
            "a",
            messages=[
                {
                    "role": "user",
                    "content": [
                        {**part("data:"), "image_url": {"url": "data:", "detail": "sharp"}}
                    ],
                }
            ],
        ),
        'messages[0].content[0].image_url.detail: found "sharp", expected auto or low or high',
    ),
    "pixels of a part": (
        ask("a", messages=[{"role": "user", "content": [{**part("data:"), "max_pixels": 9}]}]),
        "messages[0].content[0].max_pixels: found 9, expected none",
    ),
    **{
        kind: (
            ask("a", messages=[{"role": "user", "content": [{"type": kind, kind: {"url": "a"}}]}]),
            f"messages[0].content[0]: found a part of type '{kind}', expected text",
        )
        for kind in ("refusal", "input_audio", "file", "video_url", "input_text")
    },
    **{
        f"animated {kind}": (ask("a", animated(kind)), f"found an animated {kind}, expected one")
        for kind in ("GIF", "PNG", "WEBP")
    },
    "temperature": (ask("a", temperature=-1), "temperature: found -1"),
    "infinite": (ask("a", temperature=10**400), "temperature: found 1000"),
    "top_p": (ask("a", top_p="1"), "top_p: found a str"),
    "max_tokens": (ask("a", max_tokens=0), "max_tokens: found 0"),
    "fraction": (ask("a", max_tokens=1.5), "max_tokens: found 1.5, expected an integer"),
    "infinite count": (b'{"model": "clip", "max_tokens": 1e999}', "max_tokens: found inf"),
    "true": (ask("a", max_tokens=True), "max_tokens: found a bool"),
    "stop": (ask("a", stop=[""]), "stop: found something else"),
    "usage": (
        ask("a", stream_options={"include_usage": True}),
        "stream_options.include_usage: found it",
    ),
    "long": (ask("red " * 600), "expected fewer than 512, the LLM's context"),
    "file": (ask("a", "file:///etc/passwd"), "an address of another kind"),
    "path": (ask("a", "/etc/passwd"), "an address of another kind"),
    "host": (ask("a", "http://127.0.0.1:1/a.png"), "an address at '127.0.0.1:1'"),
    "base64": (ask("a", "data:image/png;base64,a@"), "broken base64"),
    "no base64": (ask("a", "data:image/png,abc"), "a data address without base64"),
    "no picture": (ask("a", "data:image/png;base64,AAAA"), "found no picture"),
    "broken": (ask("a", data(picture())[:-400]), "messages[0].content[1]: found an unreadable"),
    "gif": (ask("a", GIF), "messages[0].content[1]: found"),
    "bomb": (ask("a", BOMB), "found 10000x10000 pixels, expected at most 200000"),
    "pixels": (ask("a", *[data(Image.new("RGB", (300, 300)))] * 3), "300x300 pixels"),
    "pictures": (ask("a", *[data(picture())] * 4), "another picture, expected at most 3"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_in_one_line(client, name: str):
    body, words = WRONG[name]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    found = client.post(URL, content=content)
    assert found.status_code == 400, found.text
    error = found.json()["error"]
    assert words in error["message"]
    assert "\n" not in error["message"]
    assert error["type"] == "invalid_request_error"


def test_other_addresses(client):
    assert client.get("/health").json() == {"status": "ok", "requests": 0}
    (card,) = client.get("/v1/models").json()["data"]
    assert card["id"] == "clip"
    assert client.get("/v1/models/clip").json() == card
    for answer, status in (
        (client.get("/v1/models/other"), 404),
        (client.post(URL, json=ask("a", model="other")), 404),
        (client.get("/nowhere"), 404),
        (client.get(URL), 405),
        (client.post(URL, content=b" " * (1 << 21)), 413),
    ):
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == "invalid_request_error"


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


FULL = {
    "role": "user", "name": "ann", "refusal": None, "tool_calls": [], "mood": "good",
    "content": ["where", {"type": "text", "text": "is the 3 ?", "cache_control": {}}],
}  # fmt: skip
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


def test_a_full_house_is_refused(service, client):
    service.reading += service.queue
    try:
        found = client.post(URL, json=ask("a"))
    finally:
        service.reading -= service.queue
    assert found.status_code == 429
    assert int(found.headers["retry-after"]) > 0
    assert found.json()["error"]["type"] == "rate_limit_error"
    assert client.post(URL, json=ask(QUESTIONS[0])).status_code == 200


def test_many_pixels_in_the_house_are_refused(service, client, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(service, "pixels", 10_000)
        patch.setattr(service.batcher, "pixels", 9_000)
        found = client.post(URL, json=ask("a", data(picture())))
        assert client.post(URL, json=ask(QUESTIONS[0])).status_code == 200
    assert found.status_code == 429
    assert int(found.headers["retry-after"]) > 0
    assert "pictures of 9000 pixels in the house" in found.json()["error"]["message"]
    assert client.post(URL, json=ask("a", data(picture()))).status_code == 200
    assert service.batcher.pixels == 0


def test_an_answer_that_takes_too_long(service, client, monkeypatch):
    monkeypatch.setattr(service, "timeout", 0.5)
    monkeypatch.setattr(service.batcher, "answer", lambda jobs: time.sleep(1.5))
    found = client.post(URL, json=ask(QUESTIONS[0]))
    assert found.status_code == 504
    assert found.json()["error"]["type"] == "server_error"


def test_a_fault_of_ours_leaves_the_others_alone(service, client, monkeypatch):
    def fail(jobs: list[Job]) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(service.batcher, "answer", fail)
        assert client.post(URL, json=ask(QUESTIONS[0])).status_code == 500
    assert client.post(URL, json=ask(QUESTIONS[0])).status_code == 200
    assert service.batcher.pending == 0


def test_a_bad_row_leaves_its_batch_alone(service, loaded):
    """Jobs of one batch: one too long, one cancelled, two as if alone."""
    model, processor = loaded
    found: dict[int, list] = {}
    lone = [vfjax.text.prompts.tokenize(processor.tokenizer, processor.chat(q)) for q in QUESTIONS]
    jobs = []
    for i, ids in enumerate([lone[0], [5] * 600, lone[1], lone[2]]):
        found[i] = []
        pictures = [] if i == 1 else [picture(i)]
        jobs.append(Job(ids, pictures, found[i].append, max_new_tokens=8, cancelled=i == 3))
    for job in jobs:
        service.batcher.submit(job)
    wait_for(lambda: service.batcher.pending == 0)
    assert isinstance(found[1][-1], vfjax.InputError)
    assert found[3] == []
    for i, question in ((0, QUESTIONS[0]), (2, QUESTIONS[1])):
        text = "".join(piece.text for piece in found[i])
        assert text == direct(loaded, question, picture(i), max_new_tokens=8)


def test_fetching_is_for_named_hosts(tmp_path: Path):
    files = {"/a.png": b"picture", "/large": bytes(5000)}

    def answer(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection:
                    path = connection.recv(4096).split()[1].decode()
                    body = files.get(path)
                    if body is None:
                        head = (
                            b"HTTP/1.1 302 Found\r\nLocation: /a.png\r\nContent-Length: 0\r\n\r\n"
                        )
                    else:
                        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body)
                    connection.sendall(head + (body or b""))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=answer, args=(listener,), daemon=True).start()
        host = f"127.0.0.1:{listener.getsockname()[1]}"
        limits = Limits("clip", body=1000, hosts=(host,))
        assert fetch(f"http://{host}/a.png", "here", limits) == b"picture"
        for address, words in {
            f"http://{host}/large": "more than 1000 bytes",
            f"http://{host}/moved": "status 302",
            f"http://{host}.other/a.png": "an address at",
            f"http://{host}@other/a.png": "an address at",
            "http://127.0.0.1/a.png": "an address at",
            "http://[/a.png": "an address at",
        }.items():
            with pytest.raises(Refused, match=words):
                fetch(address, "here", limits)


def wait_for(true, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.05)


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
