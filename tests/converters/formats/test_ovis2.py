"""Ovis2's folders, as transformers' model and processor compute them."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import hypothesis
import jax
import numpy as np
import pytest
import torch
import transformers
from hypothesis import strategies as st
from PIL import Image

import converters
import vfjax
from converters.files.reader import read_file
from tests.checkpoints import randomize, text_config, tokenizer_files, write_json
from vfjax import InputError, Model
from vfjax.model import forward
from vfjax.sharding import make_mesh

IMAGE, INDICATORS = 259, [260, 261, 262, 263, 264]
SPECIAL = [f"<IMG_{name}>" for name in ("ATOM", "START", "GRID", "COL", "ROW", "END")]
CHAT = (
    "<s>system\nBe brief.</s>\n{% for m in messages %}{{ '<s>' + m['role'] + '\n' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ '<image>\n' }}{% elif c['type'] == 'text' %}{{ c['text'] }}"
    "{% endif %}{% endfor %}{% endif %}{{ '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
    "rms_norm_eps": 1e-3,
    "vocab_size": 48,
    "hidden_stride": 2,
}


def make_processor(path: Path, length: int = 4, **images: Any) -> transformers.Ovis2Processor:
    """Transformers' own, whose pictures are `<image>` whatever the tokenizer calls its picture
    token; those that it writes have the ids 259 to 264.
    """
    tokenizer_files(path)
    engine = transformers.AutoTokenizer.from_pretrained(path).backend_tokenizer
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=engine, **special, extra_special_tokens={"image_token": SPECIAL[0]}
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    own = transformers.Ovis2ImageProcessorPil(
        **{"size": {"height": 28, "width": 28}, "max_patches": 6, "crop_to_patches": True} | images
    )
    return transformers.Ovis2Processor(own, tokenizer, image_seq_length=length, chat_template=CHAT)


def make_folder(
    path: Path, vision: dict | None = None, images: dict | None = None, length: int = 4, **own: Any
) -> tuple[transformers.Ovis2ForConditionalGeneration, transformers.Ovis2Processor]:
    """Model and processor as transformers writes them."""
    theirs = transformers.Ovis2ForConditionalGeneration(
        transformers.Ovis2Config(
            vision_config={**VISION, **(vision or {})},
            text_config=text_config(model_type="qwen2").to_dict(),
            **{
                "image_token_id": IMAGE,
                "visual_indicator_token_ids": INDICATORS,
                "hidden_size": 32,
                "vocab_size": 320,
                "tie_word_embeddings": False,
            }
            | own,
        )
    )
    randomize(theirs, 5)
    theirs.save_pretrained(path)
    maker = make_processor(path, length, **(images or {}))
    maker.save_pretrained(path)
    return theirs, maker


@pytest.fixture(scope="module")
def port(tmp_path_factory) -> tuple[Path, Any, Any, Model, Any]:
    path = tmp_path_factory.mktemp("ovis2") / "port"
    theirs, maker = make_folder(path)
    model, processor = converters.load(path)
    processor.lengths = (128,)  # one compilation
    return path, theirs, maker, model, processor


def picture(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng((width, height))
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def assert_close(found: Any, expected: Any, what: object = "") -> None:
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape, what
    np.testing.assert_allclose(
        found, expected, rtol=0, atol=1e-4 * np.abs(expected).max(), err_msg=str(what)
    )


@torch.no_grad()
def reference(theirs: Any, inputs: dict) -> np.ndarray:
    return theirs(**inputs).logits[0].float().numpy()


def theirs_ids(batch: Any, row: int, model: Model) -> list[int]:
    """A row's ids as transformers has them."""
    (size,) = batch.sizes
    seen = batch.visual[row]
    marks = np.array(INDICATORS)[(seen - size) % 5]
    ids = np.where(seen >= size - 5, marks, np.where(seen >= 0, IMAGE, batch.tokens[row]))
    return ids[batch.mask[row]].tolist()


@jax.jit
def seen(model: Model, batch: Any) -> Any:
    """Stages of the branch, and logits."""
    (branch,), (given,) = model.branches.values(), (x.given for x in batch.images.values())
    tokens = branch.visual_tokens(branch.encode(given), model.llm.lookup)
    return tokens.stages, tokens.values, model(batch)


PICTURES = [picture(*size) for size in ((4, 60), (20, 20), (150, 112), (84, 61), (47, 61))]
ROWS = [*([image] for image in PICTURES), [PICTURES[3], picture(61, 30)], []]
PROMPTS = [*("a <image> b" for _ in PICTURES), "<image>\nx <image> y", "only words"]


