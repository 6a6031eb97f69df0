"""Answers on disk survive a kill at any byte."""

import json
import os
from pathlib import Path

import pytest

from vfjax import InputError
from vfjax.eval import log

HEADER = {"benchmark": "mmvp", "questions": "abc", "model": "m", "max_new_tokens": 8}


def written(path: Path, count: int, header: dict | None = None) -> Path:
    with log.Log(path, header or HEADER) as out:
        for i in range(count):
            out.write(str(i), f"text\n{i}")
    return path


def test_any_torn_end_is_cut_off_and_the_rest_goes_on(tmp_path: Path) -> None:
    whole = written(tmp_path / "whole.jsonl", 3).read_bytes()
    for size in range(len(whole) + 1):
        path = tmp_path / "torn.jsonl"
        path.write_bytes(whole[:size])
        known = log.read(path, HEADER)[1] if size else {}
        assert known == {str(i): f"text\n{i}" for i in range(len(known))}
        with log.Log(path, HEADER) as out:
            for i in range(len(known), 3):
                out.write(str(i), f"text\n{i}")
        assert path.read_bytes() == whole
    path.write_bytes(whole[: whole.rfind(b"{")] + b"\0" * 9 + b"\n")  # after a power cut
    with log.Log(path, HEADER) as out:
        out.write("2", "text\n2")
    assert path.read_bytes() == whole


def test_other_settings_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "predictions.jsonl", 1)
    for changed, words in (
        ({"max_new_tokens": 9}, "predictions of max_new_tokens 8, expected 9"),
        ({"questions": "x"}, "predictions of other questions, expected this benchmark's"),
        ({"template": "v1"}, "predictions of template None, expected 'v1'"),
    ):
        with pytest.raises(InputError, match=words):
            log.Log(path, {**HEADER, **changed})
        with pytest.raises(InputError, match=words):
            log.read_parts(tmp_path, {**HEADER, **changed})
    assert log.read(path, HEADER)[1] == {"0": "text\n0"}


def test_damage_and_duplicates_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "predictions.jsonl", 2)
    lines = path.read_text().splitlines()
    for line in ("{", "[" * 100_000, '{"id": [], "text": "x"}', '{"id": "1", "text": 5}', "\xff"):
        path.write_text("\n".join([lines[0], line, lines[2], ""]), "latin-1")
        with pytest.raises(InputError, match="jsonl line 2: found a damaged line"):
            log.read(path)
    path.write_text("\n".join([lines[0], lines[1], lines[1], ""]))
    with pytest.raises(InputError, match="line 3: found a second answer to 0"):
        log.read(path)
    path.write_text("\n".join(lines[1:] + [""]))
    with pytest.raises(InputError, match="line 1: found a damaged line"):
        log.read(path)
    with pytest.raises(InputError, match="nowhere.jsonl: found No such file"):
        log.read(tmp_path / "nowhere.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    for use in (log.read, lambda path: log.Log(path, HEADER)):
        with pytest.raises(InputError, match="pipe.jsonl: found no regular file"):
            use(tmp_path / "pipe.jsonl")


def test_parts_are_joined_in_order_and_removed(tmp_path: Path) -> None:
    for chunk, id in enumerate("ba"):
        with log.Log(log.part(tmp_path, chunk, 2), HEADER) as out:
            out.write(id, id.upper())
    texts = log.read_parts(tmp_path, HEADER)
    assert texts == {"a": "A", "b": "B"}
    out = log.join(tmp_path, HEADER, {id: texts[id] for id in "ab"})
    assert list(tmp_path.iterdir()) == [out]
    assert [json.loads(line) for line in out.read_text().splitlines()] == [
        HEADER,
        {"id": "a", "text": "A"},
        {"id": "b", "text": "B"},
    ]
    with log.Log(log.part(tmp_path, 0, 1), HEADER) as other:
        other.write("a", "another")
    with pytest.raises(InputError, match="another answer to a than in the other files"):
        log.read_parts(tmp_path, HEADER)
