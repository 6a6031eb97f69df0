"""Idefics3's and SmolVLM's folders, as transformers' models and processors compute them."""

import copy
import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from num2words import num2words
from PIL import Image
from transformers.models.idefics3.image_processing_pil_idefics3 import get_resize_output_image_size
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor
from transformers.video_utils import VideoMetadata

import converters
from converters import open_source
from tests.checkpoints import tokenizer_files, write_json
from tests.idefics import (
    AROUND,
    PICTURE,
    TILE,
    WHOLE,
    make_folder,
    make_processor,
)
from vfjax import InputError, Model, Video, generate_ids
from vfjax.model import forward
from vfjax.sharding import make_mesh

MAKER = make_processor()
Loaded = tuple[Path, Any, Model, Any, Any]


def load(path: Path, family: str) -> Loaded:
    theirs = make_folder(path, family, tied=family == "smolvlm")
    model, processor = converters.load(path)
    processor.lengths = (512,)  # one compilation
    return path, theirs, model, processor, MAKER


@pytest.fixture(scope="module")
def idefics3(tmp_path_factory) -> Loaded:
    return load(tmp_path_factory.mktemp("idefics") / "idefics3", "idefics3")


@pytest.fixture(scope="module")
def smolvlm(tmp_path_factory) -> Loaded:
    return load(tmp_path_factory.mktemp("idefics") / "smolvlm", "smolvlm")


@pytest.fixture(params=["idefics3", "smolvlm"])
def loaded(request) -> Loaded:
    return request.getfixturevalue(request.param)


def picture(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng((width, height))
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def assert_close(found: Any, expected: Any, what: object = "", limit: float = 1e-4) -> None:
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape, what
    np.testing.assert_allclose(
        found, expected, rtol=0, atol=limit * np.abs(expected).max(), err_msg=str(what)
    )


def ids_of(batch: Any, row: int, image: int) -> np.ndarray:
    """A row's ids as transformers has them."""
    return np.where(batch.visual[row] >= 0, image, batch.tokens[row])[batch.mask[row]]


PICTURES = [picture(*size) for size in ((30, 500), (120, 90), (60, 60), (61, 47), (200, 12))]
ROWS = [
    *([image] for image in PICTURES),
    [PICTURES[4], picture(50, 70)],
    [],
]
PROMPTS = [
    *("Look: <image> You?\n" for _ in PICTURES),
    "<image>\n\n<image>\nYou",
    "\n\nWithout You",
]


def test_pixels_and_ids(loaded):
    *_, processor, maker = loaded
    for images, prompt in zip(ROWS[:-1], PROMPTS, strict=False):
        expected = maker(images=[images], text=[prompt], return_tensors="np")
        batch = processor(images, [prompt])
        ids = ids_of(batch, 0, maker.image_token_id)
        np.testing.assert_array_equal(ids, expected.input_ids[0], prompt)
        (seen,) = batch.images.values()
        (pixels,) = expected.pixel_values
        np.testing.assert_allclose(
            np.moveaxis(seen.given.pixels, -1, 1)[: len(pixels)], pixels, atol=1e-6
        )
        apart = maker.tokenizer(prompt.split(PICTURE), add_special_tokens=False).input_ids
        row = [i for each in apart for i in (-200, *each)][1:]  # one placeholder a picture
        again = processor(images, input_ids=[row])
        np.testing.assert_array_equal(ids_of(again, 0, maker.image_token_id), ids)


@jax.jit
def seen(model: Model, batch: Any) -> Any:
    """Stages of the branch, and logits."""
    (branch,), (given,) = model.branches.values(), (x.given for x in batch.images.values())
    tokens = branch.visual_tokens(branch.encode(given), model.llm.lookup)
    return tokens.stages, model(batch)


FILM = Video(
    tuple(picture(40 + k, 50 - 9 * k) for k in range(3)), times=(0.0, 61.0, 3601.5), duration=3605.0
)


def words_of(video: Video, rate: float | None) -> str:
    """What SmolVLMProcessor, which is not made without torchvision, writes for a video."""
    metadata = VideoMetadata(
        total_num_frames=8000,
        fps=rate,
        duration=video.duration,
        frames_indices=[round(t * (rate or 0)) for t in video.times or ()] or [0, 1, 2],
    )
    its = SimpleNamespace(
        image_seq_len=4, image_token=PICTURE, fake_image_token=AROUND, global_image_token=WHOLE
    )
    inputs = {"pixel_values": np.zeros((1, len(video.frames))), "video_metadata": [metadata]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processing_smolvlm, "num2words", num2words)
        return transformers.SmolVLMProcessor.replace_video_token(its, inputs, 0)


def frames_of(video: Video) -> np.ndarray:
    """Values [n, 3, h, w] of SmolVLMVideoProcessor, whose resize, of torchvision, is torch's."""
    frames = []
    for image in video.frames:
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].contiguous()
        height, width = get_resize_output_image_size(x[0].numpy(), 2 * TILE)
        for size in ((height, width), (TILE, TILE)):
            x = torch.nn.functional.interpolate(x, size, mode="lanczos", antialias=True)
        frames.append((x[0] / 255 - 0.5) / 0.5)
    return torch.stack(frames).numpy()


