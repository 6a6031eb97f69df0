"""Captions by pycocoevalcap."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from vfjax import InputError
from vfjax.eval import Data, Question, get_benchmark, read
from vfjax.eval.captions import score_captions

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="the tokenizer needs Java")

CAPTIONS = (
    "a cat sits on the sofa",
    "two dogs run across a field",
    "a man rides a red bicycle in town",
    "some boats lie in the harbour at night",
)


OPTIONS = {"split": "test", "meteor": False}


class Meteor:
    def compute_score(self, right: dict, said: dict) -> tuple[float, list[float]]:
        assert right["1"] == [CAPTIONS[1]] and said["0"] == ["nothing"]
        return 0.25, [0.0, 0.5, 0.25, 0.25]


def questions() -> list[Question]:
    return [Question(str(i), "?", answers=(c,)) for i, c in enumerate(CAPTIONS)]


@needs_java
def test_scores_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pycocoevalcap")
    texts = [f"{text.capitalize()}." for text in CAPTIONS]  # the tokenizer undoes both
    exact = score_captions(questions(), texts, OPTIONS)
    assert exact["CIDEr"].value == pytest.approx(1000)  # 10 is the most of CIDEr-D, times 100
    assert exact["BLEU-4"].value == pytest.approx(100, abs=0.01)
    assert exact["ROUGE-L"].value == pytest.approx(100)
    assert not exact["BLEU-4"].terms and exact["CIDEr"].terms
    texts[0] = "nothing"
    with monkeypatch.context() as patch:  # METEOR itself takes half a minute to start
        patch.setattr("pycocoevalcap.meteor.meteor.Meteor", Meteor)
        three = score_captions(questions(), texts, OPTIONS | {"meteor": True})
    assert three["CIDEr"].value == pytest.approx(750)
    assert three["ROUGE-L"].value == pytest.approx(75)
    assert three["METEOR"].value == 25 and "METEOR" not in exact
    ((_, each, _),) = three["CIDEr"].terms
    np.testing.assert_allclose(each, [0, 10, 10, 10])


def test_published_files(tmp_path: Path) -> None:
    bench = get_benchmark("captions")
    rows = {
        "images": [{"id": 7, "file_name": "x.jpg"}, {"id": 8, "file_name": "y.jpg"}],
        "annotations": [{"image_id": 7, "caption": c} for c in ("one", "two")],
    }
    file = tmp_path / "captions_val2014.json"
    file.write_text(json.dumps(rows))
    (only,) = read(bench, Data(tmp_path), bench.options)
    assert only.answers == ("one", "two") and only.images == (tmp_path / "x.jpg",)
    rows["annotations"][0]["image_id"] = 9
    file.write_text(json.dumps(rows))
    with pytest.raises(InputError, match="caption of image 9"):
        read(bench, Data(tmp_path), bench.options)
    file.unlink()
    images = [
        {"filename": f"{split}.jpg", "split": split, "sentences": [{"raw": "A cat."}]}
        for split in ("train", "test")
    ]
    (tmp_path / "dataset_flickr30k.json").write_text(json.dumps({"images": images}))
    (only,) = read(bench, Data(tmp_path), bench.options)
    assert only.id == "test.jpg" and only.answers == ("A cat.",)
    assert only.prompt == "Provide a one-sentence caption for the provided image."


def test_without_java(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="found no java, expected Java on the PATH"):
        score_captions(questions(), list(CAPTIONS), OPTIONS)
