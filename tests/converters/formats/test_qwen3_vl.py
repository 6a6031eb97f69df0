"""Qwen3-VL's folders, against transformers' models and processors."""

import copy
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from PIL import Image
from safetensors.torch import load_file, save_file

import converters
from converters.formats import qwen3_vl
from converters.params import qwen
from converters.values import Values
from tests.checkpoints import changed, write_json
from tests.qwen3_vl import TEXT, VISION, config, open_port, process, video_processor
from tests.qwen_vl import (
    FILM,
    IMAGES,
    MOVIE,
    PICTURE,
    TEMPLATE,
    Port,
    assert_close,
    assert_ids,
    picture,
)
from vfjax import Batch, InputError, Video
from vfjax.generate import generate_ids
from vfjax.model import forward
from vfjax.sharding import make_mesh, place


@pytest.fixture(scope="module")
def port(tmp_path_factory) -> Port:
    return open_port(tmp_path_factory.mktemp("qwen3_vl") / "port")


def rows() -> tuple[list[str], list[list[Image.Image | Video]]]:
    """Five sizes, two pictures, a picture and a video, and words alone."""
    frames = (picture(40, 24), picture(24, 40).resize((40, 24)), picture(41, 24).resize((40, 24)))
    video = Video(frames, times=(0.0, 0.5, 1.1))
    media: list[list[Image.Image | Video]] = [
        [picture(30, 500)],
        [picture(120, 90)],
        [picture(20, 20), picture(61, 47)],
        [picture(200, 33)],
        [picture(20, 90), video],
        [],
    ]
    prompts = [
        f"<|im_start|>user\n{PICTURE}What?<|im_end|>\n<|im_start|>assistant\n",
        f"{PICTURE}",
        f"a{PICTURE}b{PICTURE}c",
        f"word {PICTURE} word",
        f"{PICTURE}of {MOVIE}?",
        "only words",
    ]
    return prompts, media


def batch_of(port: Port, padding: str) -> Batch:
    prompts, media = rows()
    return port.processor(media, prompts=prompts, padding=padding)


@pytest.fixture(scope="module")
def inputs(port: Port) -> list[dict]:
    """Of each row what transformers' processor makes."""
    out = []
    for prompt, media in zip(*rows(), strict=True):
        pictures = [x for x in media if isinstance(x, Image.Image)]
        videos = [x for x in media if isinstance(x, Video)]
        out.append(process(port, prompt, pictures, videos))
    return out


@torch.no_grad()
def test_logits_and_twenty_tokens(port: Port, inputs: list[dict]):
    """Padded on either side, each row's are those that transformers gives it alone."""
    expected = [port.theirs(**row).logits[0].numpy() for row in inputs]
    for padding in ("left", "right"):
        batch = batch_of(port, padding)
        found = np.asarray(forward(port.model, batch))
        for i, row in enumerate(inputs):
            assert_ids(batch, i, row["input_ids"][0])
            assert_close(found[i][batch.mask[i]], expected[i], (padding, i))
    answers = generate_ids(port.model, batch, max_new_tokens=20)
    for answer, row in zip(answers, inputs, strict=True):
        ids = port.theirs.generate(**row, max_new_tokens=20, do_sample=False, eos_token_id=-1)
        assert list(answer) == ids[0, row["input_ids"].shape[1] :].tolist()


@torch.no_grad()
def test_on_eight_devices_and_in_bfloat16(port: Port, inputs: list[dict]):
    """Sharded the same; narrow within its rounding of transformers' in the same dtype."""
    batch = batch_of(port, "right")
    exact = np.asarray(forward(port.model, batch))
    mesh = make_mesh(2, 2, 2)
    sharded, _ = converters.load(port.path, mesh=mesh)
    found = np.asarray(forward(sharded, place(batch, mesh)))
    assert_close(found[batch.mask], exact[batch.mask])
    narrow, _ = converters.load(port.path, dtype="bfloat16")
    found = np.asarray(forward(narrow, batch))
    theirs = copy.deepcopy(port.theirs).to(torch.bfloat16)
    for i, row in enumerate(inputs):
        own, expected = exact[i][batch.mask[i]], theirs(**row).logits[0].float().numpy()
        assert np.abs(found[i][batch.mask[i]] - own).max() < 2 * np.abs(expected - own).max(), i


