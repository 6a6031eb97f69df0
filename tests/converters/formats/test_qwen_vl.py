"""Qwen2-VL's and Qwen2.5-VL's folders, against transformers' models and processors."""

import copy
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from PIL import Image
from safetensors.torch import load_file, save_file

import converters
from converters.inspect import inspect
from tests.checkpoints import changed, write_json
from tests.qwen_vl import (
    COMMON,
    IMAGE,
    IMAGES,
    MOVIE,
    PICTURE,
    SIZES,
    TEMPLATE,
    TEXT,
    VISION,
    Given,
    Port,
    assert_close,
    assert_ids,
    given,
    open_port,
    picture,
)
from vfjax import InputError, Video
from vfjax.generate import generate_ids
from vfjax.model import forward
from vfjax.sharding import make_mesh, place


@pytest.fixture(scope="module", params=VISION)
def port(request, tmp_path_factory) -> Port:
    return open_port(tmp_path_factory.mktemp(request.param) / "port", request.param)


@torch.no_grad()
def test_pictures_of_five_sizes(port: Port):
    """Ids, patches, logits."""
    prompt = port.processor.chat("What?")
    assert prompt == f"<|im_start|>user\n{PICTURE}What?<|im_end|>\n<|im_start|>assistant\n"
    for size in SIZES:
        inputs = given(port, prompt, [picture(*size)])
        batch = port.processor([picture(*size)], prompts=[prompt])
        assert_ids(batch, 0, inputs["input_ids"][0])
        expected = port.theirs(**inputs).logits[0].numpy()
        assert_close(np.asarray(forward(port.model, batch))[batch.mask], expected, size)


@torch.no_grad()
def test_rows_of_two_pictures_a_video_and_none(port: Port):
    """Padded on either side: logits of each row, and twenty tokens; bare placeholders."""
    frames = Given([picture(40, 24), picture(24, 40).resize((40, 24)), picture(40, 24)], 2.0)
    media: list = [[picture(61, 47), picture(30, 20)], [picture(20, 90), frames], []]
    prompts = [f"a{PICTURE}b{PICTURE}c", f"{PICTURE}of {MOVIE}?", "only words"]
    inputs = [given(port, *row) for row in zip(prompts, media, strict=True)]
    seen = [
        [Video(tuple(x.frames), duration=x.seconds) if isinstance(x, Given) else x for x in row]
        for row in media
    ]
    bare = [prompt.replace(PICTURE, "<image>").replace(MOVIE, "<image>") for prompt in prompts]
    for padding, texts in (("left", prompts), ("right", bare)):
        batch = port.processor(seen, prompts=texts, padding=padding)
        found = np.asarray(forward(port.model, batch))
        for i, row in enumerate(inputs):
            assert_ids(batch, i, row["input_ids"][0])
            expected = port.theirs(**row).logits[0].numpy()
            assert_close(found[i][batch.mask[i]], expected, (padding, i))
    answers = generate_ids(port.model, batch, max_new_tokens=20)
    for answer, row in zip(answers, inputs, strict=True):
        ids = port.theirs.generate(**row, max_new_tokens=20, do_sample=False, eos_token_id=-1)
        assert list(answer) == ids[0, row["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("port", ["qwen2_5_vl"], indirect=True)
def test_on_eight_devices_and_in_bfloat16(port: Port):
    """Sharded the same; narrow within its rounding of transformers' in the same dtype."""
    image, prompt = picture(120, 90), f"a{PICTURE}b"
    batch = port.processor([image, image], prompts=[prompt] * 2)
    whole = np.asarray(forward(port.model, batch))[batch.mask]
    mesh = make_mesh(2, 2, 2)
    sharded, _ = converters.load(port.path, mesh=mesh)
    assert_close(np.asarray(forward(sharded, place(batch, mesh)))[batch.mask], whole)
    narrow, _ = converters.load(port.path, dtype="bfloat16")
    theirs = copy.deepcopy(port.theirs).to(torch.bfloat16)
    with torch.no_grad():
        expected = theirs(**given(port, prompt, [image])).logits[0].float().numpy()
    found = np.asarray(forward(narrow, batch))[0][batch.mask[0]]
    exact = whole[: len(found)]
    assert np.abs(found - exact).max() < 2 * np.abs(expected - exact).max()


def test_export_reopens_in_transformers(port: Port, tmp_path: Path):
    converters.export(port.model, tmp_path / "out")
    again, report = type(port.theirs).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    for name, value in port.theirs.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0)
    names = {path.name for path in port.path.iterdir()}
    assert names - {path.name for path in (tmp_path / "out").iterdir()} <= {
        "generation_config.json"
    }
    assert "256 to 2,560 pixels" in inspect(tmp_path / "out")


def test_older_and_other_folders_are_the_same(port: Port, tmp_path: Path):
    """The hub's: the LLM's keys beside vision_config, older processors; memory's names."""
    kind = port.theirs.config.model_type
    folder = tmp_path / "hub"
    port.theirs.save_pretrained(folder, save_original_format=False)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).symlink_to(port.path / name)
    whole = json.loads((folder / "config.json").read_text())
    text, vision = whole.pop("text_config"), whole["vision_config"]
    rope = text.pop("rope_parameters")
    text |= {"rope_theta": rope["rope_theta"], "vision_token_id": 311}
    text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    if kind == "qwen2_5_vl":  # as transformers writes it again
        text["rope_scaling"]["rope_type"] = "default"
    text.pop("layer_types")
    vision["in_chans"] = vision.pop("in_channels")
    vision.pop("rope_parameters")
    vision.pop("model_type")
    write_json(folder / "config.json", {**text, **whole, "model_type": kind})
    processor = json.loads((port.path / "processor_config.json").read_text())
    image, video = processor["image_processor"], processor["video_processor"]
    for settings_ in (image, video):
        size = settings_.pop("size")
        settings_ |= {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    write_json(
        folder / "preprocessor_config.json", {**image, "processor_class": "Qwen2VLProcessor"}
    )
    write_json(folder / "video_preprocessor_config.json", video)
    model, its = converters.load(folder)
    assert model.config == port.model.config and its.chat_template == TEMPLATE
    same = zip(
        jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(port.model)), strict=True
    )
    assert all(np.array_equal(a, b) for a, b in same)
    theirs = type(port.theirs.config).from_pretrained(folder)
    assert theirs.text_config.rope_parameters["mrope_section"] == [2, 1, 1]


