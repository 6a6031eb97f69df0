"""Loss masks against recordings of the four upstream code bases."""

import json
import warnings
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tests.vfjax.text.common import BASES, Letters, llama, template_of
from vfjax.errors import InputError
from vfjax.text.labels import labels
from vfjax.text.prompts import IGNORE, IMAGE_ID, TEMPLATES


@pytest.fixture(scope="module")
def rows(shared: Path) -> dict:
    return json.loads((shared / "golden" / "labels.json").read_text())["rows"]


@pytest.fixture(scope="module")
def tokenizers(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder, tmp = shared / "golden" / "tokenizers", tmp_path_factory.mktemp("tokenizers")
    found = {
        name: PreTrainedTokenizerFast(
            tokenizer_file=str(folder / f"{name}_tokenizer.json"), bos_token="<|begin_of_text|>"
        )
        for name in ("bpe", "bpe_no_bos")
    }
    for name, legacy in (("spm_legacy", True), ("spm_not_legacy", False)):
        found[name] = llama(folder / "spm_tiny.model", tmp / name, legacy=legacy)
    return found


@pytest.mark.parametrize("base", BASES)
def test_labels_equal_upstream(rows, tokenizers, base):
    for row in rows[base]:
        talk = [text for _, text in row["messages"]]
        turns = list(zip(talk[::2], talk[1::2], strict=True))
        template = template_of(base, row["template"])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ids, targets = labels(tokenizers[row["tokenizer"]], template, turns)
        where = (row["template"], row["tokenizer"], row["conversation"])
        assert ids == row["input_ids"], where
        assert targets == row["labels"], where
        warned = any("tokenization mismatch" in str(w.message) for w in caught)
        assert warned == ("upstream_warning" in row), where


@pytest.mark.parametrize("name", sorted({t.name for t in TEMPLATES.values() if t.trained_tail}))
def test_exactly_the_answers_are_trained(name):
    template = TEMPLATES[name]
    turns = [("<image>\nWhy?", "It rains.")]
    if template.tail is not None:
        turns.append(("And ASSISTANT: now?", "<|eot_id|> Still."))
    ids, targets = labels(Letters(template.auto_bos), template, turns)
    kept = "".join(chr(t) for t in targets if t != IGNORE)
    assert kept == "".join(f"{template.space}{a}{template.trained_tail}" for _, a in turns)
    assert all(t in (i, IGNORE) for i, t in zip(ids, targets, strict=True))


def test_tagged_pictures_in_training():
    ids, _ = labels(Letters(True), TEMPLATES["v1_mmtag"], [("Why?\n<image>", "So.")])
    text = "".join("@" if i == IMAGE_ID else chr(i) for i in ids)
    assert "USER: <Image>@</Image>\nWhy? ASSISTANT: So.</s>" in text


@pytest.mark.parametrize(
    ("name", "turns", "message"),
    [
        ("llava_v0", [("q", "a")], "training form"),
        ("v1", [("q", None)], "open turn"),
        ("v1", [("", "a")], "empty question"),
        ("v1", [("q", "")], "empty answer"),
        ("v1", [("q", "<image>")], "<image> in the answer"),
        ("plain", [("q", "a")], "one turn with <image>"),
        ("plain", [("<image>", "a"), ("q", "a")], "2 turns"),
    ],
)
def test_untrainable(name, turns, message):
    with pytest.raises(InputError, match=message):
        labels(Letters(True), TEMPLATES[name], turns)