@pytest.mark.parametrize("size", [12, 64, 128])
@pytest.mark.parametrize("section", [None, [24, 20, 20], [3, 2, 1], [9, 30, 7], [0, 0, 2]])
def test_interleaved_positions_turn_as_transformers(size: int, section: list[int] | None):
    """Cosines and sines of random places: times, rows and columns."""
    rope = {"rope_type": "default", "rope_theta": 5e6}
    if section:
        rope["mrope_section"] = section
    given = {**TEXT, "head_dim": size, "rope_parameters": rope}
    whole = transformers.Qwen3VLConfig(text_config=given).text_config
    module = transformers.models.qwen3_vl.modeling_qwen3_vl.Qwen3VLTextRotaryEmbedding(whole)
    positions = np.random.default_rng(size).integers(0, 3000, (3, 2, 50))
    expected = module(torch.zeros(1), torch.tensor(positions))
    ours = qwen.qwen3_vl(Values(given, "text_config"))
    axes = np.asarray(ours.rope_axes)[None, None, None]
    for found, theirs in zip(ours.rope(positions), expected, strict=True):
        own = np.take_along_axis(np.asarray(found), axes, axis=0)[0]
        # torch rounds one power of 5e6 the other way, which tells at an angle of 3000 / 98
        np.testing.assert_allclose(own, theirs[..., : size // 2].numpy(), rtol=0, atol=1e-5)


def test_export_reopens_in_transformers(port: Port, tmp_path: Path):
    """Every tensor and file; the names are as they were."""
    converters.export(port.model, tmp_path / "out")
    again, report = type(port.theirs).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    for name, value in port.theirs.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0)
    names = {path.name for path in port.path.iterdir()} - {"generation_config.json"}
    assert names <= {path.name for path in (tmp_path / "out").iterdir()}
    mine, own = (load_file(path / "model.safetensors") for path in (tmp_path / "out", port.path))
    assert mine.keys() == own.keys()


def test_the_hubs_folders_are_the_same(port: Port, tmp_path: Path):
    """Of transformers 4: the rope's old keys, a tower called as the model, one file a processor."""
    folder = tmp_path / "hub"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).symlink_to(port.path / name)
    (folder / "model.safetensors").symlink_to(port.path / "model.safetensors")
    whole = json.loads((port.path / "config.json").read_text())
    text, vision = whole["text_config"], whole["vision_config"]
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope.pop("rope_theta")
    text["rope_scaling"] = rope
    vision.pop("rope_parameters")
    vision["model_type"] = "qwen3_vl"
    write_json(folder / "config.json", whole)
    processor = json.loads((port.path / "processor_config.json").read_text())
    image, video = processor["image_processor"], processor["video_processor"]
    image["image_processor_type"] = "Qwen2VLImageProcessorFast"
    video["max_pixels"] = 100  # which Qwen2VLVideoProcessor reads and this one does not
    assert video_processor(max_pixels=100).size["longest_edge"] == FILM["longest_edge"]
    write_json(folder / "preprocessor_config.json", image)
    write_json(folder / "video_preprocessor_config.json", video)
    model, its = converters.load(folder)
    assert model.config == port.model.config and its.chat_template == TEMPLATE
    same = zip(
        jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(port.model)), strict=True
    )
    assert all(np.array_equal(a, b) for a, b in same)


