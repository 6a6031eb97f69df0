"""What users do with a fused model in transformers: decode, train, place it on devices."""

from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers

from converters import hf
from converters.hf.processor import tensors
from tests.torch_fused import greedy, logits_of, open_in_torch, picture, toy_folder
from vfjax import Batch, InputError

ROWS = [[1, 40, -200, 60, 61, -200, 62, 63], [1, -200], [5, 6, 7]]
PICTURES = [picture(40, 30), picture(25, 50, 1), picture(30, 50, 2)]
HOW = {"positions": "parallel", "mask": "block"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP and DINOv2 on one Llama."""
    return toy_folder(tmp_path_factory.mktemp("pair") / "pair")


@pytest.fixture(scope="module")
def model(pair: Path) -> transformers.PreTrainedModel:
    return open_in_torch(pair, **HOW)


@pytest.fixture(scope="module")
def batch(pair: Path) -> Batch:
    """Rows of other lengths, padded on the left, with labels at their text."""
    make = hf.VisionFuseProcessor.from_pretrained(pair).vfjax
    labels = [[-100 if i == -200 else i for i in row] for row in ROWS]
    return make(PICTURES, input_ids=ROWS, labels=labels, padding="left")


@pytest.mark.parametrize(
    "more", [{"use_cache": False}, {"cache_implementation": "static"}], ids=["none", "static"]
)
def test_caches(model: transformers.PreTrainedModel, batch: Batch, more: dict) -> None:
    assert greedy(model, batch, 12, **more) == greedy(model, batch, 12)


@torch.no_grad()
def test_beams(model: transformers.PreTrainedModel, batch: Batch) -> None:
    """Each beam's score is the mean log-probability of its tokens in one forward pass."""
    given, new, beams = tensors(batch), 6, 2
    found = model.generate(
        **{key: x for key, x in given.items() if key != "labels"},
        num_beams=beams,
        num_return_sequences=beams,
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    rows = {k: x.repeat_interleave(beams, 0) for k, x in given.items() if k != "pictures"}
    mask = torch.cat([rows["attention_mask"], torch.ones(len(found.sequences), new)], 1)
    whole = {"input_ids": found.sequences, "attention_mask": mask.long()}
    del rows["labels"]
    logits = model(**rows | whole, pictures=given["pictures"]).logits
    chosen = found.sequences[:, -new:, None]
    each = logits[:, -new - 1 : -1].log_softmax(-1).gather(-1, chosen)[..., 0]
    torch.testing.assert_close(each.mean(1), found.sequences_scores, atol=1e-5, rtol=0)


def test_bfloat16(pair: Path, model: transformers.PreTrainedModel, batch: Batch) -> None:
    """Eight bits of a number: a few of the last, relative to the largest logit."""
    narrow = open_in_torch(pair, dtype=torch.bfloat16, **HOW)
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    expected, found = logits_of(model, batch), logits_of(narrow, batch)
    assert 0 < np.abs(found - expected).max() <= 0.03 * np.abs(expected).max()


def test_lora(pair: Path, batch: Batch) -> None:
    """PEFT's adapters on the LLM and the towers learn; those of layers that no tap reads don't."""
    names = ["q_proj", "v_proj"]
    model = peft.get_peft_model(
        open_in_torch(pair, **HOW).train(), peft.LoraConfig(r=2, target_modules=names)
    )
    given, losses = tensors(batch), []
    learn = {n: p for n, p in model.named_parameters() if p.requires_grad}
    steps = torch.optim.SGD(learn.values(), lr=0.5)
    for _ in range(3):
        steps.zero_grad()
        loss = model(**given).loss
        loss.backward()
        steps.step()
        losses.append(loss.item())
    still = {name for name, p in learn.items() if p.grad is None}
    assert losses == sorted(losses, reverse=True) and losses[0] - losses[-1] > 0.1
    assert {name.partition(".lora")[0] for name in still} == {
        f"base_model.model.branches.clip.encoder.encoder.layers.2.self_attn.{x}" for x in names
    }


def test_gradient_checkpointing(pair: Path, batch: Batch) -> None:
    """The same gradients, of every parameter that is read."""
    found = []
    for again in (False, True):
        model = open_in_torch(pair, **HOW).train()
        if again:
            model.gradient_checkpointing_enable()
        model(**tensors(batch), use_cache=False).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() > {"model.embed_tokens.weight"}
    torch.testing.assert_close(found[0], found[1])


def test_device_map(
    pair: Path, model: transformers.PreTrainedModel, batch: Batch, tmp_path: Path
) -> None:
    """Weights that lie on the disk until they're used, by accelerate."""
    places = {"branches.clip": "disk", "branches.dinov2": "cpu", "model": "disk", "lm_head": "cpu"}
    placed = open_in_torch(pair, device_map=places, offload_folder=tmp_path, **HOW)
    assert next(placed.branches["clip"].parameters()).device.type == "meta"
    np.testing.assert_allclose(logits_of(placed, batch), logits_of(model, batch), atol=1e-5)


def test_pipeline(pair: Path, model: transformers.PreTrainedModel) -> None:
    processor = transformers.AutoProcessor.from_pretrained(pair)
    pipe = transformers.pipeline("image-text-to-text", model=model, processor=processor)
    parts = [{"type": "image", "image": PICTURES[0]}, {"type": "text", "text": "What?"}]
    asked = [{"role": "user", "content": parts}]
    greedily = {"max_new_tokens": 4, "do_sample": False}
    (found,) = pipe(text=asked, return_full_text=False, generate_kwargs=greedily)
    given = processor(PICTURES[0], processor.apply_chat_template(asked))
    ids = model.generate(**given, **greedily)
    new = ids[:, given["input_ids"].shape[1] :]
    assert [found["generated_text"]] == processor.batch_decode(new, skip_special_tokens=True)


def test_stops(model: transformers.PreTrainedModel) -> None:
    """The tokenizer's end of an answer is the model's, which its config.json does not say."""
    assert model.generation_config.eos_token_id == [2]


def test_what_is_refused(model: transformers.PreTrainedModel, batch: Batch) -> None:
    given = {key: x for key, x in tensors(batch).items() if key != "labels"}
    cut = {"input_ids": given["input_ids"][:, -3:], "attention_mask": given["attention_mask"]}
    with pytest.raises(InputError, match="visual: found"):
        model(**given | cut)
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model(attention_mask=given["attention_mask"])