@pytest.mark.parametrize(
    ("port", "file", "changes", "message"),
    [
        (
            "qwen2_vl",
            "config.json",
            {"frames": 3},
            "config.json: frames: found 3, expected no such",
        ),
        (
            "qwen2_vl",
            "config.json",
            {"vision_config": {"depth": 3, "registers": 4}},
            "registers: found 4, expected no such key",
        ),
        (
            "qwen2_vl",
            "config.json",
            {"text_config": {**TEXT, "rope_parameters": {"mrope_section": [2, 2, 1]}}},
            "mrope_section: found [2, 2, 1], expected numbers with the sum 4",
        ),
        (
            "qwen2_5_vl",
            "config.json",
            {"vision_config": {**COMMON, **VISION["qwen2_5_vl"], "window_size": 6}},
            "window_size: found 6, expected pixels of a token at least, 8",
        ),
        (
            "qwen2_5_vl",
            "config.json",
            {"video_token_id": 320},
            "video_token_id: found 320, expected 315, the tokenizer's id of <|video_pad|>",
        ),
        (
            "qwen2_vl",
            "config.json",
            {"vision_config": {"model_type": "clip_vision_model"}},
            "vision_config: model_type: found 'clip_vision_model', expected 'qwen2_vl_vision'",
        ),
        (
            "qwen2_vl",
            "processor_config.json",
            {"image_processor": {"image_processor_type": "Qwen2VLImageProcessor"}},
            "image processor: patch_size: found None, expected 4, as the tower's",
        ),
        (
            "qwen2_vl",
            "processor_config.json",
            {"image_processor": {**IMAGES, "size": {"shortest_edge": 64}}},
            "size: found no key 'longest_edge'",
        ),
        (
            "qwen2_vl",
            "processor_config.json",
            {"tiles": 4},
            "processor_config.json: tiles: found 4, expected no such key",
        ),
        (
            "qwen2_vl",
            "processor_config.json",
            {"video_processor": [1]},
            "video_processor: found [1], expected a mapping",
        ),
        (
            "qwen2_vl",
            "processor_config.json",
            {"image_processor": {**IMAGES, "do_resize": False}},
            "do_resize: found False, expected true",
        ),
        (
            "qwen2_vl",
            "processor_config.json",
            {"image_processor": IMAGES, "video_processor": {**IMAGES, "size": {"height": 8}}},
            "videos: size: found no key 'shortest_edge'",
        ),
        (
            "qwen2_vl",
            "processor_config.json",
            {"image_processor": IMAGES, "video_processor": {**IMAGES, "do_rescale": None}},
            "videos: do_rescale: found None, expected true",
        ),
        (
            "qwen2_5_vl",
            "processor_config.json",
            {"image_processor": IMAGES, "video_processor": "Qwen2VLVideoProcessor"},
            "video_processor: found 'Qwen2VLVideoProcessor', expected a mapping",
        ),
    ],
    indirect=["port"],
)
def test_bad_folders(port: Port, tmp_path: Path, file: str, changes: dict, message: str):
    folder = changed(port.path, tmp_path / "port", file, changes)
    with pytest.raises(InputError) as error:
        converters.load(folder)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("port", ["qwen2_vl"], indirect=True)
@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([Image.new("RGB", (2, 401))], "a strip of 2x401 pixels, expected sides of at most 200"),
        ([Video((Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9))))], "frames of one size"),
        ([], "0 pictures for 1 <image> placeholder"),
    ],
)
def test_bad_pictures(port: Port, images: list, message: str):
    with pytest.raises(InputError, match=re.escape(message)):
        port.processor(images, input_ids=[[5, IMAGE]])


def test_a_missing_tensor(port: Port, tmp_path: Path):
    folder = tmp_path / "port"
    folder.mkdir()
    for path in port.path.iterdir():
        if path.name != "model.safetensors":
            (folder / path.name).symlink_to(path)
    state = load_file(port.path / "model.safetensors")
    del state["visual.merger.mlp.0.bias"]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(
        InputError, match="connector: mlp.0.bias: found 1 tensor missing, 0 unknown"
    ):
        converters.load(folder)
