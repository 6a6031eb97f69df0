"""Conversation files: what is read, and what users get wrong, named before training starts."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from vfjax.data import Conversations, Sample
from vfjax.errors import InputError


def talk(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": message} for i, message in enumerate(texts)]


GOOD = {"id": "a", "image": "x/1.png", "conversations": talk("<image>\nWhat?", "A cat.")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures 1.png and x/1.png, and one outside the folder of pictures."""
    (tmp_path / "images/x").mkdir(parents=True)
    for name in ("images/1.png", "images/x/1.png", "out.png"):
        Image.new("RGB", (3, 2)).save(tmp_path / name)
    return tmp_path


def write(folder: Path, rows: object, name: str = "data.json") -> Path:
    path = folder / name
    if name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_rows(folder: Path, name: str):
    rows = [
        GOOD,
        {"conversations": talk("Why?", "Because\u2028so.", "And?", "No."), "model": "someone"},
        {
            "id": 7,
            "image": ["1.png", "./x/../x/1.png"],
            "conversations": talk("<image> and <image>?", "Cats."),
        },
        {"id": "none", "image": None, "conversations": talk("Hi", "Ho")},
    ]
    data = Conversations(write(folder, rows, name), folder / "images")
    images = folder / "images"
    assert [data[i] for i in range(len(data))] == [
        Sample("a", (images / "x/1.png",), (("<image>\nWhat?", "A cat."),)),
        Sample("1", (), (("Why?", "Because\u2028so."), ("And?", "No."))),
        Sample(
            "7", (images / "1.png", images / "x/../x/1.png"), (("<image> and <image>?", "Cats."),)
        ),
        Sample("none", (), (("Hi", "Ho"),)),
    ]
    assert data.pictures.tolist() == [1, 0, 2, 0]
    assert data.characters.tolist() == [19, 22, 25, 4]
    assert data.broken == []
    assert data.where(2) == f"{folder / name} row 2 (id 7)"


def row(**changes) -> dict:
    return {key: value for key, value in {**GOOD, **changes}.items() if value != "absent"}


def messages(*pairs: tuple[str, object]) -> dict:
    return row(image=None, conversations=[{"from": who, "value": text} for who, text in pairs])


