"""LLaVA-OneVision's folders: the port of transformers as it computes, the authors', fused ones."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import converters
from converters import open_source
from tests.checkpoints import (
    LLAMA,
    NEXT_PINPOINTS,
    changed,
    llama_folder,
    llava_next_folder,
    make_llama,
    preprocessor,
    published,
    tokenizer_files,
    tuned,
    write_json,
)
from tests.onevision import (
    GRIDS,
    picture,
    port_folder,
    reference,
)
from tests.torch_fused import logits_of, open_in_torch
from vfjax import InputError, Model, Video
from vfjax.model import forward


@pytest.fixture(scope="module")
def port(tmp_path_factory) -> tuple[Path, Any, Model, Any]:
    path = tmp_path_factory.mktemp("onevision") / "port"
    theirs = port_folder(path)
    model, processor = converters.load(path)
    processor.lengths = (320,)  # one compilation
    return path, theirs, model, processor


def assert_close(found: np.ndarray, expected: np.ndarray, what: object = "") -> None:
    assert found.shape == expected.shape, what
    np.testing.assert_allclose(
        found, expected, rtol=0, atol=1e-4 * np.abs(expected).max(), err_msg=str(what)
    )


SIZES = [(20, 20), (180, 60), (25, 400), (84, 84), (61, 47)]


def test_a_lone_picture(port):
    """One canvas, wide and thin ones, a shrunk raster; the number of tokens is transformers'."""
    _, theirs, model, processor = port
    row = [1, -200, 7, 200]
    shrunk = []
    for size in SIZES:
        batch = processor([picture(*size)], input_ids=[row])
        (seen,) = batch.images.values()
        shrunk.append(seen.gather is not None)
        expected = reference(theirs, row, [picture(*size)], None)
        assert_close(np.asarray(forward(model, batch))[batch.mask], expected, size)
    assert any(shrunk) and not all(shrunk)


def test_rows_of_several_pictures_a_video_and_none(port):
    """Padded on the left: of several pictures each is one view, of a video each frame a quarter."""
    _, theirs, model, processor = port
    film = [picture(50 + k, 40) for k in range(3)]
    several = [picture(60, 20), picture(30, 70)]
    rows = [[1, -200, 9, -200, 4], [1, -201, 8, -200], [1, 7, 5]]
    ids = [[-200 if i == -201 else i for i in row] for row in rows]
    alone = picture(61, 47)
    images: list = [several, [Video(tuple(film)), alone], []]
    batch = processor(images, input_ids=ids, padding="left")
    found = np.asarray(forward(model, batch))
    for i, (seen, frames) in enumerate(((several, None), ([alone], film), ([], None))):
        expected = reference(theirs, rows[i], seen, frames)
        assert_close(found[i][batch.mask[i]], expected, rows[i])


def test_export_reopens_in_transformers(port, tmp_path: Path):
    _, theirs, model, _ = port
    converters.export(model, tmp_path / "out")
    again, report = transformers.LlavaOnevisionForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report.values())
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0)


def authors_folder(path: Path, theirs: Any, **config: Any) -> None:
    """The same weights as LLaVA-NeXT's code has them: the tower lacks its last layer."""
    (path / "tower").mkdir(parents=True)
    tower = theirs.model.vision_tower
    write_json(path / "tower/preprocessor_config.json", preprocessor(tower.config))
    write_json(path / "tower/config.json", tower.config.to_dict())
    state = {}
    for name, value in published(theirs).items():
        for old, new in (
            ("language_model.", ""),
            ("vision_tower.", "model.vision_tower.vision_tower.vision_model."),
            ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
            ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
            ("image_newline", "model.image_newline"),
        ):
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        if "encoder.layers.2." not in name:
            state[name] = value.clone()
    save_file(state, path / "model.safetensors", {"format": "pt"})
    text = theirs.config.text_config.to_dict()
    text["rope_theta"] = text.pop("rope_parameters")["rope_theta"]
    own = {
        "architectures": ["LlavaQwenForCausalLM"],
        "model_type": "llava_qwen",
        "image_aspect_ratio": "anyres_max_3",
        "image_grid_pinpoints": "(1x1),...,(3x3)",
        "mm_hidden_size": 24,
        "mm_newline_position": "one_token",
        "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_type": "mlp2x_gelu",
        "mm_spatial_pool_mode": "bilinear",
        "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "tower",
        "use_mm_proj": True,
    }
    write_json(path / "config.json", text | own | config)
    tokenizer_files(path)