def test_rows(port):
    """Unequal ones, padded on either side: pixels, ids, the tower, the connector and logits."""
    _, theirs, maker, model, processor = port
    every = [
        maker(text=text, images=images or None, return_tensors="pt")
        for text, images in zip(PROMPTS, ROWS, strict=True)
    ]
    pixels = torch.cat([x["pixel_values"] for x in every if "pixel_values" in x])
    with torch.no_grad():
        tower = theirs.model.vision_tower.transformer(pixels).last_hidden_state
        out = theirs.model.get_image_features(pixels)
        shares = theirs.model.vision_tower(pixels).pooler_output
    for padding in ("left", "right"):
        batch = processor(ROWS, PROMPTS, padding=padding)
        (given,) = batch.images.values()
        stages, values, logits = seen(model, batch)
        for i, inputs in enumerate(every):
            ids = inputs["input_ids"][0].tolist()
            assert theirs_ids(batch, i, model) == ids, PROMPTS[i]
            assert_close(logits[i][batch.mask[i]], reference(theirs, inputs), (padding, i))
    count = len(pixels)
    found = np.moveaxis(given.given.pixels[:count], -1, 1)
    np.testing.assert_allclose(found, pixels.numpy(), rtol=0, atol=1e-6)
    assert_close(stages["vision_features"][:count], tower)
    assert_close(stages["connector_features"][:count], shares)
    assert_close(stages["image_features"][:count], out.pooler_output)
    assert_close(values[-5:], out.visual_indicator_features.detach())
    for i in (2, 5):
        ids = maker.tokenizer(PROMPTS[i].replace("<image>", SPECIAL[0])).input_ids
        row = [-200 if token == IMAGE else token for token in ids]
        again = processor(ROWS[i], input_ids=[row])
        assert theirs_ids(again, 0, model) == every[i]["input_ids"][0].tolist()


def test_greedy_tokens(port):
    _, theirs, maker, model, processor = port
    theirs.generation_config.eos_token_id = None
    batch = processor(ROWS[4:], PROMPTS[4:], padding="left")
    generated = vfjax.generate_ids(model, batch, max_new_tokens=20)
    for text, images, row in zip(PROMPTS[4:], ROWS[4:], generated, strict=True):
        inputs = maker(text=text, images=images or None, return_tensors="pt")
        expected = theirs.generate(**inputs, max_new_tokens=20, do_sample=False, pad_token_id=0)
        assert row == expected[0, inputs["input_ids"].shape[1] :].tolist()


@hypothesis.given(
    size=st.tuples(st.integers(1, 2000), st.integers(1, 2000)),
    tile=st.sampled_from([28, 448]),
    tiles=st.tuples(st.integers(1, 13), st.integers(1, 13)).map(sorted),
    covering=st.booleans(),
)
@hypothesis.settings(max_examples=200)
def test_tokens_of_any_size(port, size, tile: int, tiles: list[int], covering: bool):
    """The grid and the ids of transformers' processor."""
    _, _, maker, model, _ = port
    path = model.config.branches[0].architecture
    ours = dataclasses.replace(
        path,
        images=dataclasses.replace(path.images, size=tile),
        least=tiles[0],
        most=tiles[1],
        covering=covering,
    )
    kind = transformers.models.ovis2.image_processing_pil_ovis2
    if tiles[1] == 1:
        grid = 1, 1
    elif covering:
        grid = kind.get_min_tile_covering_grid(size[::-1], tile, tiles[1])
    else:
        grid = kind.get_optimal_tiled_canvas(size[::-1], (tile, tile), *tiles)
    assert ours.grid(size) == grid
    text = maker.replace_image_token({"grids": [np.array(grid[::-1])]}, 0)
    ids = maker.tokenizer(text, add_special_tokens=False).input_ids
    found = ours.run(grid).indices[:, 0]
    assert [INDICATORS[i] if i < 0 else IMAGE for i in found] == ids
    assert len(ours.regions(size)) == len(ids) <= ours.tokens


def test_as_the_devices_have_it(port):
    """Over eight devices, and in bfloat16 within its rounding."""
    path, theirs, maker, *_ = port
    image, text = picture(61, 47), "a <image> b"
    inputs = maker(images=[image], text=text, return_tensors="pt")
    expected = reference(theirs, inputs)
    model, processor = converters.load(path, mesh=make_mesh(4, 2))
    processor.lengths = (64,)
    batch = processor([image] * 4, [text] * 4)
    assert_close(np.asarray(forward(model, batch))[0][batch.mask[0]], expected)
    model, processor = converters.load(path, dtype="bfloat16")
    processor.lengths = (64,)
    batch = processor([image], [text])
    found = np.asarray(forward(model, batch), np.float32)[batch.mask]
    half = reference(
        copy.deepcopy(theirs).bfloat16(),
        inputs | {"pixel_values": inputs["pixel_values"].bfloat16()},
    )
    wide = np.abs(expected).max()
    assert np.abs(found - expected).max() < 2 * np.abs(half - expected).max() < 0.2 * wide


