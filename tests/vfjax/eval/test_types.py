"""Benchmarks' files with values of other types: a line that names the place, no traceback."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vfjax import InputError
from vfjax.eval import Data, digest, get_benchmark, read

FILES: dict[str, dict[str, Any]] = {
    "llava": {"questions.jsonl": [{"question_id": 1, "text": "t", "image": ["a.jpg"]}]},
    "mmvp": {
        "questions.jsonl": [
            {"index": 1, "question": "q", "options": "(a) x (b) y", "answer": "(a)", "image": "1"}
        ]
    },
    "scienceqa": {
        "problems.json": {
            "7": {"question": "q", "choices": ["a"], "answer": 0, "split": "test", "hint": "h"}
        }
    },
    "seed": {
        "SEED-Bench.json": {
            "question_type": {"Scene": 1},
            "questions": [
                {"question_id": 1, "question": "q", "answer": "A", "data_id": "a.jpg"}
                | {"choice_a": "x", "choice_b": "y", "question_type_id": 1, "data_type": "image"}
            ],
        }
    },
    "pope": {
        "coco_pope_random.json": [
            {"question_id": 1, "image": "a.jpg", "text": "t", "label": "yes", "category": "random"}
        ]
    },
    "vqav2": {
        "v2_OpenEnded_mscoco_questions.json": {
            "data_subtype": "val2014",
            "questions": [{"question_id": 1, "image_id": 7, "question": "Q"}],
        },
        "v2_mscoco_annotations.json": {
            "annotations": [
                {"question_id": 1, "answer_type": "other", "answers": [{"answer": "a"}]}
            ]
        },
    },
    "textvqa": {
        "TextVQA_0_val.json": {
            "data": [{"question_id": 1, "image_id": "x", "question": "q", "answers": ["a"]}]
        }
    },
    "vizwiz": {"val.json": [{"image": "a.jpg", "question": "q", "answers": [{"answer": "a"}]}]},
    "gqa": {
        "testdev_balanced_questions.json": {"1": {"question": "q", "imageId": 3, "answer": "a"}}
    },
    "refcoco": {
        "refcoco.json": [
            {"img_id": "a_1_0", "sents": "a", "bbox": [1, 2, 3, 4], "width": 3, "height": 4}
        ]
    },
    "captions": {
        "captions_val2014.json": {
            "images": [{"id": 1, "file_name": "a.jpg"}],
            "annotations": [{"image_id": 1, "caption": "c"}],
        }
    },
    "captions of Karpathy's": {
        "dataset_coco.json": {
            "images": [
                {"filename": "a.jpg", "sentences": [{"raw": "c"}], "split": "test", "cocoid": 3}
            ]
        }
    },
    "msvd": {
        "test_q.json": [{"question_id": "v_1", "question": "q", "video_name": "v"}],
        "test_a.json": [{"question_id": "v_1", "answer": "a"}],
    },
    "mmvet": {
        "mm-vet.json": {
            "1": {"imagename": "a.jpg", "question": "q", "answer": "a", "capability": ["ocr"]}
        }
    },
    "llava_wild": {
        "questions.jsonl": [{"question_id": 1, "text": "t", "image": "a.jpg", "category": "conv"}],
        "context.jsonl": [{"image": "a.jpg", "caption": "c"}],
        "answers_gpt4.jsonl": [{"question_id": 1, "text": "x"}],
    },
    "mathvista": {
        "testmini.json": {
            "1": {"image": "images/1.jpg", "query": "", "answer": "1", "precision": 1.0}
            | {"question_type": "multi_choice", "answer_type": "text", "choices": ["a"]}
        },
        "query.json": {"1": "q"},
    },
}
VALUES = (None, -1, 1.5, "x", "", [], {}, True, [1], {"a": 1}, [None], 10**30)


def places(value: Any, *at: Any) -> Iterator[tuple[Any, ...]]:
    """Of a value and all that is in it."""
    yield at
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], *at, key)


def changed(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    """A copy with another value at a place; without it, if that is `...`."""
    if not at:
        return new
    out = copy.deepcopy(value)
    inner = out
    for key in at[:-1]:
        inner = inner[key]
    if new is ...:
        del inner[at[-1]]
    else:
        inner[at[-1]] = new
    return out


@pytest.mark.parametrize("name", FILES)
def test_values_of_other_types(tmp_path: Path, name: str) -> None:
    benchmark = get_benchmark(name.split()[0])

    def write(file: str, value: Any) -> None:
        lines = file.endswith("jsonl") and isinstance(value, list)
        text = "\n".join(map(json.dumps, value)) if lines else json.dumps(value)
        (tmp_path / file).write_text(text)

    def check() -> None:
        questions = read(benchmark, Data(tmp_path), dict(benchmark.options), None)
        digest(questions)
        for one in questions:
            kinds = one.extra.get("kind", ""), *one.extra.get("kinds", ())
            words = (one.id, one.prompt, one.cluster, *one.answers, *kinds)
            assert all(isinstance(each, str) for each in words)

    for file, value in FILES[name].items():
        write(file, value)
    check()
    refused = 0
    for file, value in FILES[name].items():
        for at in places(value):
            for new in (*VALUES, *([...] if at else [])):
                write(file, changed(value, at, new))
                try:
                    check()
                except InputError as error:
                    assert "\n" not in str(error)
                    refused += 1
        write(file, value)
    assert refused
