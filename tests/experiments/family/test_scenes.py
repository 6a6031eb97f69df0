"""The family's scenes, captions and tokenizer: what training and scoring rely on."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import sklearn.datasets
import transformers
from PIL import Image

from experiments.family import language, scenes
from vfjax.data import Conversations
from vfjax.text.labels import labels
from vfjax.text.prompts import get_template

COUNT = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("family") / "test"
    scenes.write(out, "test", COUNT, seed=3, turns=4)
    return out


def photographs() -> list[np.ndarray]:
    names = ("astronaut", "coffee", "chelsea", "rocket", "grass", "brick", "gravel")
    found = [np.asarray(getattr(skimage.data, name)()) for name in names]
    found += [sklearn.datasets.load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    return [p if p.ndim == 3 else np.stack([p] * 3, axis=-1) for p in found]


def read(folder: Path, name: str) -> list:
    return json.loads((folder / name).read_text())


def test_same_seed_same_scenes_and_other_seed_others() -> None:
    one, same, other = (scenes.sample("train", 8, seed) for seed in (0, 0, 1))
    assert (one.pictures == same.pictures).all() and (one.digits == same.digits).all()
    assert (one.digits != other.digits).any()


def test_splits_share_no_drawing_and_no_background() -> None:
    ranges = sorted(scenes.SPLITS.values())
    assert [first for first, _ in ranges[1:]] == [last for _, last in ranges[:-1]]
    regions = [scenes.photographs(split) for split in scenes.SPLITS]
    for left, upper, lower in zip(*regions, strict=True):
        whole = np.concatenate([left, np.concatenate([upper, lower])], axis=1)
        assert min(*upper.shape[:2], *lower.shape[:2]) >= 2 * scenes.SIZE
        assert whole.size == left.size + upper.size + lower.size  # they tile the photograph
        assert any((whole == photo).all() for photo in photographs() if photo.shape == whole.shape)


def test_scenes_have_two_to_five_digits_each_another() -> None:
    drawn = scenes.sample("validation", 100, 0)
    full = drawn.digits >= 0
    assert set(full.sum(axis=1)) == {2, 3, 4, 5}
    assert ((drawn.colours >= 0) == full).all()
    for row in drawn.digits:
        seen = row[row >= 0]
        assert len(set(seen)) == len(seen)


def test_a_digit_is_drawn_in_its_cell_and_its_colour() -> None:
    digits, colours = np.full((2, 6, 9), -1)
    digits[:, 5], colours[:, 5] = 8, np.arange(6)
    with_digit, without = (
        scenes.render(d, colours, "train", np.random.default_rng(0)).astype(float)
        for d in (digits, digits)
    )
    assert (with_digit == without).all()
    cell = with_digit[:, 16:32, 32:48].reshape(6, -1, 3)
    brightest = cell[np.arange(6), cell.max(axis=2).argmax(axis=1)]
    nearest = np.linalg.norm(brightest[:, None] / 255 - scenes.RGB[None], axis=2).argmin(axis=1)
    assert (nearest == np.arange(6)).all()


@pytest.mark.parametrize("kind", scenes.KINDS)
def test_answers_follow_from_the_scene(kind: str) -> None:
    digits = [3, -1, -1, -1, 7, -1, -1, 0, -1]
    colours = [0, -1, -1, -1, 0, -1, -1, 2, -1]
    where = {"3": "top-left", "7": "centre", "0": "bottom", "blue": "bottom"}
    colour = {"3": "red", "7": "red", "0": "blue"}
    many = {"digits": "three", "red": "two", "blue": "one"}
    draw, yes = random.Random(0), 0
    for _ in range(200):
        question, answer = scenes.ask(kind, digits, colours, draw)
        match question.split():
            case ["where", "is", word, "?"]:
                assert where[word] == answer
            case ["what", "digit", "is", word, "?"]:
                assert (word, answer) == ("blue", "0")
            case ["what", "colour", "is", word, "?"]:
                assert colour[word] == answer
            case ["how", "many", word, "?"]:
                assert many.get(word, "zero") == answer
            case ["is", "there", word, "?"]:
                there = word in colour or word in colour.values()
                assert answer == ("yes" if there else "no")
                yes += there
            case ["which", "is", word, "?"]:
                assert answer == {"largest": "7", "smallest": "0"}[word]
            case _:
                pytest.fail(question)
    assert kind != "exist" or 60 < yes < 140


def test_without_a_lone_colour_other_questions_are_asked() -> None:
    digits, colours = [4, 5] + [-1] * 7, [1, 1] + [-1] * 7
    draw = random.Random(0)
    assert scenes.ask("loccol", digits, colours, draw)[0].split()[2] in "45"
    assert scenes.ask("ocr", digits, colours, draw)[0].startswith("which is")


def test_unknown_kind_is_an_error() -> None:
    with pytest.raises(ValueError, match="taste"):
        scenes.ask("taste", [1] + [-1] * 8, [1] + [-1] * 8, random.Random(0))


def test_written_scenes_are_read_as_conversations(folder: Path) -> None:
    rows = Conversations(folder / "rows.json", folder / "images")
    assert len(rows) == COUNT and not rows.broken
    drawn = scenes.sample("test", COUNT, 3)
    for i, label in enumerate(read(folder, "scenes.json")):
        assert label["digits"] == drawn.digits[i].tolist()
        assert set(label["questions"]) == set(scenes.KINDS)
        assert (
            np.asarray(Image.open(folder / "images" / label["image"])) == drawn.pictures[i]
        ).all()
    assert all(len(rows[i].turns) == 4 for i in range(COUNT))


def test_writing_twice_is_an_error(folder: Path) -> None:
    with pytest.raises(FileExistsError):
        scenes.write(folder, "test", 1, seed=0)


def test_a_caption_names_each_patch() -> None:
    digits, colours = np.full((2, 1, 9), -1)
    digits[0, 4], colours[0, 4] = 7, 2
    whole, blind = (
        [language.WORDS[i] for i in language.caption(digits, colours, see=see)[0]]
        for see in ((True, True), (True, False))
    )
    assert [whole[i] for i in (14, 15, 20, 21)] == ["blue", "centre", "7", "centre"]
    assert [blind[i] for i in (14, 15, 20, 21)] == ["blue", "centre", "?", "centre"]
    assert whole.count(",") == 32


def test_corpus_weighs_answers_and_its_questions_can_be_answered() -> None:
    ids, weights = language.corpus(60, 0)
    assert ids.shape == weights.shape == (60, language.LENGTH)
    words = np.array(language.WORDS)[ids]
    again, same = language.corpus(60, 0)
    assert (ids == again).all() and (weights == same).all()
    assert (words[:, 0] == "<s>").all() and (words[:, 1] == "[INST]").all()
    assert set(words[weights == 1]).isdisjoint({"?", "[INST]", "where", "</s>"})
    for row in words:
        grid, rest = row[2:38].tolist(), row[38:].tolist()
        if "?" in grid and rest[0] in ("where", "what", "how", "is", "which", "list"):
            hidden = scenes.COLOURS if grid[grid.index("?") // 6 * 6] == "?" else ()
            assert set(rest).isdisjoint(hidden if set(grid) & set("0123456789") else ())


def test_tokenizer_agrees_with_the_corpus(tmp_path: Path) -> None:
    language.write_tokenizer(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    turns = [("<image>\nwhere is 3 ?", "top-left"), ("is there red ?", "yes")]
    ids, targets = labels(tokenizer, get_template(language.TEMPLATE), turns)
    text = "<s> [INST] <image> where is 3 ? [/INST] top-left </s> [INST] is there red ? [/INST] yes"
    assert ids == [
        -200 if word == "<image>" else language.IDS[word] for word in [*text.split(), "</s>"]
    ]
    answers = [language.WORDS[i] for i in targets if i >= 0]
    assert answers == ["top-left", "</s>", "yes", "</s>"]
    assert tokenizer.unk_token_id not in ids
