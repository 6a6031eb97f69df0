"""Batches: what stands where, and what users get wrong."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoTokenizer

from tests.checkpoints import tokenizer_files
from vfjax import InputError, Processor
from vfjax.architectures import Combine, Llava, MLPConfig, ProjectorConfig
from vfjax.llm import LlamaConfig
from vfjax.model import Batch, BranchConfig, ModelConfig
from vfjax.processor import LENGTHS
from vfjax.vision.encoders import CLIPConfig, DINOv2Config, SigLIPConfig
from vfjax.vision.images import ImageSpec, preprocess

VOCAB, CONTEXT = 320, 400
PICTURE = -200
HALF = (0.5, 0.5, 0.5)

ENCODERS = {
    "clip": CLIPConfig(patch=14, image_size=28),
    "siglip": SigLIPConfig(patch=4, image_size=12),
    "dinov2": DINOv2Config(patch=7, image_size=35, input_size=14, registers=2),
}
DROPS = {"clip": 1, "siglip": 0, "dinov2": 1}
TOKENS = {"clip": 4, "siglip": 9, "dinov2": 4 + 2}
"""Visual tokens of a picture; DINOv2 keeps its two registers here."""


def branch(name: str) -> BranchConfig:
    encoder = ENCODERS[name]
    size = getattr(encoder, "input_size", encoder.image_size)
    images = ImageSpec(size, size, "squash", "crop", HALF, HALF)
    connector = ProjectorConfig(MLPConfig(8, 8), Combine(drop=DROPS[name]))
    made = BranchConfig(name, Llava(encoder, connector, images))
    assert made.tokens == TOKENS[name]
    return made


def make(*names: str, **options) -> Processor:
    llm = LlamaConfig(VOCAB, 8, 1, 2, 2, 4, 8, CONTEXT)
    return Processor(ModelConfig(tuple(map(branch, names)), llm), **options)


def pictures(n: int) -> list[np.ndarray]:
    """Pictures that all differ."""
    return [np.full((6, 5, 3), 10 + i, np.uint8) for i in range(n)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer_files(folder)
    return AutoTokenizer.from_pretrained(folder)


IDS = st.one_of(st.integers(0, VOCAB - 1), st.just(PICTURE))
ROWS = st.lists(st.lists(IDS, min_size=1, max_size=9), min_size=1, max_size=4)
NAMES = st.lists(st.sampled_from(list(ENCODERS)), min_size=1, max_size=3, unique=True)
SIDES = st.sampled_from(["right", "left"])


@settings(max_examples=150)
@given(rows=ROWS, names=NAMES, padding=SIDES)
def test_splicing_inverts(rows: list[list[int]], names: list[str], padding: str):
    """The row comes back from the arrays, and every visual token of a real picture is used once."""
    places = sum(row.count(PICTURE) for row in rows)
    labels = [[7 if t == PICTURE else t if t % 3 else -100 for t in row] for row in rows]
    batch = make(*names)(pictures(places), input_ids=rows, labels=labels, padding=padding)
    b, t = batch.tokens.shape
    assert b == len(rows)
    assert {a.shape for a in (batch.visual, batch.mask, batch.labels)} == {(b, t)}
    n = len(batch.images[names[0]].given.pixels) if places else 0
    starts = np.cumsum([0, *(n * TOKENS[name] for name in names)])
    seen = 0
    for i, row in enumerate(rows):
        ids, where, learn = [], [], []
        for token, label in zip(row, labels[i], strict=True):
            if token != PICTURE:
                ids, where, learn = [*ids, token], [*where, -1], [*learn, label]
                continue
            for start, name in zip(starts, names, strict=False):
                first = start + seen * TOKENS[name]
                where += range(first, first + TOKENS[name])
            width = sum(TOKENS[name] for name in names)
            ids, learn = ids + [0] * width, learn + [-100] * width
            seen += 1
        real = batch.mask[i]
        assert real.sum() == len(ids)
        assert real[: len(ids)].all() if padding == "right" else real[t - len(ids) :].all()
        assert batch.tokens[i][real].tolist() == ids
        assert batch.visual[i][real].tolist() == where
        assert batch.labels[i][real].tolist() == learn
        assert not batch.tokens[i][~real].any()
        assert (batch.visual[i][~real] == -1).all() and (batch.labels[i][~real] == -100).all()
        text = real & (batch.visual[i] < 0)
        assert batch.tokens[i][text].tolist() == [token for token in row if token != PICTURE]
    used = batch.visual[batch.visual >= 0]
    expected = np.concatenate(
        [
            start + np.arange(places * TOKENS[name])
            for start, name in zip(starts, names, strict=False)
        ]
    )
    assert sorted(used.tolist()) == expected.tolist()


@given(rows=ROWS, names=NAMES)
def test_sides_of_padding_differ_in_nothing_else(rows: list[list[int]], names: list[str]):
    some = pictures(sum(row.count(PICTURE) for row in rows))
    right, left = (make(*names)(some, input_ids=rows, padding=side) for side in ("right", "left"))
    for i in range(len(rows)):
        for name in ("tokens", "visual"):
            a, b = (getattr(x, name)[i][x.mask[i]] for x in (right, left))
            np.testing.assert_array_equal(a, b)
    assert right.images.keys() == left.images.keys()


def test_arrays_have_the_documented_types():
    batch = make("clip")(pictures(3), input_ids=[[5, PICTURE, PICTURE, PICTURE]], labels=[[5] * 4])
    assert isinstance(batch, Batch)
    kinds = {
        name: getattr(batch, name).dtype.name for name in ("tokens", "visual", "mask", "labels")
    }
    assert kinds == {"tokens": "int32", "visual": "int32", "mask": "bool", "labels": "int32"}
    assert batch.images["clip"].given.pixels.dtype == np.float32
    assert make("clip")(input_ids=[[5]]).labels is None


def test_each_branch_sees_the_pictures_in_order_then_black():
    some = pictures(3)
    rows = [[5, PICTURE], [6], [PICTURE, PICTURE]]
    processor = make("dinov2", "clip")
    batch = processor(some, input_ids=rows)
    for config in processor.config.branches:
        found = batch.images[config.name].given.pixels
        assert found.shape == (
            4,
            config.architecture.images.size,
            config.architecture.images.size,
            3,
        )
        for view, picture in zip(found, some, strict=False):
            np.testing.assert_array_equal(view, preprocess(picture, config.architecture.images))
        assert not found[3].any()
    by_row = processor([[some[0]], [], some[1:]], input_ids=rows)
    np.testing.assert_array_equal(by_row.visual, batch.visual)
    np.testing.assert_array_equal(
        by_row.images["clip"].given.pixels, batch.images["clip"].given.pixels
    )


def test_pictures_of_every_kind(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    path = tmp_path / "a.png"
    kinds = [array, Image.fromarray(array), path, str(path)]
    batch = make("clip")(kinds, input_ids=[[PICTURE] * 4])
    for view in batch.images["clip"].given.pixels:
        np.testing.assert_array_equal(view, batch.images["clip"].given.pixels[0])


@pytest.mark.parametrize("rows", [[[5, 6]], [[5], [6, 7]]])
@pytest.mark.parametrize("images", [None, [], "a list a row"])
def test_no_pictures(rows: list[list[int]], images):
    if images == "a list a row":
        images = [[] for _ in rows]
    batch = make("clip", "dinov2")(images, input_ids=rows)
    assert batch.images == {}
    assert (batch.visual == -1).all()


@pytest.mark.parametrize(
    ("longest", "expected"),
    [(1, 8), (8, 8), (9, 16), (17, 100), (100, 100), (101, 128), (129, CONTEXT), (400, CONTEXT)],
)
def test_lengths_are_buckets(longest: int, expected: int):
    processor = make("clip", lengths=(8, 100, 16, 128))
    assert processor(input_ids=[[5], [5] * longest]).tokens.shape == (2, expected)


def test_default_lengths():
    steps = np.array(LENGTHS)
    assert steps[0] == 64
    assert (steps[1:] / steps[:-1]).max() <= 1.25
    assert (np.diff(steps) > 0).all()
    assert make("clip")(input_ids=[[5] * 65]).tokens.shape == (1, 80)
    assert make("clip")(input_ids=[[5] * 385]).tokens.shape == (1, CONTEXT)  # not 512


@pytest.mark.parametrize(("count", "expected"), [(1, 1), (2, 2), (3, 4), (5, 8), (8, 8)])
def test_numbers_of_pictures_are_buckets(count: int, expected: int):
    batch = make("clip")(pictures(count), input_ids=[[PICTURE] * count])
    assert len(batch.images["clip"].given.pixels) == expected


def test_prompts(tokenizer):
    """A prompt is the ids around its pictures, BOS once."""
    processor = make("clip", tokenizer=tokenizer)
    prompt = processor.chat("What is it?", images=2)
    assert prompt.count("<image>\n") == 2
    assert prompt.endswith("<image>\n<image>\nWhat is it? ASSISTANT:")
    batch = processor(pictures(2), [prompt])
    head, rest = prompt.split("<image>", 1)[0], "\nWhat is it? ASSISTANT:"
    ids = [1]
    ids += tokenizer(head, add_special_tokens=False).input_ids + [0] * 4
    ids += tokenizer("\n", add_special_tokens=False).input_ids + [0] * 4
    ids += tokenizer(rest, add_special_tokens=False).input_ids
    assert batch.tokens[0][batch.mask[0]].tolist() == ids
    assert processor.chat("Why?", images=0).endswith("USER: Why? ASSISTANT:")


def test_decode(tokenizer):
    processor = make("clip", tokenizer=tokenizer, template="llava_v0")
    ids = tokenizer(" A cat. ### Human: no").input_ids
    assert processor.decode(ids) == "A cat."
    assert processor.decode([]) == ""


def test_ids_may_be_an_array():
    rows = [[5, 6], [7, 8]]
    found, expected = (make()(input_ids=ids) for ids in (np.array(rows), rows))
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.mask, expected.mask)


def test_plain_llm():
    batch = make()(input_ids=[[5, 6], [7]])
    assert batch.images == {}
    with pytest.raises(InputError, match="images: found 1 picture, expected none: this model is a"):
        make()(pictures(1), input_ids=[[PICTURE]])
    assert make().chat("Why?") == make("clip").chat("Why?", images=0)


BAD = {
    "too few pictures": (
        {"images": 1, "input_ids": [[PICTURE], [PICTURE, 5]]},
        "the batch: found 1 picture for 2 <image> placeholders",
    ),
    "too many pictures": (
        {"images": 3, "input_ids": [[PICTURE], [PICTURE, 5]]},
        "the batch: found 3 pictures for 2 <image> placeholders",
    ),
    "a picture and no placeholder": (
        {"images": 1, "input_ids": [[5]]},
        "the batch: found 1 picture for 0 <image> placeholders",
    ),
    "a placeholder and no picture": (
        {"input_ids": [[PICTURE]]},
        "the batch: found 0 pictures for 1 <image> placeholder",
    ),
    "right number, wrong rows": (
        {"images": [[], pictures(2)], "input_ids": [[PICTURE], [PICTURE]]},
        "row 0: found 0 pictures for 1 <image> placeholder",
    ),
    "wrong number of lists": (
        {"images": [pictures(1)], "input_ids": [[PICTURE], [5]]},
        "images: found 1 list, expected one list a row, 2 rows",
    ),
    "too long": (
        {"input_ids": [[5] * (CONTEXT + 1)]},
        f"prompt: found {CONTEXT + 1} tokens, visual ones included, expected at most {CONTEXT}",
    ),
    "too long with its pictures": (
        {"images": 1, "input_ids": [[5] * (CONTEXT - 3) + [PICTURE]]},
        f"prompt: found {CONTEXT + 1} tokens, visual ones included, expected at most {CONTEXT}",
    ),
    "an id past the vocabulary": (
        {"input_ids": [[5], [6, VOCAB]]},
        f"row 1: found token id {VOCAB}, expected ids",
    ),
    "a negative id": ({"input_ids": [[-1]]}, "row 0: found token id -1"),
    "an empty row": ({"input_ids": [[5], []]}, "row 1: found no token"),
    "no row": ({"input_ids": []}, "processor: found no row"),
    "neither prompts nor ids": ({}, "processor: found both or neither"),
    "both prompts and ids": (
        {"prompts": ["a"], "input_ids": [[5]]},
        "processor: found both or neither",
    ),
    "no tokenizer": ({"prompts": ["a"]}, "tokenizer: found none in the checkpoint folder"),
    "labels of another length": (
        {"input_ids": [[5, 6]], "labels": [[5]]},
        "labels of row 0: found 1 label, expected 1 row, 2 labels in this one",
    ),
    "labels of fewer rows": (
        {"input_ids": [[5], [6]], "labels": [[5]]},
        "labels of row 0: found 1 row, expected 2 rows",
    ),
    "a bare prompt": ({"prompts": "a"}, "prompts: found one str, expected a list of prompts"),
    "a bare path": (
        {"images": "a.png", "input_ids": [[PICTURE]]},
        "images: found one str, expected a list of pictures; pass [picture]",
    ),
    "a bare picture": (
        {"images": np.zeros((9, 9, 3), np.uint8), "input_ids": [[PICTURE]]},
        "images: found one ndarray, expected a list of pictures",
    ),
    "a picture that is not there": (
        {"images": ["no/such.png"], "input_ids": [[PICTURE]]},
        "no/such.png: found No such file or directory, expected an image file",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name: str):
    arguments, message = BAD[name]
    if isinstance(arguments.get("images"), int):
        arguments = {**arguments, "images": pictures(arguments["images"])}
    with pytest.raises(InputError) as error:
        make("clip")(**arguments)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_longest_that_fits():
    row = [5] * (CONTEXT - 4) + [PICTURE]
    batch = make("clip")(pictures(1), input_ids=[row])
    assert batch.tokens.shape == (1, CONTEXT)
    assert batch.mask.all()


@pytest.mark.parametrize("padding", ["right", "left"])
def test_truncation_cuts_ends_of_rows(padding: str):
    """Inside a picture too; labels go with their ids."""
    rows = [[5, PICTURE, 6, 7, 8], [9, 10], [11, PICTURE]]
    options = {"labels": [[-100, -100, 6, 7, 8], [9, 10], [11, -100]], "padding": padding}
    whole = make("clip")(pictures(2), input_ids=rows, **options)
    batch = make("clip")(pictures(2), input_ids=rows, truncate=4, **options)
    assert batch.mask.sum(axis=1).tolist() == [4, 2, 4]
    for name in ("tokens", "visual", "labels"):
        for i in range(3):
            expected = getattr(whole, name)[i][whole.mask[i]][:4]
            np.testing.assert_array_equal(getattr(batch, name)[i][batch.mask[i]], expected)
    long = make("clip")(input_ids=[[5] * (CONTEXT + 1)], truncate=CONTEXT)
    assert long.mask.sum() == CONTEXT


def test_decode_without_tokenizer():
    with pytest.raises(InputError, match="tokenizer: found none in the checkpoint folder"):
        make("clip").decode([5])