BAD_ROWS = {
    "not an object": ([1], "row 1: found [1], expected the keys id, image"),
    "other keys": ({"id": 1, "messages": []}, "row 1: found keys id, messages, expected the keys"),
    "no conversations": (row(conversations=[]), "row 1 (id a): found conversations [], expected"),
    "conversations of text": (row(conversations="x"), "row 1 (id a): found conversations 'x'"),
    "a message of text": (row(conversations=["hi"]), "row 1 (id a) message 0: found 'hi'"),
    "no value": (
        row(conversations=[{"from": "human", "text": "q"}]),
        "row 1 (id a) message 0: found {'from': 'human', 'text': 'q'}, expected",
    ),
    "gpt first, twice": (
        messages(("gpt", "a"), ("gpt", "a"), ("human", "q"), ("gpt", "a")),
        "row 1 (id a) message 1: found from 'gpt', expected from 'human'",
    ),
    "gpt alone": (messages(("gpt", "a")), "row 1 (id a) message 0: found from 'gpt', expected"),
    "two questions": (
        messages(("human", "q"), ("human", "q")),
        "row 1 (id a) message 1: found from 'human', expected from 'gpt'",
    ),
    "system": (messages(("system", "q")), "row 1 (id a) message 0: found from 'system'"),
    "unanswered": (
        messages(("human", "q"), ("gpt", "a"), ("human", "q")),
        "row 1 (id a): found a last question without answer",
    ),
    "an empty answer": (
        messages(("human", "q"), ("gpt", "")),
        "row 1 (id a) message 1: found an empty value, expected text",
    ),
    "half a character": (
        messages(("human", "q \ud800"), ("gpt", "a")),
        "row 1 (id a) message 0: found half a character",
    ),
    "a picture in an answer": (
        row(conversations=talk("What?", "<image>")),
        "row 1 (id a) message 1: found <image> in an answer",
    ),
    "no placeholder": (
        row(conversations=talk("What?", "A cat.")),
        "row 1 (id a): found 0 <image> placeholders for 1 picture",
    ),
    "no picture": (
        row(image="absent"),
        "row 1 (id a): found 1 <image> placeholder for 0 pictures",
    ),
    "too many pictures": (
        row(image=["1.png", "1.png"]),
        "row 1 (id a): found 1 <image> placeholder for 2 pictures",
    ),
    "a number as picture": (row(image=5), "row 1 (id a): found image 5, expected a name or"),
    "numbers as pictures": (row(image=[5]), "row 1 (id a): found image [5], expected a name or"),
    "an empty name": (row(image=""), "row 1 (id a): found image '', expected a name inside"),
    "an absolute name": (row(image="/etc/hosts"), "row 1 (id a): found image '/etc/hosts', expec"),
    "a name outside": (
        row(image="x/../../out.png"),
        "row 1 (id a): found image 'x/../../out.png', expected a name inside",
    ),
    "no such picture": (
        row(image="x/2.png"),
        "row 1 (id a): found image 'x/2.png', but no such file",
    ),
    "no such folder": (row(image="y/1.png"), "row 1 (id a): found image 'y/1.png', but no such"),
    "a folder": (row(image="x"), "row 1 (id a): found image 'x', but no such file"),
    "no such video": (
        row(image=None, video="v.mp4", conversations=talk("<video>\nWhat happens?", "Rain.")),
        "row 1 (id a): found video 'v.mp4', but no such file, expected",
    ),
    "a video without placeholder": (
        row(image=None, video="1.png", conversations=talk("What happens?", "Rain.")),
        "row 1 (id a): found 0 <video> placeholders for 1 video",
    ),
    "a placeholder of a video": (
        row(image=None, conversations=talk("<video>\nWhat happens?", "Rain.")),
        "row 1 (id a): found '<video>' in a question, expected <image> for a picture",
    ),
    "a placeholder of a sound": (
        row(image=None, conversations=talk("What is said? <audio>", "Hi.")),
        "row 1 (id a): found '<audio>' in a question",
    ),
    "a numbered placeholder": (
        row(image=None, conversations=talk("What does <image_1> show?", "Rain.")),
        "row 1 (id a): found '<image_1>' in a question",
    ),
    "other codes' placeholder": (
        row(image=None, conversations=talk("What is in <|image|>?", "Rain.")),
        "row 1 (id a): found '<|image|>' in a question",
    ),
    "another key": (
        row(image=None, images=["1.png"], conversations=talk("What?", "Rain.")),
        "row 1 (id a): found 'images' ['1.png']: a medium that is not read, expected the keys",
    ),
    "a part of a video": (
        row(image=None, video="v.mp4", start_time=3, conversations=talk("<video>What?", "Rain.")),
        "row 1 (id a): found 'start_time' 3: a part of the video, which is read whole",
    ),
    "a sound": (row(audio="a.wav"), "row 1 (id a): found 'audio' 'a.wav': a medium"),
    "a path": (row(image_path="1.png"), "row 1 (id a): found 'image_path' '1.png': a medium"),
    "a file": (row(where=["b/2.jpg"]), "row 1 (id a): found 'where' ['b/2.jpg']: a medium"),
    "a system text": (row(system="Be kind."), "row 1 (id a): found 'system' 'Be kind.': what is"),
    "a weight": (row(weight=0.5), "row 1 (id a): found 'weight' 0.5: what is to be learnt"),
    "a key of a message": (
        row(conversations=[{**GOOD["conversations"][0], "image": "1.png"}]),
        "row 1 (id a) message 0: found 'image' '1.png': a medium that is not read",
    ),
    "a zero byte": (row(image="x\0/1.png"), "row 1 (id a): found image 'x\\x00/1.png', but no"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows(folder: Path, name: str):
    """Each is one line; or dropped, counted and named by the same line."""
    bad, message = BAD_ROWS[name]
    path = write(folder, [GOOD, bad, row(id="last")])
    with pytest.raises(InputError) as error:
        Conversations(path, folder / "images")
    assert str(error.value).startswith(f"{path} {message}")
    assert "\n" not in str(error.value)
    data = Conversations(path, folder / "images", skip_broken=True)
    assert data.broken == [str(error.value)]
    assert [data[i].id for i in range(len(data))] == ["a", "last"]
    assert data.where(1) == f"{path} row 2 (id last)"


GOOD_ROWS = {
    "gpt first": [("gpt", "Hello."), ("human", "<image>\nWhat?"), ("gpt", "A cat.")],
    "system first": [("system", "Be kind."), ("human", "<image>\nWhat?"), ("gpt", "A cat.")],
}


@pytest.mark.parametrize("name", GOOD_ROWS)
def test_a_first_message_of_another(folder: Path, name: str):
    """It is left out, and the rest of the row is read, as by LLaVA's preprocess_v1."""
    turns = [{"from": who, "value": words} for who, words in GOOD_ROWS[name]]
    data = Conversations(write(folder, [GOOD, row(conversations=turns)]), folder / "images")
    assert data[1].turns == (("<image>\nWhat?", "A cat."),)
    assert data.openings == 1


def test_notes_and_words_are_no_media(folder: Path):
    """Keys of published data sets that say nothing about the training, and HTML."""
    notes = {
        "source": "web", "model": "someone", "data_source": "x/y", "width": 3, "height": 2,
        "image_size": [3, 2], "task": "vqa", "metadata": {"a": 1}, "system": "", "images": [],
    }  # fmt: skip
    html = "Why does my page\n<video>\n<source src='a.mp4'>\n</video>\nnot play?"
    words = talk("How do I use the <video> tag?", "With <audio>\nalike.", html, "<video>")
    rows = [row(**notes), row(image=None, conversations=words)]
    data = Conversations(write(folder, rows), folder / "images")
    assert [len(data[i].pictures) for i in range(2)] == [1, 0]
    assert data[1].turns[1][0] == html


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_a_byte_order_mark(folder: Path, name: str):
    path = write(folder, [GOOD], name)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(Conversations(path, folder / "images")) == 1


def test_videos(folder: Path):
    """At `<video>`, in the order of the text; at `<image>` if the row has no picture."""
    images = folder / "images"
    for name in ("a.mp4", "b.mp4"):
        (images / name).write_bytes(b"-")
    rows = [
        row(video="a.mp4", conversations=talk("<video> and <image>?", "Rain.")),
        row(image="absent", video=["b.mp4"], conversations=talk("<image>\nWhat?", "Sun.")),
    ]
    data = Conversations(write(folder, rows), images)
    assert [data[i] for i in range(2)] == [
        Sample(
            "a",
            (images / "a.mp4", images / "x/1.png"),
            (("<image> and <image>?", "Rain."),),
            frozenset({0}),
        ),
        Sample("a", (images / "b.mp4",), (("<image>\nWhat?", "Sun."),), frozenset({0})),
    ]
    assert data.videos.tolist() == [True, True]


BAD_FILES = {
    "no JSON": ("data.json", '[{"id": ', "data.json: found no JSON (Expecting value: line 1"),
    "no UTF-8": ("data.json", "\udcff", "data.json: found no JSON ('utf-8' codec"),
    "nested too deep": ("data.json", "[" * 100_000, "data.json: found no JSON ("),
    "an object": ("data.json", "{}", "data.json: found a JSON dict, expected a list of rows"),
    "no rows": ("data.json", "[]", "data.json: found no usable row (0 broken), expected at least"),
    "an empty file": ("data.jsonl", "\n", "data.jsonl: found no usable row (0 broken)"),
    "a bad line": ("data.jsonl", '{"conversations"\n', "data.jsonl line 1: found no JSON"),
}


@pytest.mark.parametrize("name", BAD_FILES)
@pytest.mark.parametrize("skip", [True, False])
def test_bad_files(folder: Path, name: str, skip: bool):
    file, text, message = BAD_FILES[name]
    (folder / file).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError) as error:
        Conversations(folder / file, folder / "images", skip_broken=skip)
    assert str(error.value).startswith(f"{folder}/{message}")
    assert "\n" not in str(error.value)


def test_missing_file_and_folder(folder: Path):
    with pytest.raises(InputError, match=r"no.json: found No such file .* a conversation file"):
        Conversations(folder / "no.json", folder / "images")
    with pytest.raises(InputError, match="no: found no such folder, expected the pictures' folder"):
        Conversations(write(folder, [GOOD]), folder / "no")


def test_all_rows_broken(folder: Path):
    path = write(folder, [row(image="no.png")] * 3)
    with pytest.raises(InputError, match=r"no usable row \(3 broken\).* such as .* row 0 \(id a\)"):
        Conversations(path, folder / "images", skip_broken=True)


def test_a_folder_is_listed_once(folder: Path, monkeypatch):
    """No call of the system for each picture: there are hundreds of thousands."""
    listed, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(Path(path)) or scandir(path))
    rows = [row(image=name) for name in ("1.png", "x/1.png", "x/2.png") * 20]
    data = Conversations(write(folder, rows), folder / "images", skip_broken=True)
    assert (len(data), len(data.broken)) == (40, 20)
    assert sorted(listed) == [folder / "images", folder / "images/x"]
