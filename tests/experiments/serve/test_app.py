"""The server: OpenAI's form, answers equal to `generate`'s, what is wrong refused in one line."""

import base64
import io
import json
import time

import pytest
from PIL import Image

import vfjax
from experiments.serve.batcher import Job
from tests.experiments.answers import events
from tests.experiments.pictures import black_png
from tests.experiments.serving import QUESTIONS, URL, ask, data, direct, part, picture


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