@pytest.mark.parametrize("timed", [True, False])
def test_a_video(smolvlm, timed: bool):
    """Its words in a prompt, whose own the tokenizer joins with them, and by ids; its frames."""
    *_, processor, maker = smolvlm
    video = FILM if timed else dataclasses.replace(FILM, times=None, duration=None)
    text = words_of(video, 2.0 if timed else None)
    assert text.startswith("You are provided the following series of three frames from a ")
    batch = processor([video], ["User: <image>W\nYou"])
    expected = maker.tokenizer(f"User: {text}W\nYou").input_ids
    np.testing.assert_array_equal(ids_of(batch, 0, maker.image_token_id), expected)
    alone = maker.tokenizer(text, add_special_tokens=False).input_ids
    assert len(expected) < len("User: ") + len(alone) + len("W\nYou") - 1  # some were joined
    batch = processor([video], input_ids=[[5, -200, 6]])
    np.testing.assert_array_equal(ids_of(batch, 0, maker.image_token_id), [5, *alone, 6])
    (seen,) = batch.images.values()
    pixels = frames_of(video)
    np.testing.assert_allclose(np.moveaxis(seen.given.pixels[:3], -1, 1), pixels, atol=1e-6)


@pytest.mark.parametrize("total", [1, 20, 90, 5000])
@pytest.mark.parametrize("rate", [2.0, 29.97])
def test_frames_that_are_read(smolvlm, total: int, rate: float):
    (branch,) = smolvlm[2].config.branches
    its = SimpleNamespace(num_frames=8, fps=1)
    metadata = VideoMetadata(total_num_frames=total, fps=rate, duration=total / rate)
    expected = SmolVLMVideoProcessor.sample_frames(its, metadata)
    np.testing.assert_array_equal(branch.architecture.choose(total, rate), expected)


class Sizes(transformers.Idefics3ImageProcessorPil):
    """Pictures of its sizes, without pixels."""

    def resize(self, image: np.ndarray, size: Any, *args: object, **kwargs: object) -> np.ndarray:
        shape = (size.height, size.width)
        if size.longest_edge:
            shape = get_resize_output_image_size(image, size.longest_edge)
        return np.broadcast_to(np.uint8(0), (3, *shape))


