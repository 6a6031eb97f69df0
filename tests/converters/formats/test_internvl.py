"""Transformers' folders of InternVL, as it computes, and their export."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
import transformers
from hypothesis import strategies as st

import converters
import vfjax
from tests.checkpoints import changed, hf_llava_folder, llama_folder, make_llama, tuned, write_json
from tests.internvl import (
    IMAGE,
    assert_close,
    picture,
    port_folder,
    reference,
)
from vfjax import InputError, Model, Video
from vfjax.model import forward
from vfjax.sharding import make_mesh


@pytest.fixture(scope="module")
def port(tmp_path_factory) -> tuple[Path, Any, Any, Model, Any]:
    path = tmp_path_factory.mktemp("internvl") / "port"
    theirs, their_processor = port_folder(path)
    model, processor = converters.load(path)
    processor.lengths = (128,)  # one compilation
    return path, theirs, their_processor, model, processor


SIZES = [(4, 60), (20, 20), (150, 112), (84, 61), (47, 61)]


def test_a_picture(port):
    """Tiles by the nearest aspect, marks and tokens as the processor writes them, their pixels."""
    _, theirs, maker, model, processor = port
    for size in SIZES:
        image = picture(*size)
        inputs = maker(images=[image], text="a <IMG_CONTEXT> b", return_tensors="pt")
        ids = [-200 if i == IMAGE else i for i in maker.tokenizer("a <IMG_CONTEXT> b").input_ids]
        batch = processor([image], input_ids=[ids])
        again = processor([image], ["a <image> b"])
        ours = np.where(batch.visual[0] >= 0, IMAGE, batch.tokens[0])[batch.mask[0]]
        assert ours.tolist() == inputs["input_ids"][0].tolist(), size
        assert (batch.tokens == again.tokens).all() and (batch.visual == again.visual).all()
        (seen,) = batch.images.values()
        pixels = np.moveaxis(inputs["pixel_values"].numpy(), 1, -1)
        np.testing.assert_allclose(seen.given.pixels[: len(pixels)], pixels, rtol=0, atol=2e-7)
        assert_close(np.asarray(forward(model, batch))[batch.mask], reference(theirs, inputs), size)


def test_rows_of_several_pictures_a_video_and_none(port):
    """Padded on either side; taps, connector, logits and greedy tokens."""
    _, theirs, maker, model, processor = port
    film = [picture(150, 40).crop((50 * k, 0, 50 * k + 50, 40)) for k in range(3)]
    rows = [
        ("<IMG_CONTEXT>\nx <IMG_CONTEXT> y", [picture(60, 20), picture(30, 31)], None),
        ("<video>\nwhat?", [], film),
        ("only words", [], None),
    ]
    every = [
        maker(
            text=text,
            images=images or None,
            videos=[frames] if frames else None,
            return_tensors="pt",
        )
        for text, images, frames in rows
    ]
    prompts = [text.replace("<IMG_CONTEXT>", "<image>") for text, *_ in rows]
    prompts[1] = "<image>\nwhat?"
    media: list = [rows[0][1], [Video(tuple(film))], []]
    for padding in ("left", "right"):
        batch = processor(media, prompts, padding=padding)
        ours = np.where(batch.visual >= 0, IMAGE, batch.tokens)
        found = np.asarray(forward(model, batch))
        for i, inputs in enumerate(every):
            assert ours[i][batch.mask[i]].tolist() == inputs["input_ids"][0].tolist()
            assert_close(found[i][batch.mask[i]], reference(theirs, inputs), rows[i][0])
    (seen,) = batch.images.values()
    pixels = torch.cat([x["pixel_values"] for x in every if "pixel_values" in x])
    branch = model.branches["internvl"]
    encoded = branch.encode(seen.given)
    with torch.no_grad():
        tower = theirs.model.vision_tower(pixel_values=pixels)
        tokens = theirs.model.get_image_features(pixels).pooler_output
    (state,) = encoded.states["encoder"]
    assert_close(np.asarray(state[: len(pixels)]), tower.last_hidden_state.numpy())
    values = branch.visual_tokens(encoded, model.llm.lookup).values
    assert_close(np.asarray(values)[: tokens[..., 0].numel()], tokens.flatten(0, 1).numpy())
    batch = processor(media, prompts, padding="left")
    generated = vfjax.generate_ids(model, batch, max_new_tokens=20)
    theirs.generation_config.eos_token_id = None
    for inputs, row in zip(every, generated, strict=True):
        expected = theirs.generate(**inputs, max_new_tokens=20, do_sample=False, pad_token_id=0)
        assert row == expected[0, inputs["input_ids"].shape[1] :].tolist()


@hypothesis.given(
    size=st.tuples(st.integers(3, 2000), st.integers(3, 2000)),
    tile=st.sampled_from([28, 448]),
    tiles=st.tuples(st.integers(1, 13), st.integers(1, 13)).map(sorted),
)
@hypothesis.settings(max_examples=200)
def test_tokens_of_any_size(port, size: tuple[int, int], tile: int, tiles: list[int]):
    _, _, maker, model, _ = port
    ours = dataclasses.replace(
        model.config.branches[0].architecture,
        images=dataclasses.replace(model.config.branches[0].architecture.images, size=tile),
        least=tiles[0],
        most=tiles[1],
    )
    options = {"crop_to_patches": True, "min_patches": tiles[0], "max_patches": tiles[1]}
    options["patch_size"] = {"height": tile, "width": tile}
    count = maker.image_processor.get_number_of_image_patches(size[1], size[0], options)
    assert len(ours.regions(size)) == 2 + 4 * count <= ours.tokens


def test_as_the_devices_have_it(port):
    """Over eight devices, and in bfloat16 within its rounding."""
    path, theirs, maker, *_ = port
    image, text = picture(61, 47), "a <IMG_CONTEXT> b"
    inputs = maker(images=[image], text=text, return_tensors="pt")
    expected = reference(theirs, inputs)
    model, processor = converters.load(path, mesh=make_mesh(4, 2))
    processor.lengths = (64,)
    batch = processor([image] * 4, ["a <image> b"] * 4)
    assert_close(np.asarray(forward(model, batch))[0][batch.mask[0]], expected)
    model, processor = converters.load(path, dtype="bfloat16")
    processor.lengths = (64,)
    batch = processor([image], ["a <image> b"])
    found = np.asarray(forward(model, batch), np.float32)[batch.mask]
    half = reference(
        copy.deepcopy(theirs).bfloat16(),
        inputs | {"pixel_values": inputs["pixel_values"].bfloat16()},
    )
    wide = np.abs(expected).max()
    assert np.abs(found - expected).max() < 2 * np.abs(half - expected).max() < 0.2 * wide


def test_export_reopens_in_transformers(port, tmp_path: Path):
    _, theirs, _, model, _ = port
    converters.export(model, tmp_path / "out")
    again, report = transformers.InternVLForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report.values())
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("text", "vision", "config"),
    [
        (
            "qwen3",
            {"norm_type": "rms_norm", "attention_bias": False, "use_qk_norm": False},
            {"vision_feature_layer": -2, "downsample_ratio": 0.25, "tie_word_embeddings": True},
        ),
        ("llama", {"use_mean_pooling": False, "use_mask_token": True, "image_size": 42}, {}),
    ],
)
def test_other_ports(tmp_path: Path, text: str, vision: dict, config: dict):
    """Norms, taps, blocks of 16 patches, a tied head; a position table of other pictures."""
    theirs, _ = port_folder(tmp_path / "port", text, vision, **config)
    if "downsample_ratio" in config:
        file = tmp_path / "port/processor_config.json"
        write_json(file, json.loads(file.read_text()) | {"image_seq_length": 1})
    model, processor = converters.load(tmp_path / "port")
    processor.lengths = (64,)
    batch = processor([picture(61, 47)], input_ids=[[1, -200, 7]])
    (seen,) = batch.images.values()
    ids = np.where(batch.visual >= 0, IMAGE, batch.tokens)[batch.mask]
    count = (batch.visual >= 0).sum() // model.config.branches[0].architecture.side ** 2
    pixels = torch.from_numpy(np.moveaxis(seen.given.pixels[:count], -1, 1).copy())
    expected = reference(theirs, {"input_ids": torch.from_numpy(ids)[None], "pixel_values": pixels})
    assert_close(np.asarray(forward(model, batch))[batch.mask], expected)


def test_template(port):
    """The folder's own, as transformers renders it, with a system text, pictures and turns."""
    _, _, maker, _, processor = port
    assert processor.template == "chat_template"
    told = [{"type": "image"}, {"type": "text", "text": "what?"}]
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": told},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        {"role": "user", "content": told},
    ]
    expected = maker.apply_chat_template(messages, add_generation_prompt=True)
    assert processor.render_messages(messages) == expected
    images = [picture(60, 20), picture(20, 20)]
    whole = maker(images=images, text=expected, add_special_tokens=False)["input_ids"][0]
    batch = processor(images, [expected])
    assert np.where(batch.visual >= 0, IMAGE, batch.tokens)[batch.mask].tolist() == whole


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"downsample_ratio": 0.3}, "downsample_ratio: found 0.3, expected 1, or"),
        ("config.json", {"downsample_ratio": 0.125}, "found blocks of 8 patches a side, of 4 of"),
        ("config.json", {"vision_feature_layer": [-1, -2]}, "found [-1, -2], expected one layer"),
        ("config.json", {"vision_feature_select_strategy": "full"}, "found 'full', expected"),
        ("config.json", {"text_config": {"model_type": "qwen3_moe"}}, "model_type 'qwen3_moe'"),
        ("config.json", {"text_config": {"model_type": "gpt_oss"}}, "model_type 'gpt_oss'"),
        ("config.json", {"use_registers": 4}, "use_registers: found 4, expected no such key"),
        ("processor_config.json", {"image_seq_length": 5}, "image_seq_length: found 5, expected 4"),
        (
            "processor_config.json",
            {"video_processor": {"size": {"height": 14, "width": 14}}},
            "video processor: size: found {'height': 14, 'width': 14}, expected",
        ),
        (
            "processor_config.json",
            {"image_processor": {"size": {"height": 28}}},
            "image processor: size: found {'height': 28}, expected",
        ),
        (
            "processor_config.json",
            {"image_processor": {"size": {"height": 28, "width": 28}, "do_rescale": None}},
            "image processor: do_rescale: found None, expected true",
        ),
        (
            "processor_config.json",
            {"video_processor": {"video_processor_type": "Qwen2VLVideoProcessor"}},
            "video_processor_type: found 'Qwen2VLVideoProcessor', expected InternVLVideoProcessor",
        ),
        ("processor_config.json", {"video_processor": 7}, "video_processor: found 7, expected a"),
        (
            "tokenizer_config.json",
            {"context_image_token": "<pic>"},
            "<pic>: found id 263 in the tok",
        ),
    ],
)
def test_bad_ports(port, tmp_path: Path, file: str, changes: dict, message: str):
    with pytest.raises(InputError) as error:
        converters.load(changed(port[0], tmp_path / "bad", file, changes))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_fused_with_another_member_of_its_base(tmp_path: Path):
    """Marks and tokens are the member's own; a tokenizer without its marks is refused at once."""
    base = make_llama(0, model_type="qwen2")
    llama_folder(tmp_path / "base", llm=base)
    theirs, _ = port_folder(tmp_path / "intern")
    theirs.model.language_model.load_state_dict(tuned(base, 1).model.state_dict())
    theirs.lm_head.load_state_dict(base.lm_head.state_dict())
    theirs.save_pretrained(tmp_path / "intern")
    hf_llava_folder(tmp_path / "llava", 2, text={"model_type": "qwen2"})
    other = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava")
    other.model.language_model.load_state_dict(tuned(base, 2).model.state_dict())
    other.lm_head.load_state_dict(base.lm_head.state_dict())
    other.save_pretrained(tmp_path / "llava")
    members = {name: tmp_path / name for name in ("llava", "intern")}
    with pytest.raises(InputError, match="'<img>', which stands around .* vocab='intern' keeps"):
        converters.fuse(members, tmp_path / "out", base=tmp_path / "base", vocab="llava")
    converters.fuse(members, tmp_path / "out", base=tmp_path / "base")
    _, processor = converters.load(tmp_path / "out")
    _, alone = converters.load(tmp_path / "intern")
    image, ids = picture(61, 47), [1, -200, 7]
    batch, mine = processor([image], input_ids=[ids]), alone([image], input_ids=[ids])
    (row,), (own,) = batch.tokens[batch.segments == 2][None], mine.tokens[mine.segments == 1][None]
    assert row.tolist() == own.tolist() and {259, 260} <= set(row.tolist())
    np.testing.assert_array_equal(
        batch.images["intern"].given.pixels, mine.images["internvl"].given.pixels
    )
