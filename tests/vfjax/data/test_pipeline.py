"""Batches of training data: their rows, labels and order; several processes; broken rows."""

import collections
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import av
import grain
import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from tests.checkpoints import tokenizer_files
from vfjax import Batch, Model, Processor, open_video
from vfjax.architectures import (
    Llava,
    LlavaNext,
    MiniGemini,
    MiningConfig,
    MLPConfig,
    OneVision,
    Pictures,
    ProjectorConfig,
    Slime,
    SliMEConfig,
)
from vfjax.data import Batches, Conversations
from vfjax.errors import InputError
from vfjax.llm import LlamaConfig
from vfjax.model import BranchConfig, ModelConfig
from vfjax.text import labels as training
from vfjax.text import prompts
from vfjax.vision.encoders import CLIPConfig, ConvNeXtConfig
from vfjax.vision.images import ImageSpec

HALF = (0.5, 0.5, 0.5)
CLIP = BranchConfig(
    "clip",
    Llava(
        CLIPConfig(patch=14, image_size=28),
        ProjectorConfig(MLPConfig(8, 8)),
        ImageSpec(28, 28, "squash", "crop", HALF, HALF),
    ),
)
READ = grain.ReadOptions(num_threads=3, prefetch_buffer_size=5)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """One token a byte, and BOS."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer_files(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def processor(tokenizer) -> Processor:
    config = ModelConfig((CLIP,), LlamaConfig(320, 8, 1, 2, 2, 4, 8, 600))
    return Processor(config, tokenizer, template="llava_llama_2")


def row(n: int, pictures: int, words: int) -> dict:
    """A row with the name `n`, whose answer has that many words."""
    images = [f"{n}_{k}.png" for k in range(pictures)]
    question = "<image>" * pictures + f"What is row {n}?"
    answer = " ".join([f"row{n}"] * words)
    talk = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": n, "image": images, "conversations": talk}


def write(folder: Path, rows: Sequence[dict], name: str = "data.json", **options) -> Conversations:
    """A data set whose pictures all differ in size and pixels."""
    (folder / "images").mkdir(exist_ok=True, parents=True)
    rng = np.random.default_rng(len(rows))
    for picture in [name for r in rows for name in r["image"]]:
        size = (*rng.integers(20, 90, 2), 3)
        pixels = rng.integers(0, 256, size, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / picture)
    (folder / name).write_text(json.dumps(rows))
    return Conversations(folder / name, folder / "images", **options)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Conversations:
    """21 rows of zero to two pictures and of many lengths."""
    rows = [row(n, (1, 0, 2, 1)[n % 4], 1 + n * n % 13) for n in range(21)]
    return write(tmp_path_factory.mktemp("data"), rows)


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Conversations:
    return write(tmp_path_factory.mktemp("other"), [row(n, 1, 2) for n in range(100, 110)])


def assert_equal(a: Batch, b: Batch) -> None:
    left, right = jax.tree.leaves_with_path(a), jax.tree.leaves_with_path(b)
    assert [path for path, _ in left] == [path for path, _ in right]
    for (path, x), (_, y) in zip(left, right, strict=True):
        np.testing.assert_array_equal(x, y, err_msg=str(path))


def words_of(batch: Batch, i: int, processor: Processor) -> str:
    ids = np.asarray(batch.tokens[i])[batch.mask[i] & (batch.visual[i] < 0)]
    return processor.tokenizer.decode(ids)


# Rows and labels


def test_a_batch_is_its_rows(data, processor):
    """Words, pictures and labels of every row, one, several or no picture."""
    batches = Batches([(data, 1)], processor, batch=7, seed=1)
    assert (len(batches), batches.epoch_size) == (3, 3)
    for step in range(3):
        batch, pictures = batches[step], []
        for i, (k, n) in enumerate(batches.rows(step)):
            assert k == 0
            sample = data[n]
            pictures += sample.pictures
            text = words_of(batch, i, processor)
            assert f"What is row {n}? [/INST] {sample.turns[0][1]} </s>" in text
            learnt = batch.labels[i][batch.labels[i] >= 0]
            assert processor.tokenizer.decode(learnt) == f" {sample.turns[0][1]} </s>"
            assert (batch.visual[i] >= 0).sum() == 4 * len(sample.pictures)
            assert not (batch.labels[i][batch.visual[i] >= 0] != -100).any()
        expected = processor(pictures, input_ids=[[5] + [-200] * len(pictures)])
        jax.tree.map(np.testing.assert_array_equal, batch.images, expected.images)
        seen = batch.visual[batch.visual >= 0]
        assert seen.tolist() == list(range(4 * len(pictures)))


def test_an_epoch_has_every_row_once(data, processor):
    batches = Batches([(data, 1)], processor, batch=7, seed=1, steps=9, window=3)
    epochs = [
        [n for step in range(first, first + 3) for _, n in batches.rows(step)]
        for first in (0, 3, 6)
    ]
    for rows in epochs:
        assert sorted(rows) == list(range(21))
    assert epochs[0] != epochs[1] != epochs[2]
    assert [n for _, n in batches.rows(0)] != sorted(n for _, n in batches.rows(0))
    again = Batches([(data, 1)], processor, batch=7, seed=2, window=3)
    assert [n for step in range(3) for _, n in again.rows(step)] != epochs[0]


def test_weights_are_shares_of_rows(data, other, processor):
    batches = Batches([(data, 3), (other, 1)], processor, batch=8, seed=0, steps=12, window=4)
    assert batches.epoch_size == 4  # of 31 rows
    for first in (0, 4, 8):
        rows = [k for step in range(first, first + 4) for k, _ in batches.rows(step)]
        assert collections.Counter(rows) == {0: 24, 1: 8}


def test_rows_of_like_length_meet(data, other, processor):
    """Less padding than drawn uniformly, text-only rows together, windows of the same rows."""
    processor = dataclasses.replace(
        processor, template="mistral_instruct", lengths=tuple(range(600))
    )
    mixture = [(data, 2), (other, 1)]
    grouped, uniform = (
        Batches(mixture, processor, batch=4, seed=3, steps=16, window=w) for w in (16, 1)
    )
    every = [sorted(r for step in range(16) for r in b.rows(step)) for b in (grouped, uniform)]
    assert every[0] == every[1]

    def padding(batches: Batches) -> float:
        return sum((~batches[k].mask).mean() for k in range(16))

    def mixed(batches: Batches) -> int:
        rows = [
            [batches.mixture[k][0].pictures[i] > 0 for k, i in batches.rows(s)] for s in range(16)
        ]
        return sum(len(set(r)) > 1 for r in rows)

    assert padding(grouped) < 0.5 * padding(uniform)
    assert mixed(grouped) <= 1 < mixed(uniform)
    sizes = [np.mean([mixture[k][0].characters[i] for k, i in grouped.rows(s)]) for s in range(16)]
    assert sizes != sorted(sizes)


GOLDEN = [
    ("LLaVA", "v1", "spm_legacy"),
    ("LLaVA", "llava_llama_2", "spm_legacy"),
    ("LLaVA", "plain", "spm_legacy"),
    ("MGM", "llama_3", "bpe"),
    ("SliME", "llama3", "bpe"),
]


@pytest.mark.parametrize(("base", "template", "name"), GOLDEN)
def test_labels_equal_upstream(shared: Path, tmp_path: Path, base: str, template: str, name: str):
    folder = shared / "golden"
    recorded = [
        r
        for r in json.loads((folder / "labels.json").read_text())["rows"][base]
        if (r["template"], r["tokenizer"]) == (template, name)
    ]
    assert len(recorded) > 1
    if name == "bpe":
        file = str(folder / "tokenizers" / "bpe_tokenizer.json")
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=file, bos_token="<|begin_of_text|>")
    else:
        model = (folder / "tokenizers" / "spm_tiny.model").read_bytes()
        (tmp_path / "tokenizer.model").write_bytes(model)
        tokenizer = LlamaTokenizer.from_pretrained(tmp_path, add_bos_token=True, legacy=True)
    rows = []
    for i, r in enumerate(recorded):
        talk = [{"from": who, "value": text} for who, text in r["messages"]]
        images = [f"{i}_{k}.png" for k in range(json.dumps(talk).count("<image>"))]
        rows.append({"image": images, "conversations": talk})
    config = ModelConfig((CLIP,), LlamaConfig(2000, 8, 1, 2, 2, 4, 8, 2048))
    batches = Batches(
        [(write(tmp_path, rows), 1)],
        Processor(config, tokenizer, template=template),
        batch=len(rows),
        seed=0,
        window=1,
    )
    batch = batches[0]
    for i, (_, n) in enumerate(batches.rows(0)):
        words = batch.mask[i] & (batch.visual[i] < 0)
        places = np.array(recorded[n]["input_ids"]) == -200
        expected = (np.array(recorded[n][key])[~places] for key in ("input_ids", "labels"))
        for found, wanted in zip((batch.tokens, batch.labels), expected, strict=True):
            np.testing.assert_array_equal(found[i][words], wanted)


def test_long_rows_are_cut(data, processor):
    whole, cut = (
        Batches([(data, 1)], processor, batch=21, seed=0, length=n)[0] for n in (None, 190)
    )
    assert whole.mask.sum(axis=1).max() > 190
    assert cut.mask.sum(axis=1).max() == 190
    for name in ("tokens", "visual", "labels"):
        np.testing.assert_array_equal(
            getattr(cut, name)[:, :190][cut.mask[:, :190]],
            getattr(whole, name)[:, :190][whole.mask[:, :190]],
        )


# The order as a formula


@settings(max_examples=8)
@given(
    threads=st.integers(1, 8),
    ahead=st.integers(1, 9),
    start=st.integers(0, 5),
    stop=st.integers(0, 5),
)
def test_same_batches_for_any_threads_and_after_resume(
    data, other, processor, threads, ahead, start, stop
):
    def make() -> Batches:
        return Batches([(data, 2), (other, 1)], processor, batch=4, seed=5, steps=6, window=3)

    expected = [make()[k] for k in range(6)]
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(ahead, threads))
    found = make().to_iter(min(start, stop), options)
    for k in range(min(start, stop), stop):
        assert_equal(next(found), expected[k])
    state = json.loads(json.dumps(found.get_state()))
    resumed = make().to_iter(options=READ)
    resumed.set_state(state)
    for k, batch in enumerate(resumed, stop):
        assert_equal(batch, expected[k])
    assert k == 5


def test_the_last_step(data, processor):
    batches = Batches([(data, 1)], processor, batch=7, seed=1)
    assert list(batches.to_iter(3)) == []
    for step in (-1, 3):
        with pytest.raises(IndexError):
            batches[step]


# Several processes


def together(parts: Sequence[Batch]) -> Batch:
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def toy_model() -> Model:
    """A branch of several architectures; random weights, each of which moves the output."""
    llm = LlamaConfig(320, 16, 1, 2, 2, 8, 16, 900)
    spec = ImageSpec(28, 28, "squash", "crop", HALF, HALF)
    clip = CLIPConfig(16, 2, 2, 16, patch=14, image_size=28)
    wide = dataclasses.replace(clip, width=128)
    mlp, wide_mlp = MLPConfig(16, 16), MLPConfig(128, 16)
    tiles = ((28, 56), (56, 28), (28, 84), (84, 28))
    scales = dataclasses.replace(spec, size=64, edge=64)
    branches = (
        BranchConfig("whole", Llava(clip, ProjectorConfig(mlp), spec)),
        BranchConfig(
            "anyres",
            LlavaNext(
                *(clip, ProjectorConfig(mlp, newline=True), spec),
                pinpoints=tiles,
                merge="spatial_unpad",
            ),
        ),
        BranchConfig(  # of a picture of two tiles one tile's tokens are read
            "onevision",
            OneVision(*(clip, ProjectorConfig(mlp, newline=True), spec), pinpoints=tiles, most=1),
        ),
        BranchConfig(
            "two_scales",
            MiniGemini(
                clip,
                MiningConfig(mlp, width=16, aux_width=16, grid=2, whole=True),
                scales,
                ConvNeXtConfig((1, 1, 1, 1), (4, 4, 4, 4), image_size=64),
                size=28,
            ),
        ),
        BranchConfig(
            "sliced",
            Slime(wide, SliMEConfig(wide_mlp, width=128, grid=2, queries=1, separator=3), spec),
        ),
    )
    config, rng = ModelConfig(branches, llm), np.random.default_rng(0)
    graph, shapes = nnx.split(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))
    return nnx.merge(
        graph,
        jax.tree.map(lambda x: rng.normal(x.ndim == 1, 0.3, x.shape).astype(np.float32), shapes),
    )


# Compiled soon rather than fast: it runs a few times only.
quick = jax.jit(Model.__call__, compiler_options={"xla_backend_optimization_level": 0})


@pytest.mark.parametrize("multiple", [1, 4])
def test_processes_make_one_batch(tmp_path: Path, tokenizer, multiple: int):
    """Put together, the parts give every row the logits that one process gives it."""
    model = toy_model()
    processor = Processor(model.config, tokenizer, template="llava_llama_2")
    data = write(tmp_path, [row(n, pictures, 1 + n) for n, pictures in enumerate((1, 2, 0, 0))])

    def make(**share: int) -> Batch:
        return Batches([(data, 1)], processor, batch=4, seed=14, **share)[0]

    single = make()
    parts = [make(process_index=i, process_count=2, multiple=multiple) for i in range(2)]
    rooms = [len(x) for part in parts for x in jax.tree.leaves(part.images)]
    assert not any(room % multiple for room in rooms)
    shapes = [jax.tree.map(np.shape, part) for part in parts]
    assert shapes[0] == shapes[1]
    tokens = [int((part.visual >= 0).sum()) for part in parts]
    assert 0 < tokens[0] < tokens[1]  # one picture, and two in a row
    joined = together(parts)
    for name in ("tokens", "labels"):
        a, b = (getattr(x, name)[x.mask] for x in (single, joined))
        np.testing.assert_array_equal(a, b)
    a, b = (np.asarray(quick(model, x))[x.mask] for x in (single, joined))
    np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * np.abs(a).max())
    for name in single.images:  # and every branch counts
        other = dataclasses.replace(joined, images=changed(joined.images, name))
        moved = np.abs(np.asarray(quick(model, other))[joined.mask] - a).max()
        assert moved > 1e-3 * np.abs(a).max(), name


def changed(images: dict[str, Pictures], name: str) -> dict[str, Pictures]:
    """The second half of a branch's pixels, which is the second process's, turned around."""
    pixels = images[name].given.pixels.copy()
    pixels[len(pixels) // 2 :] = pixels[len(pixels) // 2 :, ::-1]
    given = dataclasses.replace(images[name].given, pixels=pixels)
    return {**images, name: dataclasses.replace(images[name], given=given)}


def test_text_alone_in_processes(tmp_path: Path, processor):
    """No arrays of pictures in any process, or in all."""
    data = write(tmp_path, [row(n, n == 3, 2) for n in range(4)])
    parts = [
        Batches(
            [(data, 1)],
            processor,
            batch=2,
            seed=0,
            steps=2,
            window=2,
            process_index=i,
            process_count=2,
        )
        for i in range(2)
    ]
    found = [[len(part[step].images) for part in parts] for step in range(2)]
    assert sorted(found) == [[0, 0], [1, 1]]


def test_order_of_rows_does_not_depend_on_processes(data, other, processor):
    def make(**share: int) -> Batches:
        return Batches(
            [(data, 2), (other, 1)], processor, batch=6, seed=1, steps=4, window=2, **share
        )

    for step in (0, 3):
        single = make()[step]
        expected = [words_of(single, i, processor) for i in range(6)]
        for count in (2, 6):
            parts = [make(process_index=i, process_count=count)[step] for i in range(count)]
            found = [words_of(p, i, processor) for p in parts for i in range(6 // count)]
            assert found == expected


# What is wrong


@pytest.fixture
def damaged(tmp_path: Path):
    """Opens data whose rows 2 and 3 have a picture that can't be decoded."""

    def make(skip_broken: bool) -> Conversations:
        data = write(tmp_path, [row(n, n % 2 + 1, 3) for n in range(8)], skip_broken=skip_broken)
        for name in ("2_0.png", "3_1.png"):
            path = tmp_path / "images" / name
            path.write_bytes(path.read_bytes()[:100])
        return data

    return make


