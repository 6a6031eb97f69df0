"""Idefics3's and SmolVLM's folders, as transformers' models and processors compute them."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from PIL import Image

import converters
from tests.checkpoints import randomize, text_config, write_json
from vfjax import Model

TILE, LONGEST = 28, 112
AROUND, PICTURE, WHOLE, END = "<fake_token_around_image>", "<image>", "<global-img>", "<|im_end|>"
SPECIAL = [
    *("<|im_start|>", END, AROUND, PICTURE, WHOLE),
    *(f"<row_{row}_col_{col}>" for row in range(1, 4) for col in range(1, 4)),
]
"""Tiles of a fourth row or column have marks that are many tokens."""
TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Byte-level, with merges over newlines and of a space with the word behind it."""
    words = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("Ġ", "Y"), ("ĠY", "o"), ("o", "u"), ("ĊĊ", "W")]
    words += [a + b for a, b in merges]
    engine = tokenizers.Tokenizer(
        tokenizers.models.BPE({word: i for i, word in enumerate(words)}, merges)
    )
    engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    engine.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=engine, bos_token="<|im_start|>", eos_token=END, pad_token=END
    )
    added = [tokenizers.AddedToken(t, normalized=False, special=True) for t in SPECIAL]
    tokenizer.add_special_tokens({"additional_special_tokens": added})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_processor(**images: Any) -> transformers.Idefics3Processor:
    pictures = transformers.Idefics3ImageProcessorPil(
        **{"size": {"longest_edge": LONGEST}, "max_image_size": {"longest_edge": TILE}} | images
    )
    tokenizer = make_tokenizer()
    return transformers.Idefics3Processor(
        pictures, tokenizer, image_seq_len=4, chat_template=TEMPLATE
    )


def make_folder(path: Path, family: str = "idefics3", *, tied: bool = False, **images: Any) -> Any:
    """Model and processor as transformers writes them; torchvision, which is not there, writes
    SmolVLM's.
    """
    processor = make_processor(**images)
    smol = family == "smolvlm"
    kinds = {
        "idefics3": (transformers.Idefics3Config, transformers.Idefics3ForConditionalGeneration),
        "smolvlm": (transformers.SmolVLMConfig, transformers.SmolVLMForConditionalGeneration),
    }
    config, model = kinds[family]
    theirs = model(
        config(
            vision_config={
                "hidden_size": 24,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": 28,
                "patch_size": 7,
                "layer_norm_eps": 1e-3,
            },
            text_config=text_config(max_position_embeddings=1024).to_dict(),
            image_token_id=processor.image_token_id,
            tie_word_embeddings=tied,
            pad_token_id=0,
        )
    )
    theirs.tie_weights()
    randomize(theirs, 7)
    theirs.save_pretrained(path)
    processor.save_pretrained(path)
    if smol:
        file = path / "processor_config.json"
        whole = json.loads(file.read_text())
        whole["processor_class"] = "SmolVLMProcessor"
        pictures = whole["image_processor"]
        pictures["image_processor_type"] = "SmolVLMImageProcessor"
        skipped = ("do_image_splitting", "image_processor_type")
        whole["video_processor"] = {
            **{key: value for key, value in pictures.items() if key not in skipped},
            "size": {"longest_edge": 2 * TILE},
            "do_sample_frames": False,
            "fps": 1,
            "num_frames": 8,
            "return_metadata": True,
            "video_processor_type": "SmolVLMVideoProcessor",
        }
        write_json(file, whole)
    return theirs


@pytest.fixture(scope="module", params=["idefics3", "smolvlm"])
def loaded(request, tmp_path_factory) -> tuple[Path, Any, Model, Any, Any]:
    path = tmp_path_factory.mktemp("idefics") / request.param
    theirs = make_folder(path, request.param, tied=request.param == "smolvlm")
    model, processor = converters.load(path)
    processor.lengths = (512,)  # one compilation
    return path, theirs, model, processor, make_processor()


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


@torch.no_grad()
def test_rows(loaded):
    """Unequal ones, padded on either side: the tower, the connector and logits."""
    _, theirs, model, processor, maker = loaded
    for padding in ("right", "left"):
        batch = processor(ROWS, PROMPTS, padding=padding)
        stages, logits = seen(model, batch)
        first = 0
        for i, (images, prompt) in enumerate(zip(ROWS, PROMPTS, strict=True)):
            some = {"images": [images]} if images else {}
            inputs = maker(**some, text=[prompt], return_tensors="pt")
            assert_close(logits[i][batch.mask[i]], theirs(**inputs).logits[0], (padding, prompt))
            if images:
                out = theirs.model.get_image_features(
                    inputs.pixel_values, inputs.pixel_attention_mask
                )
                count = inputs.pixel_values.shape[1]
                here = slice(first, first := first + count)
                assert_close(stages["vision_features"][here], out.last_hidden_state, prompt)
                tokens = stages["image_features"][here].reshape(-1, 32)
                assert_close(tokens, out.pooler_output[0], prompt)
