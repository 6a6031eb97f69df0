"""What clients send: OpenAI's own, VLMEvalKit's (August 2026) and lmms-eval's (0.7.3)."""

import base64
import io

import pytest
from PIL import Image

from tests.experiments.serving import QUESTIONS, URL, data, direct, picture

openai = pytest.importorskip("openai")

QUESTION = QUESTIONS[0]
JPEG, PNG = data(picture(7), "JPEG"), data(picture(7))
TEXT, EMPTY = {"type": "text", "text": QUESTION}, {"type": "text", "text": ""}
SYSTEM = "one word"


def image(url: str, **more: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def user(*parts: dict) -> list[dict]:
    return [{"role": "user", "content": list(parts)}]


def told(content: str | list) -> list[dict]:
    return [{"role": "system", "content": content}]


VLMEVALKIT = {
    "defaults": {"messages": user(image(JPEG), TEXT), "n": 1, "max_tokens": 32768},
    "streamed": {"messages": user(image(JPEG), TEXT), "n": 1, "max_tokens": 32768, "stream": True},
    "an empty text": {"messages": user(EMPTY, image(JPEG), TEXT), "n": 1, "max_tokens": 32768},
    "every option": {
        **{"messages": user(image(JPEG), TEXT), "n": 1, "max_tokens": 32768},
        **{"temperature": 0.7, "top_k": 1, "top_p": 0.8, "repetition_penalty": 1.3},
    },
    "GPT4V": {
        "messages": told(SYSTEM) + user(image(JPEG, detail="low"), TEXT),
        "max_tokens": 2048,
    },
}
LMMS_EVAL = {
    "chat": {"messages": told([{"type": "text", "text": SYSTEM}]) + user(image(PNG), TEXT)},
    "simple": {"messages": user(TEXT, image(PNG)), "max_tokens": 1024},
    "every option": {
        **{"messages": user(TEXT, image(PNG)), "top_p": 0.9, "seed": 3, "n": 1, "max_tokens": 1024},
        **{"presence_penalty": 0, "frequency_penalty": 0.0},
        "extra_body": {"chat_template_kwargs": {"enable_thinking": False}},
    },
    "of the o series": {
        **{"messages": user(TEXT, image(PNG)), "max_completion_tokens": 1024},
        **{"response_format": {"type": "text"}, "reasoning_effort": "medium"},
    },
}


def answer(loaded: tuple, sent: dict) -> str:
    """What `generate` writes."""
    *before, asked = sent["messages"]
    (url,) = [part["image_url"]["url"] for part in asked["content"] if "image_url" in part]
    seen = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    text = f"{SYSTEM}\n\n{QUESTION}" if before else QUESTION
    text = f"\n{text}" if EMPTY in asked["content"] else text
    penalty = sent.get("repetition_penalty")
    found = direct(loaded, text, seen, max_new_tokens=64, repetition_penalty=penalty)
    assert found
    return found


@pytest.mark.parametrize("name", VLMEVALKIT)
def test_vlmevalkit(client, loaded, name: str):
    """Its LMDeployAPI, which `run.py --base-url` makes, and its GPT4V."""
    sent = {"model": "clip", "temperature": 0.0} | VLMEVALKIT[name]
    found = client.post(URL, json=sent, headers={"Authorization": "Bearer sk-admin"})
    assert found.status_code == 200, found.text
    if "stream" not in sent:
        assert found.json()["choices"][0]["message"]["content"] == answer(loaded, sent)
        return
    lines = [line[5:].strip() for line in found.text.splitlines() if line.startswith("data:")]
    assert lines[-1] == "[DONE]"
    chunks = [openai.types.chat.ChatCompletionChunk.model_validate_json(x) for x in lines[:-1]]
    assert "".join(x.choices[0].delta.content or "" for x in chunks) == answer(loaded, sent)


@pytest.fixture(scope="module")
def api(client):
    return openai.OpenAI(
        base_url="http://testserver/v1", api_key="x", http_client=client, max_retries=0
    )


@pytest.mark.parametrize("name", LMMS_EVAL)
def test_lmms_eval(api, loaded, name: str):
    """Its models `openai` and `async_openai`, by OpenAI's client."""
    sent = {"model": "clip", "temperature": 0} | LMMS_EVAL[name]
    found = api.chat.completions.create(**sent)
    assert found.choices[0].message.content == answer(loaded, sent)
    assert found.usage.completion_tokens > 0


def test_openais_client(api, service):
    """Models, a stream with its usage, and errors of the client's own classes."""
    assert [model.id for model in api.models.list()] == ["clip"]
    asked = {"model": "clip", "messages": user(image(PNG), TEXT), "temperature": 0}
    whole = api.chat.completions.create(**asked)
    with api.chat.completions.stream(**asked, stream_options={"include_usage": True}) as events:
        final = events.get_final_completion()
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.usage == whole.usage
    raw = api.chat.completions.with_raw_response.create(**asked, reasoning_effort="low")
    assert raw.headers["x-ignored"] == "reasoning_effort"
    for wrong, error in (
        ({"model": "other"}, openai.NotFoundError),
        ({"tools": [{"type": "function", "function": {"name": "a"}}]}, openai.BadRequestError),
        ({"messages": user({"type": "input_audio"})}, openai.BadRequestError),
    ):
        with pytest.raises(error, match="expected"):
            api.chat.completions.create(**asked | wrong)
    service.reading += service.queue
    try:
        with pytest.raises(openai.RateLimitError, match="in the house"):
            api.chat.completions.create(**asked)
    finally:
        service.reading -= service.queue