@settings(max_examples=200)
@given(width=st.integers(1, 4000), height=st.integers(1, 4000), tile=st.sampled_from((364, 365)))
def test_ids_and_counts_of_any_size(smolvlm, width: int, height: int, tile: int):
    """At a published size of tiles, and an odd one."""
    (branch,) = smolvlm[2].config.branches
    images = dataclasses.replace(branch.architecture.images, size=tile, edge=tile)
    path = dataclasses.replace(branch.architecture, images=images, longest=4 * tile)
    edges = {"size": {"longest_edge": 4 * tile}, "max_image_size": {"longest_edge": tile}}
    its = Sizes(**edges)
    whole = its.resize(np.broadcast_to(np.uint8(0), (3, height, width)), its.size)
    canvas = its.resize_for_vision_encoder(whole, tile)
    tiles, rows, cols = its.split_images(canvas, edges["max_image_size"])
    grid = path.grid((width, height))
    assert grid == (cols, rows) and len(tiles) == rows * cols + 1
    run = path.run(grid)
    text = MAKER.replace_image_token({"rows": [[rows]], "cols": [[cols]]}, 0)
    expected = MAKER.tokenizer(text, add_special_tokens=False).input_ids
    found = np.where(run.text < 0, MAKER.image_token_id, run.text)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(run.indices[run.text < 0, 0], np.arange(4 * len(tiles)))
    assert len(run) <= path.tokens == len(path.run((4, 4)))


def inputs_of(images: Sequence, prompt: str) -> Any:
    """A row as transformers' model takes it."""
    if images == [FILM]:
        text = prompt.replace(PICTURE, words_of(FILM, 2.0))
        pixels = torch.from_numpy(frames_of(FILM))[None]
        mask = torch.ones_like(pixels[:, :, 0], dtype=torch.bool)
        seen = {"pixel_values": pixels, "pixel_attention_mask": mask}
        return {**MAKER.tokenizer([text], return_tensors="pt"), **seen}
    return MAKER(**({"images": [images]} if images else {}), text=[prompt], return_tensors="pt")


@torch.no_grad()
def test_rows(loaded):
    """Unequal ones, padded on either side: the tower, the connector and logits."""
    _, theirs, model, processor, _ = loaded
    film = [FILM] if theirs.config.model_type == "smolvlm" else [PICTURES[3]]
    rows, prompts = [*ROWS, film], [*PROMPTS, "<image>You"]
    for padding in ("right", "left"):
        batch = processor(rows, prompts, padding=padding)
        stages, logits = seen(model, batch)
        first = 0
        for i, (images, prompt) in enumerate(zip(rows, prompts, strict=True)):
            inputs = inputs_of(images, prompt)
            assert_close(logits[i][batch.mask[i]], theirs(**inputs).logits[0], (padding, i))
            if images:
                out = theirs.model.get_image_features(
                    inputs["pixel_values"], inputs["pixel_attention_mask"]
                )
                count = inputs["pixel_values"].shape[1]
                here = slice(first, first := first + count)
                assert_close(stages["vision_features"][here], out.last_hidden_state, i)
                tokens = stages["image_features"][here].reshape(-1, 32)
                assert_close(tokens, out.pooler_output[0], i)


@torch.no_grad()
def test_twenty_tokens(smolvlm):
    _, theirs, model, processor, _ = smolvlm
    rows, prompts = [[PICTURES[1]], [FILM]], ["Look: <image>", "<image>You"]
    found = generate_ids(model, processor(rows, prompts, padding="left"), max_new_tokens=20)
    for i, (images, prompt) in enumerate(zip(rows, prompts, strict=True)):
        inputs = inputs_of(images, prompt)
        out = theirs.generate(**inputs, max_new_tokens=20, do_sample=False, eos_token_id=None)
        assert found[i] == out[0, inputs["input_ids"].shape[1] :].tolist()


@torch.no_grad()
def test_eight_devices_and_bfloat16(smolvlm):
    """Sharded, to the last digits; rounded, about as near as transformers is."""
    path, theirs, model, processor, _ = smolvlm
    batch = processor([*ROWS, [FILM]], [*PROMPTS, "<image>You"])
    mesh = make_mesh(4, 2)
    sharded, _ = converters.load(path, mesh=mesh)
    _, plain = seen(model, batch)
    _, found = seen(sharded, batch)
    assert_close(np.asarray(found)[batch.mask], np.asarray(plain)[batch.mask])
    rounded, _ = converters.load(path, dtype="bfloat16")
    found = np.asarray(forward(rounded, batch))[1][batch.mask[1]]
    inputs = inputs_of(ROWS[1], PROMPTS[1])
    exact = theirs(**inputs).logits[0].numpy()
    other = copy.deepcopy(theirs).to(torch.bfloat16)(**inputs).logits[0].float().numpy()
    assert np.abs(found - exact).mean() < 1.5 * np.abs(other - exact).mean()