def test_export_reopens_in_transformers(port, tmp_path: Path):
    path, theirs, maker, model, _ = port
    converters.export(model, tmp_path / "out")
    again, report = transformers.Ovis2ForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report.values())
    inputs = maker(images=ROWS[5], text=PROMPTS[5], return_tensors="pt")
    np.testing.assert_array_equal(reference(again, inputs), reference(theirs, inputs))
    names = [set(read_file(x / "model.safetensors")) for x in (path, tmp_path / "out")]
    assert names[0] == names[1]


@pytest.mark.parametrize(
    ("vision", "length", "images", "config"),
    [
        (
            {"tokenize_function": "st_argmax", "hidden_stride": 4, "qkv_bias": True},
            1,
            {"use_covering_area_grid": False, "max_patches": 3},
            {"tie_word_embeddings": True, "visual_indicator_token_ids": [264, 262, 260, 263, 261]},
        ),
        (
            {"tokenize_function": "gumbel_argmax", "hidden_stride": 1, "mlp_bias": True}
            | {"hidden_act": "gelu", "vocab_size": 49, "num_visual_indicator_tokens": 6},
            16,
            {"crop_to_patches": False},
            {},
        ),
    ],
)
def test_other_folders(tmp_path: Path, vision: dict, length: int, images: dict, config: dict):
    """Words that are chosen; blocks of 16 patches, or of one; whole pictures."""
    theirs, maker = make_folder(tmp_path, vision, images, length, **config)
    theirs.model.vision_tower.config.tokenize_function = "st_argmax"  # of equal draws
    model, processor = converters.load(tmp_path)
    processor.lengths = (128,)
    inputs = maker(images=[PICTURES[3]], text="a <image> b", return_tensors="pt")
    batch = processor([PICTURES[3]], ["a <image> b"])
    found = np.asarray(forward(model, batch))[batch.mask]
    assert_close(found, reference(theirs, inputs))


def test_template(port):
    """The folder's own, as transformers renders it, with pictures and turns."""
    _, _, maker, model, processor = port
    assert (processor.template, processor.image_token) == ("chat_template", "<image>")
    told = [{"type": "image"}, {"type": "text", "text": "what?"}]
    messages = [
        {"role": "user", "content": told},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        {"role": "user", "content": told},
    ]
    expected = maker.apply_chat_template(messages, add_generation_prompt=True)
    assert processor.render_messages(messages) == expected
    images = [picture(60, 20), picture(20, 20)]
    inputs = maker(images=images, text=expected, add_special_tokens=False, return_tensors="pt")
    found = theirs_ids(processor(images, [expected]), 0, model)
    assert found == inputs["input_ids"][0].tolist()


BAD = [
    ("config.json", {"hidden_size": 24}, "hidden_size: found 24, expected 32"),
    ("config.json", {"vocab_size": 319}, "vocab_size: found 319, expected 320"),
    ("config.json", {"image_token_id": 260}, "id 259 of <IMG_ATOM>, expected 260"),
    ("config.json", {"visual_indicator_token_ids": [1, 2, 3]}, "expected 5 to 5 ids"),
    ("config.json", {"visual_indicator_token_ids": [7, 261, 262, 263, 264]}, "id 260 of <IMG_ST"),
    ("config.json", {"vision_config": {**VISION, "hidden_stride": 3}}, "hidden_stride: found 3"),
    ("config.json", {"vision_config": {**VISION, "tokenize_function": "top"}}, "tokenize_function"),
    ("config.json", {"visual_layers": 2}, "visual_layers"),
    ("processor_config.json", {"image_seq_length": 5}, "image_seq_length: found 5, expected 4"),
    ("processor_config.json", {"max_pixels": 5}, "max_pixels"),
    ("tokenizer.json", {}, "no special token <IMG_ATOM>"),
]


@pytest.mark.parametrize(("file", "change", "said"), BAD)
def test_bad_folders(port, tmp_path: Path, file: str, change: dict, said: str):
    for each in port[0].iterdir():
        (tmp_path / each.name).symlink_to(each)
    whole = json.loads((tmp_path / file).read_text())
    (tmp_path / file).unlink()
    if not change:
        whole["added_tokens"] = [t for t in whole["added_tokens"] if t["content"] != SPECIAL[0]]
        (tmp_path / "tokenizer_config.json").unlink()
    write_json(tmp_path / file, whole | change)
    with pytest.raises(InputError) as caught:
        converters.load(tmp_path)
    assert said in str(caught.value) and "\n" not in str(caught.value)
