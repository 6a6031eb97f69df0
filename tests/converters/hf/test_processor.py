"""Prompts of fused folders in transformers: the processor, by AutoProcessor, against vfjax's."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

import converters
from converters import hf
from tests.checkpoints import changed
from tests.torch_fused import picture, toy_folder
from vfjax import InputError, Processor, Video

PICTURES = [picture(40, 30), picture(25, 50, 1)]
ASKED = [
    {
        "role": "user",
        "content": [{"type": "image", "image": PICTURES[0]}, {"type": "text", "text": "What?"}],
    }
]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% for p in m.content %}{{ '<image>' if p.type == 'image'"
    " else p.text }}{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}{{ more }}"
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP and SigLIP on one Llama."""
    return toy_folder(tmp_path_factory.mktemp("pair") / "pair", ("clip", "siglip"))


@pytest.fixture(scope="module")
def two(pair: Path) -> tuple[hf.VisionFuseProcessor, Processor]:
    """In transformers, and in vfjax."""
    processor = AutoProcessor.from_pretrained(pair, trust_remote_code=False)
    assert isinstance(processor, hf.VisionFuseProcessor)
    return processor, converters.load(pair)[1]


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch(two: tuple[hf.VisionFuseProcessor, Processor], side: str) -> None:
    """Fields of vfjax's batch without its columns of padding; a video's tokens are pooled."""
    processor, own = two
    prompts = ["Two: <image> and <image>", "text", "A film <image>"]
    media = [[*PICTURES], [], [Video(tuple(PICTURES))]]
    found = processor(media, prompts, padding_side=side)
    batch = own(media, prompts, padding=side)
    used = np.asarray(batch.mask).any(axis=0)
    assert found["attention_mask"].any(0).all() and not used.all()
    for name, field in {"input_ids": "tokens", "attention_mask": "mask"}.items():
        np.testing.assert_array_equal(found[name], getattr(batch, field)[:, used])
    for name in ("visual", "segments"):
        np.testing.assert_array_equal(found[name], getattr(batch, name)[:, used])
    for name, seen in batch.images.items():
        given = found["pictures"][name]
        np.testing.assert_array_equal(given["pixels"], seen.given.pixels)
        np.testing.assert_array_equal(given["gather.indices"], seen.gather.indices)


def test_named_template(two: tuple[hf.VisionFuseProcessor, Processor]) -> None:
    processor, own = two
    prompt = processor.apply_chat_template(ASKED, add_generation_prompt=True)
    assert prompt == own.chat("What?")
    found = processor.apply_chat_template(
        ASKED, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    expected = processor(PICTURES[:1], prompt)
    assert found.keys() == expected.keys()
    assert torch.equal(found["input_ids"], expected["input_ids"])
    answered = [*ASKED, {"role": "assistant", "content": "That."}]
    assert processor.apply_chat_template([answered])[0].startswith(prompt + " That.")


def test_own_template(pair: Path, tmp_path: Path) -> None:
    """The folder's own, as its tokenizer renders it; and one that the call names."""
    changed(pair, folder := tmp_path / "own", "config.json", {"template": "chat_template"})
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    processor = AutoProcessor.from_pretrained(folder)
    expected = processor.tokenizer.apply_chat_template(
        ASKED, chat_template=TEMPLATE, tokenize=False, add_generation_prompt=True, more="!"
    )
    for found in (
        processor.apply_chat_template(ASKED, add_generation_prompt=True, more="!"),
        AutoProcessor.from_pretrained(pair).apply_chat_template(
            [ASKED], TEMPLATE, add_generation_prompt=True, more="!"
        )[0],
    ):
        assert found == expected == "user: <image>What?\nassistant:!"
    begun = [*ASKED, {"role": "assistant", "content": "It is"}]
    assert processor.apply_chat_template(begun, continue_final_message=True).endswith(": It is")
    processor.save_pretrained(out := tmp_path / "out")
    assert AutoProcessor.from_pretrained(out).chat_template == TEMPLATE
    assert json.loads((out / "config.json").read_text())["template"] == "chat_template"


def test_what_is_refused(two: tuple[hf.VisionFuseProcessor, Processor]) -> None:
    processor, _ = two
    calls = [
        lambda: processor(PICTURES, "one <image>"),
        lambda: processor(PICTURES[:1]),
        lambda: processor(PICTURES[:1], "<image>", return_tensors="np"),
        lambda: processor(PICTURES[:1], "<image>", padding="max_length"),
        lambda: processor(PICTURES[:1], "<image>", videos=[Video(tuple(PICTURES))]),
        lambda: processor.apply_chat_template(ASKED, tools=[{}]),
        lambda: processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "audio"}]}], add_generation_prompt=True
        ),
        lambda: processor.apply_chat_template([{"role": "user", "content": "an <image>"}]),
        lambda: processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}]}], tokenize=True
        ),
    ]
    for call in calls:
        with pytest.raises(InputError) as error:
            call()
        assert "\n" not in str(error.value)
