"""A new family by the contract alone: how one is written, and that all the rest reads it.

The toy sees a picture as 2 x 2 mean colours and a video's frame as one. In the text a picture is
`<img>`, its tokens, `</img>`; an LLM with M-RoPE reads them at their time, row and column; and the
colours are added once more behind its first layer, as DeepStack does.

Another has three encoders, each shown the picture by a mean of its own; folders hold it, too.
"""

import dataclasses
import shutil
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file, save_file

import converters
from converters import registry
from converters.folder import open_source
from converters.inspect import inspect
from converters.load import abstract, part_of
from converters.params.table import Table, dense
from tests.checkpoints import llama_folder, make_llama, write_json
from vfjax import InputError, Model, Processor, Video
from vfjax.architectures import (
    Architecture,
    Encoded,
    Inputs,
    Llava,
    MLPConfig,
    Prepared,
    ProjectorConfig,
    Rows,
    Run,
    VisualTokens,
)
from vfjax.architectures.base import Encoder, all_of, bucket, stacked
from vfjax.architectures.boxes import WHOLE, cut
from vfjax.architectures.combine import Combine
from vfjax.architectures.tapped import Shown, Tapped, frames_of
from vfjax.atomic import read_json
from vfjax.fusion.deep import Deep
from vfjax.fusion.segments import parallel, running
from vfjax.llm import LlamaConfig
from vfjax.model import BranchConfig, ModelConfig, forward
from vfjax.vision.encoders import CLIPConfig
from vfjax.vision.images import ImageSpec, preprocess

HALF = (0.5, 0.5, 0.5)
IMAGES = ImageSpec(4, 4, "squash", "crop", HALF, HALF)
START, END = 5, 6
"""Ids of `<img>` and `</img>`."""


# The family: one config and one module.


@dataclasses.dataclass(frozen=True)
class Toy:
    """Mean colours."""

    width: int
    images: ImageSpec = IMAGES

    reads_text: ClassVar[bool] = False
    axes: ClassVar[int] = 3
    placeholders: ClassVar[tuple[int, ...]] = ()
    encoders: ClassVar[Mapping[str, Encoder]] = {}
    connector: ClassVar[None] = None

    @property
    def tokens(self) -> int:
        return 4 + 2

    def prepare(self, rows: Rows, slots: int | None = None) -> Prepared:
        media = [each for row in rows for each in row]
        views = [preprocess(frame, self.images) for each in media for frame in frames_of(each)]
        count = bucket(len(views)) if slots is None else slots
        runs, first = [], 0
        for each in media:
            frames = 4 * (first + np.arange(len(frames_of(each))))
            first += len(frames)
            runs.append(_video(frames) if isinstance(each, Video) else _picture(frames[0]))
        return Prepared(Inputs(stacked(views, count, self.images.size)), runs, 4 * count)

    def regions(self, size: tuple[int, int]) -> np.ndarray:
        mark = (np.nan,) * 4
        return np.array([mark, *cut(WHOLE, (2, 2)), mark])

    def build(self, *, rngs: nnx.Rngs) -> "Colours":
        return Colours(self, rngs=rngs)


def _picture(first: int) -> Run:
    """`<img>` at the start, its tokens by row and column from 1 on, `</img>` behind both."""
    tokens = first + np.arange(4)
    places = [(0, 0, 0), *((1, 1 + row, 1 + col) for row in (0, 1) for col in (0, 1)), (3, 3, 3)]
    return Run(
        np.array([0, *tokens, 0])[:, None],
        marks=np.array([START, -1, -1, -1, -1, END]),
        place=np.array(places),
        span=4,
    )


def _video(firsts: np.ndarray) -> Run:
    """Of each frame the mean of its four tokens, by time."""
    count = len(firsts)
    return Run(
        firsts[:, None] + np.arange(4),
        weights=np.full((count, 4), 0.25),
        place=np.stack([np.arange(count), np.zeros(count, int), np.zeros(count, int)], axis=1),
        span=count,
    )


class Colours(nnx.Module):
    """Pixels -> mean colours -> visual tokens."""

    def __init__(self, config: Toy, *, rngs: nnx.Rngs):
        self.config = config
        self.projector = nnx.Linear(3, config.width, rngs=rngs)

    def encode(self, inputs: Inputs) -> Encoded:
        cells = jnp.asarray(inputs.pixels).reshape(-1, 2, 2, 2, 2, 3)
        return Encoded({"encoder": [cells.mean(axis=(2, 4)).reshape(-1, 4, 3)]})

    def visual_tokens(self, encoded: Encoded, embed, *, prompt=None, key=None) -> VisualTokens:
        values = self.projector(encoded.states["encoder"][0]).reshape(-1, self.config.width)
        return VisualTokens(values, jnp.ones(len(values), bool), deep=values[None] / 2)


