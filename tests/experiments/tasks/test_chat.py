"""The chat page: answers equal to `generate`'s, attention drawn, what is wrong in one line."""

import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vfjax
from experiments.configs.chat import get_config
from experiments.tasks import chat
from experiments.tasks.common import FAMILY
from tests.experiments.pictures import black_png
from vfjax import InputError

QUESTION = "what digit is red ?"


@pytest.fixture(scope="module")
def config():
    return get_config()


@pytest.fixture(scope="module")
def speakers(config) -> list[chat.Speaker]:
    return [chat.speaker(config, name, str(FAMILY / name)) for name in ("clip", "dino")]


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> str:
    return chat.scenes(tmp_path_factory.mktemp("scenes"), count=1)[0][0]


def test_every_model_answers_as_generate_does(config, speakers, scene) -> None:
    found = list(chat.ask(config, speakers, scene, f" {QUESTION}\n"))
    assert [i for i, _, _ in found] == sorted(i for i, _, _ in found)
    for i, each in enumerate(speakers):
        *before, (_, text, seen) = [row for row in found if row[0] == i]
        batch = each.processor([scene], [each.processor.chat(QUESTION)])
        (expected,) = vfjax.generate(each.model, each.processor, batch, max_new_tokens=8)
        assert text == expected != ""
        assert all(expected.startswith(said) and not maps for _, said, maps in before)
        (one,) = seen
        assert one.picture.size == (chat.SIDE, chat.SIDE)
        assert 0 < one.share < 1


def test_maps_lie_where_the_attention_is(scene) -> None:
    picture = Image.open(scene).convert("RGB").resize((60, 30))
    boxes = np.array([[0, 0, 0.5, 1], [0.5, 0, 1, 1], [np.nan] * 4])
    shown = chat.overlay(picture, np.array([0.1, 0.6, 0.3]), boxes)
    assert shown.size == (chat.SIDE, chat.SIDE // 2)
    left, right = np.split(np.asarray(shown, int), 2, axis=1)
    assert (right[..., 0] - left[..., 0]).mean() > 50  # red is much
    assert chat.overlay(picture, np.ones(1), boxes[2:]) is None


SMALL = black_png(40)
WRONG = {
    "no picture": (None, QUESTION, "picture: found nothing"),
    "a file that is gone": (b"", QUESTION, "picture: found no picture"),
    "text": (b"hello", QUESTION, "picture: found no picture"),
    "half a picture": (black_png(2000)[:300], QUESTION, "picture: found"),
    "a bomb": (black_png(10_000), QUESTION, "found 10000x10000 pixels, expected at most 32000000"),
    "a program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", QUESTION, "no picture"),
    "no question": (SMALL, " \n", "question: found nothing"),
    "none at all": (SMALL, None, "question: found nothing"),
    "half a letter": (SMALL, "\ud800", "half of a surrogate pair"),
    "a long question": (
        SMALL,
        "red " * 600,
        "expected fewer than 512, the context of clip",
    ),
    "a book": (SMALL, "red " * 30_000, "found 119999 letters, expected at most 100000"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_in_one_line(config, speakers, tmp_path: Path, name: str) -> None:
    content, question, words = WRONG[name]
    path = tmp_path / "picture.png"
    if content:
        path.write_bytes(content)
    with pytest.raises(InputError, match=words) as error:
        next(chat.ask(config, speakers, None if content is None else str(path), question))
    assert "\n" not in str(error.value)


def test_an_absent_gradio_is_named(monkeypatch, tmp_path: Path, config) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(InputError, match=r"no gradio .* pip install gradio, and"):
        chat.run(config, tmp_path)


@pytest.fixture(scope="module")
def url(config, speakers):
    gradio = pytest.importorskip("gradio")
    import uvicorn

    from experiments.serve.server import address, listen

    app = chat.page(gradio, config, speakers, [])
    with listen("127.0.0.1", 0) as listener:
        server = uvicorn.Server(
            uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1)
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield address(listener)
        server.should_exit = True
        thread.join()


def test_the_page(url: str, scene: str, tmp_path: Path) -> None:
    """Through gradio's own client: an answer with its maps, a broken file."""
    client = pytest.importorskip("gradio_client")
    page = client.Client(url, verbose=False, download_files=tmp_path, analytics_enabled=False)

    def asked(path: Path) -> list[list]:
        """What each part of the page showed in turn."""
        job = page.submit(client.handle_file(str(path)), QUESTION, api_name="/ask")
        job.result()
        parts = zip(*job.outputs(), strict=True)
        return [[x for x in part if x != {"__type__": "update"}] for part in parts]

    note, clip, seen, dino, _ = asked(Path(scene))
    assert not any(shown["visible"] for shown in note)
    assert clip[-1] and dino[-1]
    assert Image.open(seen[-1]["value"]).size == (chat.SIDE, chat.SIDE)
    assert "% of attention" in seen[-1]["label"]
    (tmp_path / "broken.png").write_bytes(Path(scene).read_bytes()[:200])
    note, clip, *_ = asked(tmp_path / "broken.png")
    assert note[-1]["visible"] and note[-1]["value"].startswith("picture: found")
    assert not clip[-1]["value"]


def test_the_page_needs_nothing_from_elsewhere(url: str) -> None:
    import httpx2

    text = httpx2.get(f"{url}/").text
    assert 'analytics_enabled":false' in text
    loaded = [part.split('"')[1] for part in text.split(" src=")[1:] + text.split(" href=")[1:]]
    assert not [address for address in loaded if "//" in address]