def test_a_broken_picture_is_named(damaged, processor):
    data = damaged(False)
    with pytest.raises(InputError) as error:
        list(Batches([(data, 1)], processor, batch=4, seed=0).to_iter())
    message = str(error.value)
    assert message.startswith(str(data.path)) and "unreadable picture" in message
    assert f"{data.path} row 2 (id 2): " in message or f"{data.path} row 3 (id 3): " in message
    assert "\n" not in message


def test_broken_pictures_are_replaced_if_asked(damaged, processor):
    """By the next row with as many pictures; counted once, the same on any processes."""
    data = damaged(True)
    batches = Batches([(data, 1)], processor, batch=4, seed=0, steps=4, window=2)
    parts = [
        Batches(
            [(data, 1)],
            processor,
            batch=4,
            seed=0,
            steps=4,
            window=2,
            process_index=i,
            process_count=2,
        )
        for i in range(2)
    ]
    found = list(batches.to_iter(options=READ))
    assert len(batches.broken) == 2
    for n, line in zip((2, 3), batches.broken, strict=True):
        assert line.startswith(f"{data.path} row {n} (id {n}): ") and f"{n}_{n % 2}.png" in line
    for step, batch in enumerate(found):
        for i, (_, n) in enumerate(batches.rows(step)):
            name = {2: 4, 3: 5}.get(n, n)
            assert f"What is row {name}?" in words_of(batch, i, processor)
        joined = together([part[step] for part in parts])
        for name in ("tokens", "labels"):
            a, b = (getattr(x, name)[x.mask] for x in (batch, joined))
            np.testing.assert_array_equal(a, b)