# All the rest reads it.

LLM = LlamaConfig(32, 16, 2, 2, 2, 8, 16, 256, rope_axes=(0, 1, 2, 1))
TOY: Architecture = Toy(16)


def model_of(*branches: BranchConfig, **options: str) -> Model:
    return ModelConfig(branches, LLM, **options).build(rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def toy() -> tuple[Model, Processor]:
    model = model_of(BranchConfig("toy", TOY))
    return model, Processor(model.config)


def picture(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))


PICTURE, FILM = picture(1), Video((picture(2), picture(3), picture(4)))
ROWS = [[1, -200, 7, -200, 8], [9, 10]]


def test_where_tokens_stand(toy):
    """Marks are text in the picture's segment; the text goes on behind the span."""
    _, processor = toy
    labels = [[i if i > 0 else -100 for i in row] for row in ROWS]
    batch = processor([[PICTURE, FILM], []], input_ids=ROWS, labels=labels)
    n = 1 + 6 + 1 + 3 + 1
    assert batch.tokens[0, :n].tolist() == [1, START, 0, 0, 0, 0, END, 7, 0, 0, 0, 8]
    made = 4 * bucket(4) + np.arange(3)  # behind the memory
    assert batch.visual[0, :n].tolist() == [-1, -1, 0, 1, 2, 3, -1, -1, *made, -1]
    assert batch.segments[0, :n].tolist() == [0, *[1] * 6, 0, *[1] * 3, 0]
    assert batch.labels[0, :n].tolist() == [1, *[-100] * 6, 7, *[-100] * 3, 8]
    found = np.asarray(running(batch.mask, batch.place, batch.steps))
    expected = [
        [0, 1, 2, 2, 2, 2, 4, 5, 6, 7, 8, 9],
        [0, 1, 2, 2, 3, 3, 4, 5, 6, 6, 6, 9],
        [0, 1, 2, 3, 2, 3, 4, 5, 6, 6, 6, 9],
    ]
    assert found[:, 0, :n].tolist() == expected
    assert found[:, 1, :2].tolist() == [[0, 1]] * 3  # text has equal rows


def by_hand(model: Model, row: list, positions: np.ndarray) -> np.ndarray:
    """The LLM on ids and colours put together here, [t, vocab]."""
    kernel, bias = (np.asarray(x[...]) for x in _params(model.branches["toy"].projector))
    x, deep = [], []
    for each in row:
        if isinstance(each, int):
            x.append(np.asarray(model.llm.embedding[each]))
            deep.append(np.zeros(16))
        else:
            x.append(each @ kernel + bias)
            deep.append(x[-1] / 2)
    embedded = jnp.asarray(np.array(x), jnp.float32)[None]
    more = jnp.asarray(np.array(deep), jnp.float32)[None, None]
    mask = jnp.ones((1, len(row)), bool)
    hidden, _ = model.llm(embedded, mask, None, jnp.asarray(positions)[:, None], deep=Deep(more))
    return np.asarray(model.llm.logits(hidden))[0]


def _params(linear: nnx.Linear) -> tuple[nnx.Param, nnx.Param]:
    return linear.kernel, linear.bias


def colours(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image, np.float64) / 127.5 - 1
    return pixels.reshape(2, 2, 2, 2, 3).mean(axis=(1, 3)).reshape(4, 3)


def test_the_model_reads_it(toy):
    """In one pass, into a cache, and from it; encoded before or not."""
    model, processor = toy
    batch = processor([[PICTURE, FILM], []], input_ids=ROWS, padding="left")
    logits = np.asarray(forward(model, batch))
    film = [colours(frame).mean(axis=0) for frame in FILM.frames]
    row = [1, START, *colours(PICTURE), END, 7, *film, 8]
    at = np.asarray(running(batch.mask, batch.place, batch.steps))[:, 0, batch.mask[0]]
    expected = by_hand(model, row, at)
    np.testing.assert_allclose(logits[0][batch.mask[0]], expected, atol=2e-5)
    _, cache = jax.jit(lambda model, batch: model.prefill(batch, 80))(model, batch)
    after, _ = model.next(jnp.asarray([3, 3]), cache)
    longer = np.concatenate([at, [[10]] * 3], axis=1)
    np.testing.assert_allclose(after[0], by_hand(model, [*row, 3], longer)[-1], atol=2e-5)