@pytest.mark.parametrize("text", [None, False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_the_whole_models_word_ties_the_head(tmp_path: Path, whole: bool, text: bool | None):
    own = {} if text is None else {"tie_word_embeddings": text}
    given = config(text_config=TEXT | own, tie_word_embeddings=whole).to_dict()
    given["text_config"] |= own
    source = qwen3_vl.describe(tmp_path, Values(given, "config.json"), None)
    assert source.llm["tie_word_embeddings"] == whole


BAD = [
    (
        "config.json",
        {"model_type": "qwen3_vl_moe"},
        "'qwen3_vl_moe'",
    ),
    ("config.json", {"frames": 3}, "config.json: frames: found 3, expected no such"),
    ("config.json", {"text_config": None}, "text_config: found None, expected a mapping"),
    (
        "config.json",
        {"vision_config": {**VISION, "registers": 4}},
        "registers: found 4, expected no such key",
    ),
    (
        "config.json",
        {"vision_config": {**VISION, "deepstack_visual_indexes": [0, 4]}},
        "deepstack_visual_indexes: found [0, 4], expected numbers of the 4 layers, ascending",
    ),
    (
        "config.json",
        {"vision_config": {**VISION, "deepstack_visual_indexes": [2, 0]}},
        "deepstack_visual_indexes: found [2, 0], expected numbers of the 4 layers, ascending",
    ),
    (
        "config.json",
        {"vision_config": {**VISION, "deepstack_visual_indexes": [0]}},
        "found 0 tensors missing, 6 unknown",
    ),
    (
        "config.json",
        {"vision_config": {**VISION, "num_position_embeddings": 24}},
        "num_position_embeddings: found 24, expected the square of a whole number",
    ),
    (
        "config.json",
        {"vision_config": {**VISION, "out_hidden_size": 16}},
        "16",
    ),
    (
        "config.json",
        {"text_config": {**TEXT, "rope_parameters": {"mrope_section": [2, 2]}}},
        "mrope_section: found [2, 2], expected three numbers",
    ),
    (
        "config.json",
        {"video_token_id": 320},
        "video_token_id: found 320, expected 315, the tokenizer's id of <|video_pad|>",
    ),
    (
        "config.json",
        {"vision_config": {**VISION, "model_type": "qwen2_vl_vision"}},
        "model_type: found 'qwen2_vl_vision', expected 'qwen3_vl_vision'",
    ),
    (
        "processor_config.json",
        {"image_processor": {**IMAGES, "patch_size": 14}},
        "image processor: patch_size: found 14, expected 4, as the tower's",
    ),
    (
        "processor_config.json",
        {"image_processor": IMAGES, "video_processor": {}},
        "video processor: patch_size: found 16, expected 4, as the tower's",
    ),
    (
        "processor_config.json",
        {"video_processor": {"video_processor_type": "Qwen2VLVideoProcessor"}},
        "video_processor_type: found 'Qwen2VLVideoProcessor', expected Qwen3VLVideoProcessor",
    ),
    (
        "processor_config.json",
        {"video_processor": {"patch_size": 4, "num_frames": 8, "fps": 2}},
        "num_frames: found 8, expected null beside fps",
    ),
    (
        "processor_config.json",
        {"video_processor": {"patch_size": 4, "crop": 8}},
        "crop: found 8, expected no such key",
    ),
    (
        "processor_config.json",
        {"video_processor": {"patch_size": 4, "do_rescale": None}},
        "videos: do_rescale: found None, expected true",
    ),
]


@pytest.mark.parametrize(("file", "changes", "message"), BAD)
def test_bad_folders(port: Port, tmp_path: Path, file: str, changes: dict, message: str):
    folder = changed(port.path, tmp_path / "port", file, changes)
    with pytest.raises(InputError) as error:
        converters.load(folder)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.visual.pos_embed.weight", "encoder: pos_embed.weight: found 1 tensor missing"),
        (
            "model.visual.deepstack_merger_list.1.norm.bias",
            "deepstack_merger_list.1.norm.bias: found 1 tensor missing, 0 unknown",
        ),
    ],
)
def test_a_missing_tensor(port: Port, tmp_path: Path, name: str, message: str):
    for path in port.path.iterdir():
        if path.name != "model.safetensors":
            (tmp_path / path.name).symlink_to(path)
    state = load_file(port.path / "model.safetensors")
    del state[name]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(InputError) as error:
        converters.load(tmp_path)
    assert message in str(error.value)
