"""What tests of the server share beside `serving`."""

import json

import httpx2


def events(answer: httpx2.Response) -> list[dict]:
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


FULL = {
    "role": "user", "name": "ann", "refusal": None, "tool_calls": [], "mood": "good",
    "content": ["where", {"type": "text", "text": "is the 3 ?", "cache_control": {}}],
}  # fmt: skip