def test_a_longer_replacement_is_cut(tmp_path: Path, processor):
    data = write(tmp_path, [row(0, 1, 1), row(1, 0, 2), row(2, 1, 30)], skip_broken=True)
    (tmp_path / "images/0_0.png").write_bytes(b"")
    batches = Batches([(data, 1)], processor, batch=3, seed=0, window=1)
    at = batches.rows(0).index((0, 0))
    batch = batches[0]
    length = len(processor.tokenizer("".join(data[0].turns[0])).input_ids)
    whole = batch.mask[batches.rows(0).index((0, 2))].sum()
    assert "What is row 2?" in words_of(batch, at, processor)
    assert length < batch.mask[at].sum() < whole - 100


def test_nothing_left(tmp_path: Path, processor):
    data = write(tmp_path, [row(n, 1, 1) for n in range(2)], skip_broken=True)
    for n in range(2):
        (tmp_path / f"images/{n}_0.png").write_bytes(b"")
    with pytest.raises(InputError, match="a broken row, and no other in the file to replace it"):
        Batches([(data, 1)], processor, batch=1, seed=0)[0]


def test_turns_that_the_template_cannot_hold(tmp_path: Path, processor):
    """Captions need a picture."""
    rows = [row(0, 1, 1), row(1, 0, 1)]
    plain = dataclasses.replace(processor, template="plain")
    batches = Batches([(write(tmp_path, rows), 1)], plain, batch=2, seed=0)
    with pytest.raises(InputError, match=r"row 1 \(id 1\): found turns that can't be trained on"):
        batches[0]
    batches = Batches([(write(tmp_path, rows, skip_broken=True), 1)], plain, batch=2, seed=0)
    assert (batches[0].labels >= 0).any(axis=1).all()
    assert [line[: line.index(":")] for line in batches.broken] == [
        f"{tmp_path}/data.json row 1 (id 1)"
    ]


