"""LLaVA-OneVision-1.5's folders, against what the authors' code was recorded to make of them."""

from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import converters
from tests.checkpoints import changed, write_json
from tests.onevision15 import CONFIG, FRAMES, IMAGES, RECORDED, ROWS, prompt, shapes, values, write
from tests.qwen_vl import IMAGE, VIDEO, assert_close, picture
from vfjax import Batch, InputError, Model, Processor, Video
from vfjax.generate import generate_ids
from vfjax.model import forward
from vfjax.sharding import make_mesh, place

Port = tuple[Path, Model, Processor]


@pytest.fixture(scope="module")
def port(tmp_path_factory) -> Port:
    path = write(tmp_path_factory.mktemp("onevision15") / "port")
    model, processor = converters.load(path)
    processor.lengths = (128,)  # one compilation
    return path, model, processor


def batch_of(processor: Processor, padding: str) -> Batch:
    ids = [prompt(i) for i in range(len(ROWS))]
    return processor([list(row) for row in ROWS], input_ids=ids, padding=padding)


def test_the_tower(port: Port):
    """Pixels, hidden states, visual tokens; the frames of all rows in one sequence."""
    _, model, processor = port
    batch = batch_of(processor, "right")
    (seen,) = batch.images.values()
    branch = model.branches["rice"]
    states = jax.jit(lambda b, x: b.encoder(x.pixels, (-1,), **x.where))(branch, seen.given)
    memory = np.asarray(jax.jit(Model.visual_tokens)(model, batch.images).values)
    first = 0
    for i in range(len(ROWS)):
        if f"{i}/features" not in RECORDED:
            continue
        features = RECORDED[f"{i}/features"]
        own = batch.visual[i][batch.visual[i] >= 0]
        assert_close(memory[own], features, i)
        slots = seen.given.kept[4 * first : 4 * first + 8]
        np.testing.assert_allclose(seen.given.pixels[slots[:4]], RECORDED[f"{i}/pixels"], atol=1e-6)
        assert_close(np.asarray(states[0])[0, 4 * first : 4 * first + 8], RECORDED[f"{i}/states"])
        first += len(features)


def test_ids_logits_and_twenty_tokens(port: Port):
    """Padded on either side, each row's are the authors'."""
    _, model, processor = port
    for padding in ("left", "right"):
        batch = batch_of(processor, padding)
        found = np.asarray(forward(model, batch))
        for i in range(len(ROWS)):
            ids = np.where(batch.visual[i] >= 0, IMAGE, batch.tokens[i])[batch.mask[i]]
            expected = RECORDED[f"{i}/input_ids"]
            assert ids.tolist() == np.where(expected == VIDEO, IMAGE, expected).tolist()
            last = RECORDED[f"{i}/logits"]
            assert_close(found[i][batch.mask[i]][-len(last) :], last, (padding, i))
    for i, answer in enumerate(generate_ids(model, batch, max_new_tokens=20)):
        assert list(answer) == RECORDED[f"{i}/answer"].tolist(), i


def test_on_eight_devices_and_in_bfloat16(port: Port):
    """Sharded the same; narrow within what bfloat16 weights alone change."""
    path, model, processor = port
    batch = batch_of(processor, "right")
    exact = np.asarray(forward(model, batch))[batch.mask]
    mesh = make_mesh(2, 2, 2)
    sharded, _ = converters.load(path, mesh=mesh)
    assert_close(np.asarray(forward(sharded, place(batch, mesh)))[batch.mask], exact)
    narrow, _ = converters.load(path, dtype="bfloat16")
    found = np.asarray(forward(narrow, batch))[batch.mask]
    assert np.abs(found - exact).max() < 0.05 * np.abs(exact).max()


def test_export_is_the_folder(port: Port, tmp_path: Path):
    path, model, _ = port
    converters.export(model, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == shapes().keys()
    for name, shape in shapes().items():
        np.testing.assert_array_equal(found[name], values(name, shape))
    assert {x.name for x in path.iterdir()} <= {x.name for x in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize(
    "file, changes, found",
    [
        ("config.json", {"vision_config": {**CONFIG["vision_config"], "num_heads": 3}}, "heads of"),
        ("config.json", {"vision_config": {**CONFIG["vision_config"], "window": 3}}, "window"),
        ("config.json", {"text_config": {**CONFIG["text_config"], "qk": 1}}, "qk"),
        ("config.json", {"image_token_id": 400}, "below 320"),
        ("config.json", {"stride": 2}, "stride"),
        ("preprocessor_config.json", {**IMAGES, "temporal_patch_size": 2}, "as the tower's"),
    ],
)
def test_bad_input(port: Port, tmp_path: Path, file: str, changes: dict, found: str):
    folder = changed(port[0], tmp_path / "bad", file, changes)
    with pytest.raises(InputError, match=found):
        converters.load(folder)


def test_videos_that_the_folder_cuts_otherwise(port: Port, tmp_path: Path):
    """A video processor of two frames a patch: pictures are read, videos are refused."""
    settings = {"temporal_patch_size": 2, "patch_size": 4}
    folder = changed(port[0], tmp_path / "two", "config.json", {})
    write_json(folder / "video_preprocessor_config.json", settings)
    processor = converters.load(folder)[1]
    processor([[picture(20, 20)]], input_ids=[[-200]])
    with pytest.raises(InputError, match="temporal_patch_size"):
        processor([[Video(FRAMES)]], input_ids=[[-200]])