def test_beside_another_family(toy):
    """At parallel positions both branches start where the picture stands, the text after both."""
    clip = CLIPConfig(8, 1, 1, 8, patch=2, image_size=4)
    other = Llava(clip, ProjectorConfig(MLPConfig(8, 16), Combine(((-1,),))), IMAGES)
    model = model_of(
        BranchConfig("toy", TOY), BranchConfig("llava", other), positions="parallel", mask="block"
    )
    batch = Processor(model.config)([PICTURE], input_ids=[[1, -200, 7]])
    place = parallel(batch.segments, batch.mask, 2, batch.place, batch.steps)
    rows = np.asarray(place)[:, 0, batch.mask[0]]
    assert rows[1].tolist() == [0, *[1, 2, 2, 3, 3, 4], *[1, 2, 3, 4], 5]
    assert np.isfinite(np.asarray(forward(model, batch))[batch.mask]).all()


def test_an_llm_of_one_position_is_refused():
    llm = dataclasses.replace(LLM, rope_axes=())
    with pytest.raises(InputError, match="branch 'toy': found visual tokens placed by time, row"):
        ModelConfig((BranchConfig("toy", TOY),), llm)


def test_its_boxes():
    boxes = TOY.regions((40, 20))
    assert boxes[1:5].tolist() == [
        [0, 0, 0.5, 0.5],
        [0.5, 0, 1, 0.5],
        [0, 0.5, 0.5, 1],
        [0.5, 0.5, 1, 1],
    ]
    assert np.isnan(boxes[[0, 5]]).all() and len(boxes) == TOY.tokens


def test_m_rope_is_transformers(tmp_path):
    """Qwen2-VL's language model: sections of a head's frequencies turn by time, row and column."""
    import torch

    base = make_llama(0, model_type="qwen2")
    llama_folder(tmp_path / "llm", llm=base)
    model, _ = converters.load(tmp_path / "llm")
    text = base.config.to_dict() | {"model_type": "qwen2_vl_text"}
    text["rope_parameters"] = text["rope_parameters"] | {"mrope_section": [1, 1, 2]}
    text["rope_parameters"]["rope_type"] = "default"
    theirs = transformers.models.qwen2_vl.modeling_qwen2_vl.Qwen2VLTextModel(
        transformers.models.qwen2_vl.configuration_qwen2_vl.Qwen2VLTextConfig(**text)
    ).eval()
    theirs.load_state_dict(base.model.state_dict())
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 9, 32)).astype(np.float32)
    positions = np.sort(rng.integers(0, 40, (3, 2, 9)), axis=2)
    with torch.no_grad():
        expected = theirs(
            inputs_embeds=torch.tensor(x), position_ids=torch.tensor(positions)
        ).last_hidden_state.numpy()
    model.llm.config = dataclasses.replace(model.llm.config, rope_axes=(0, 1, 2, 2))
    found, _ = model.llm(jnp.asarray(x), jnp.ones((2, 9), bool), None, jnp.asarray(positions))
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


# A family with three encoders: its config, its connector, and what folders hold of it.

MEANS = {"encoder": 0.5, "second": 0.25, "third": 0.75}


@dataclasses.dataclass(frozen=True)
class Joined:
    """A dense layer on all encoders' last states, joined on channels."""

    dout: int
    widths: tuple[int, ...] = (8, 12, 16)

    @property
    def taps(self) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys(MEANS, (-1,))

    @property
    def channels(self) -> dict[str, tuple[int, int]]:
        return {name: (1, width) for name, width in zip(MEANS, self.widths, strict=True)}

    def build(self, *, rngs: nnx.Rngs) -> "Joining":
        return Joining(self, rngs=rngs)


class Joining(nnx.Module):
    def __init__(self, config: Joined, *, rngs: nnx.Rngs):
        self.dense = nnx.Linear(sum(config.widths), config.dout, rngs=rngs)

    def __call__(self, states: Mapping[str, Sequence[jax.Array]]) -> VisualTokens:
        x = jnp.concatenate([states[name][0][:, 1:] for name in MEANS], axis=-1)
        return all_of(self.dense(x), {})


@dataclasses.dataclass(frozen=True)
class Three(Tapped):
    """Three encoders."""

    second: Encoder
    third: Encoder

    @property
    def encoders(self) -> Mapping[str, Encoder]:
        return {**super().encoders, "second": self.second, "third": self.third}

    @property
    def tokens(self) -> int:
        return 4

    def show(
        self, pictures: Sequence[Image.Image], frames: Container[int] = (), slots: int | None = None
    ) -> Shown:
        n = bucket(len(pictures)) if slots is None else slots
        first, *others = (
            stacked(
                [
                    preprocess(p, dataclasses.replace(self.images, mean=(mean,) * 3))
                    for p in pictures
                ],
                n,
                4,
            )
            for mean in MEANS.values()
        )
        inputs = Inputs(first, dict(zip(("second", "third"), others, strict=True)))
        return Shown(inputs, [i * 4 + np.arange(4) for i in range(len(pictures))], n * 4)

    def regions(self, size: tuple[int, int]) -> np.ndarray:
        return cut(WHOLE, (2, 2))