BAD = {
    "no data": ({"mixture": []}, "mixture: found no data, expected at least one"),
    "a weight": ({"weight": 0}, "data.json: found 0, expected more than 0"),
    "batch": ({"batch": 0}, "batch: found 0, expected at least 1"),
    "seed": ({"seed": -1}, "seed: found -1, expected at least 0"),
    "steps": ({"steps": 0}, "steps: found 0, expected at least 1"),
    "length": ({"length": 601}, "length: found 601, expected 1 to 600, the context"),
    "window": ({"window": 0}, "window: found 0, expected at least 1"),
    "a huge batch": ({"batch": 10**12}, f"batch, accumulate: found {10**12}, expected at most"),
    "a huge window": (
        {"batch": 1000, "window": 10**9, "steps": 10**9},
        f"window: found {10**9}, expected at most",
    ),
    "processes": (
        {"batch": 5, "process_count": 2},
        "batch: found 5 rows, expected a multiple of 2, the number of processes",
    ),
    "process": (
        {"process_index": 2, "process_count": 2},
        "process_index: found 2, expected 0 to 1",
    ),
    "a template for prompts": ({"template": "llava_v0"}, "template 'llava_v0': found a template"),
    "no template": ({"template": "vicuna"}, "template: found 'vicuna'"),
    "no tokenizer": ({"tokenizer": None}, "tokenizer: found none"),
    "a plain LLM": (
        {"config": ModelConfig((), LlamaConfig(320, 8, 1, 2, 2, 4, 8, 600))},
        "data.json: found pictures, expected none: the model is a plain LLM",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name: str, data, processor):
    options, message = BAD[name]
    fields = {"template", "tokenizer", "config"} & set(options)
    changed = dataclasses.replace(processor, **{k: options[k] for k in fields})
    given = {"batch": 2, "seed": 0, **{k: v for k, v in options.items() if k not in fields}}
    mixture = given.pop("mixture", [(data, given.pop("weight", 1))])
    with pytest.raises(InputError) as error:
        Batches(mixture, changed, **given)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# Videos


def film(path: Path) -> None:
    """Ten frames that grow lighter."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for k in range(10):
            grey = np.full((32, 32, 3), 25 * k, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode(None))


def test_videos_are_read_as_frames(tmp_path: Path, processor):
    """As generation reads `vfjax.open_video`; a file that can't be decoded is a broken row."""
    rows = [{**row(n, 0, 2), "video": f"{n}.mp4"} for n in range(2)]
    for each in rows:
        each["conversations"][0]["value"] = "<video>\nWhat?"
    (tmp_path / "images").mkdir()
    film(tmp_path / "images/0.mp4")
    (tmp_path / "images/1.mp4").write_bytes(b"no film")
    data = write(tmp_path, rows, skip_broken=True)
    batches = Batches([(data, 1)], processor, batch=2, seed=0, frames=4)
    batch = batches[0]
    assert len(batches.broken) == 1 and "1.mp4" in batches.broken[0]
    assert batches.broken[0].startswith(f"{data.path} row 1 (id 1): found video ")
    video = open_video(tmp_path / "images/0.mp4", frames=4)
    ids, labels = training.labels(
        processor.tokenizer, prompts.get_template(processor.template), data[0].turns
    )
    assert_equal(batch, processor([video] * 2, input_ids=[ids] * 2, labels=[labels] * 2))
    assert (batch.visual >= 0).sum(axis=1).tolist() == [8, 8]  # four tokens a frame, two pooled
    with pytest.raises(InputError, match="found videos, expected none in steps of parts"):
        Batches([(data, 1)], processor, batch=2, seed=0, accumulate=2)