def test_the_authors_folder(port, tmp_path: Path):
    """Reads as the port with the layer before the last one, but for its order of canvases."""
    _, theirs, *_ = port
    authors_folder(tmp_path / "own", theirs)
    model, processor = converters.load(tmp_path / "own")
    processor.lengths = (320,)
    assert processor.template == "qwen_1_5"
    assert model.branches["siglip"].config.encoder.layers == 2
    theirs.config.vision_feature_layer = -2
    try:
        expected = reference(theirs, [1, -200, 9], [picture(180, 60)], None)
    finally:
        theirs.config.vision_feature_layer = -1
    batch = processor([picture(180, 60)], input_ids=[[1, -200, 9]])
    assert_close(np.asarray(forward(model, batch))[batch.mask], expected)
    converters.export(model, tmp_path / "out")
    names = load_file(tmp_path / "own/model.safetensors")
    again = load_file(tmp_path / "out/model.safetensors")
    assert names.keys() == again.keys()
    assert all(torch.equal(again[name], value) for name, value in names.items())


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (
            "config.json",
            {"vision_aspect_ratio": "anyres"},
            "vision_aspect_ratio: found 'anyres'",
        ),
        ("processor_config.json", {"num_image_tokens": 15}, "num_image_tokens: found 15, expect"),
        (
            "processor_config.json",
            {"vision_aspect_ratio": "anyres_max_9"},
            "vision_aspect_ratio: found 'anyres_max_9', expected anyres_max_3, as the model's",
        ),
        ("processor_config.json", {"frame_token": "x"}, "frame_token: found 'x', expected no such"),
        (
            "processor_config.json",
            {"video_processor": {"size": {"height": 14, "width": 14}}},
            "video processor: size: found {'height': 14, 'width': 14}, expected",
        ),
        ("config.json", {"image_grid_pinpoints": [[28, 28]]}, "image_grid_pinpoints: found"),
        (
            "config.json",
            {"vision_feature_select_strategy": "default"},
            "connector: found 15 tokens a view, expected a square of them",
        ),
    ],
)
def test_bad_ports(port, tmp_path: Path, file: str, changes: dict, message: str):
    folder = changed(port[0], tmp_path / "port", file, changes)
    with pytest.raises(InputError) as error:
        converters.load(folder)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_pictures_token_where_config_json_does_not_say_it(port, tmp_path: Path):
    """Its class does."""
    folder = shutil.copytree(port[0], tmp_path / "port")
    config = json.loads((folder / "config.json").read_text())
    del config["image_token_index"]
    write_json(folder / "config.json", config)
    default = transformers.AutoConfig.from_pretrained(folder).image_token_id
    assert open_source(folder).image_id == default


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"image_aspect_ratio": "pad"},
            "image_aspect_ratio: found ",
        ),
        ({"mm_newline_position": "grid"}, "mm_newline_position: found 'grid', expected"),
        ({"mm_spatial_pool_mode": "max"}, "mm_spatial_pool_mode: found 'max', expected"),
        ({"mm_spatial_pool_stride": 4}, "mm_spatial_pool_stride: found 4, expected 2"),
        ({"add_faster_video": True}, "add_faster_video: found True, expected"),
    ],
)
def test_bad_authors_folders(port, tmp_path: Path, changes: dict, message: str):
    authors_folder(tmp_path / "own", port[1], **changes)
    with pytest.raises(InputError) as error:
        open_source(tmp_path / "own")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_fused_with_other_members_of_a_base(tmp_path: Path):
    """Beside LLaVA-NeXT's tiles and a text expert; each branch's tokens are its member's own.

    In transformers, too.
    """
    base = make_llama(0, model_type="qwen2")
    llama_folder(tmp_path / "base", llm=base)
    llama_folder(tmp_path / "text", llm=tuned(base, 1))
    port_folder(tmp_path / "onevision", tuned(base, 2))
    llava_next_folder(tmp_path / "next", 3, text={"model_type": "qwen2"})
    other = tuned(base, 3)
    theirs = transformers.LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "next")
    theirs.model.language_model.load_state_dict(other.model.state_dict())
    theirs.lm_head.load_state_dict(other.lm_head.state_dict())
    theirs.save_pretrained(tmp_path / "next")
    members = {name: tmp_path / name for name in ("onevision", "next", "text")}
    converters.fuse(members, tmp_path / "out", base=tmp_path / "base")
    model, processor = converters.load(tmp_path / "out")
    assert [b.name for b in model.config.branches] == ["onevision", "next"]
    image, tokens = picture(84, 84), jax.jit(Model.visual_tokens)
    batch = processor([image], input_ids=[[1, -200, 7]])
    of = np.asarray(tokens(model, batch.images).values)[batch.visual[batch.visual >= 0]]
    own = []
    for name in ("onevision", "next"):
        alone, maker = converters.load(members[name])
        mine = maker([image], input_ids=[[1, -200, 7]])
        memory = np.asarray(tokens(alone, mine.images).values)
        own.append(memory[mine.visual[mine.visual >= 0]])
    np.testing.assert_allclose(of, np.concatenate(own), rtol=0, atol=1e-5)
    expected = np.asarray(forward(model, batch))[batch.mask]
    assert_close(logits_of(open_in_torch(tmp_path / "out"), batch), expected)
    assert LLAMA["vocab_size"] == model.config.llm.vocab and NEXT_PINPOINTS != GRIDS