def test_export_reopens_in_transformers(loaded, tmp_path: Path):
    path, theirs, model, *_ = loaded
    converters.export(model, tmp_path / "out")
    again, report = type(theirs).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0)
    for name in ("processor_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (path / name).read_bytes()
    assert (json.loads((tmp_path / "out/config.json").read_text())) == json.loads(
        (path / "config.json").read_text()
    )


def test_the_folders_chat_template(loaded):
    *_, processor, maker = loaded
    said = {"type": "text", "text": "You?"}
    parts = [{"type": "image"}, {"type": "image"}, said]
    messages = [{"role": "user", "content": parts}]
    expected = maker.apply_chat_template(messages, add_generation_prompt=True)
    assert processor.chat("You?", images=2) == expected


def _deep(whole: dict, key: str, value: object) -> None:
    *path, last = key.split("/")
    for part in path:
        whole = whole[part]
    whole[last] = value


@pytest.mark.parametrize(
    ("file", "key", "value", "message"),
    [
        ("config.json", "scale_factor", 3, "image_seq_len: found 4, expected 1"),
        ("config.json", "new_key", 1, "new_key: found 1, expected no such key"),
        ("config.json", "vision_config/new_key", 1, "vision_config: new_key: found 1, expected"),
        ("config.json", "text_config/use_resampler", True, "use_resampler: found True, expected"),
        ("config.json", "image_token_id", 5, "<image>: found id "),
        ("processor_config.json", "image_seq_len", 5, "image_seq_len: found 5, expected 4, the"),
        ("processor_config.json", "frame_token", "x", "frame_token: found 'x', expected no such"),
        ("processor_config.json", "image_processor/do_resize", False, "do_resize: found False"),
        (
            "processor_config.json",
            "image_processor/size",
            {"height": 5, "width": 5},
            "size: found {'height': 5, 'width': 5}, expected {\"longest_edge\": pixels}",
        ),
        (
            "processor_config.json",
            "image_processor/image_processor_type",
            "CLIPImageProcessor",
            "image_processor_type: found 'CLIPImageProcessor', expected Idefics3ImageProcessor",
        ),
        ("processor_config.json", "video_processor/resample", 3, "resample: found 3, expected 1,"),
        ("config.json", "text_config/vocab_size", 270, "tokenizer: found id "),
    ],
)
def test_bad_folders(smolvlm, tmp_path: Path, file: str, key: str, value: object, message: str):
    folder = tmp_path / "port"
    folder.mkdir()
    for path in smolvlm[0].iterdir():
        (folder / path.name).symlink_to(path)
    whole = json.loads((folder / file).read_text())
    _deep(whole, key, value)
    (folder / file).unlink()
    write_json(folder / file, whole)
    with pytest.raises(InputError) as error:
        converters.load(folder)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["smolvlm", "idefics3"])
def test_the_pictures_token_where_config_json_does_not_say_it(smolvlm, tmp_path: Path, kind: str):
    """Its class does."""
    folder = shutil.copytree(smolvlm[0], tmp_path / "port")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": kind}
    del config["image_token_id"]
    write_json(folder / "config.json", config)
    default = transformers.AutoConfig.from_pretrained(folder).image_token_id
    assert open_source(folder).image_id == default


def test_a_tokenizer_without_the_marks(smolvlm, tmp_path: Path):
    folder = tmp_path / "port"
    shutil.copytree(smolvlm[0], folder)
    tokenizer_files(folder)
    with pytest.raises(InputError, match="tokenizer: found no special token <fake_token_around"):
        converters.load(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="found no tokenizer, which has the ids of what is writ"):
        converters.load(folder)