JOINED = Table(
    types=("joined",),
    read=lambda hf: Joined(hf.whole("dout")),
    unused={"mm_projector_type": ("joined",)},
    path=lambda hf, images, encoder, connector: Three(
        encoder, connector, images, hf.any("second"), hf.any("third")
    ),
    others=("second", "third"),
    rules=dense("dense", "dense"),
)


def clip_of(width: int) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": 8, "num_hidden_layers": 1}
    return {
        "model_type": "clip_vision_model",
        **sizes,
        "num_attention_heads": 1,
        "patch_size": 2,
        "image_size": 4,
    }


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of it: an LLM's, and all else drawn and written by the tables."""
    tmp_path = tmp_path_factory.mktemp("three")
    llama_folder(tmp_path / "llm", llm=make_llama(0))
    llm = open_source(tmp_path / "llm").config_of("llm")
    first, second, third = (CLIPConfig(w, 1, 1, 8, patch=2, image_size=4) for w in (8, 12, 16))
    seen = Three(first, Joined(32), IMAGES, second, third)
    _, params = abstract(ModelConfig((BranchConfig("toy", seen),), llm).build)
    rng = np.random.default_rng(0)
    tensors = load_file(tmp_path / "llm" / "model.safetensors")
    tables = {"connector": JOINED} | dict.fromkeys(MEANS, registry.TABLES["clip_vision_model"])
    for name, param in params.items():
        part, path = part_of(name)
        if part != "llm":
            (rule,) = tables[part.split(".")[-1]].match({path: param.shape}).values()
            array = rule.to_source(rng.normal(0, 0.3, param.shape).astype(np.float32))
            tensors[f"{part}.{rule.source}"] = np.ascontiguousarray(array)
    folder = tmp_path / "three"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config, *others = (clip_of(width) for width in (8, 12, 16))
    branch = {
        "name": "toy",
        "encoder": config,
        "preprocessor": {
            "image_processor_type": "CLIPImageProcessor",
            "size": 4,
            "crop_size": 4,
            "image_mean": HALF,
            "image_std": HALF,
        },
        "aspect": "crop",
        "connector": {"model_type": "joined", "mm_projector_type": "joined", "dout": 32},
        **dict(zip(("second", "third"), others, strict=True)),
    }
    text = read_json(tmp_path / "llm" / "config.json")
    write_json(
        folder / "config.json",
        {
            "model_type": "visionfuse",
            "text_config": text,
            "branches": [branch],
            "template": "plain",
        },
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.TABLES, "joined", JOINED)
        yield folder


def test_three_encoders_are_read_from_a_folder(three: Path):
    """Each sees the picture as it was trained; the connector reads them in their order."""
    model, processor = converters.load(three)
    batch = processor([PICTURE], input_ids=[[1, -200, 7]])
    (branch,), (seen,) = model.branches.values(), batch.images.values()
    pixels = np.asarray(PICTURE, np.float32)[None] / 255
    features = [
        getattr(branch, name)(jnp.asarray((pixels - mean) / 0.5), (-1,))[0][:, 1:]
        for name, mean in MEANS.items()
    ]
    kernel, bias = (np.asarray(x[...]) for x in _params(branch.connector.dense))
    expected = np.concatenate(features, axis=-1)[0] @ kernel + bias
    found = model.visual_tokens(batch.images).values[:4]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert list(branch.encode(seen.given).states) == list(MEANS)
    assert np.isfinite(np.asarray(forward(model, batch))[batch.mask]).all()
    said = inspect(three)
    assert "clip_vision_model, 1 layer x 8, taps [-1] and clip_vision_model, 1 layer x 12" in said


def test_three_encoders_are_written_back(three: Path, tmp_path: Path):
    model, _ = converters.load(three)
    converters.export(model, tmp_path / "out")
    one, two = (load_file(folder / "model.safetensors") for folder in (three, tmp_path / "out"))
    assert {name.split(".")[2] for name in one if "branches" in name} == {*MEANS, "connector"}
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[name], two[name]) for name in one)
    written = read_json(tmp_path / "out" / "config.json")["branches"]
    assert written == read_json(three / "config.json")["branches"]


def test_an_encoder_that_a_connector_does_not_read_is_refused(three: Path, tmp_path: Path):
    config = read_json(three / "config.json")
    config["branches"][0]["fourth"] = clip_of(8)
    shutil.copytree(three, tmp_path / "four")
    write_json(tmp_path / "four" / "config.json", config)
    with pytest.raises(InputError, match="fourth: found"):
        converters.load(tmp_path / "four")
