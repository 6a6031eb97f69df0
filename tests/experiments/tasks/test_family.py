"""The shipped family, and the study that compares its fusions."""

import itertools

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import converters
from experiments.family import language, scenes
from experiments.family.members import Quiz, next_logits
from experiments.family.study import arranged, paired, with_llm
from experiments.tasks.common import FAMILY

MEMBERS = sorted(path.name for path in FAMILY.iterdir() if path.name != "base")


@pytest.fixture(scope="module")
def test(tmp_path_factory) -> Quiz:
    folder = tmp_path_factory.mktemp("scenes") / "test"
    scenes.write(folder, "test", 12, 3, turns=1)
    return Quiz.read(folder)


def in_transformers(name: str) -> transformers.LlavaForConditionalGeneration:
    """A shipped member, its parts put into transformers' class."""
    folder = FAMILY / name
    tower = transformers.AutoModel.from_pretrained(folder / "vision_tower")
    text = transformers.LlamaConfig.from_pretrained(folder)
    text.vocab_size += 1  # for transformers' own placeholder
    config = transformers.LlavaConfig(
        vision_config=tower.config, text_config=text, image_token_index=text.vocab_size - 1
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    tensors = load_file(folder / "model.safetensors")
    with torch.no_grad():
        model.model.vision_tower.load_state_dict(tower.state_dict())
        connector = model.model.multi_modal_projector
        for ours, layer in (("0", connector.linear_1), ("2", connector.linear_2)):
            for kind in ("weight", "bias"):
                getattr(layer, kind).copy_(tensors.pop(f"model.mm_projector.{ours}.{kind}"))
        embedding = tensors.pop("model.embed_tokens.weight")
        model.get_input_embeddings().weight[:-1].copy_(embedding)
        missing, odd = model.model.language_model.load_state_dict(
            {name.removeprefix("model."): x for name, x in tensors.items()}, strict=False
        )
    assert missing == ["embed_tokens.weight"] and not odd
    return model


@pytest.mark.parametrize("name", ["clip", "dino"])
def test_members_score_the_same_in_transformers(name: str, test: Quiz) -> None:
    theirs = in_transformers(name)
    ours, processor = converters.load(FAMILY / name)
    mark = theirs.config.image_token_id
    for kind, asked in test.questions.items():
        prompts = [processor.chat(question) for question, _ in asked]
        batch = processor(list(test.pictures), prompts)
        found = np.asarray(next_logits(ours, batch))
        for i in range(0, len(asked), 4):
            ids = np.where(batch.visual[i] >= 0, mark, batch.tokens[i])[batch.mask[i]]
            pixels = next(iter(batch.images.values())).given.pixels[i].transpose(2, 0, 1)
            with torch.no_grad():
                logits = theirs(
                    input_ids=torch.tensor(ids[None]), pixel_values=torch.tensor(pixels[None])
                ).logits[0, -1, :-1]
            assert int(logits.argmax()) == found[i].argmax(), (kind, i)
            np.testing.assert_allclose(found[i], logits, atol=2e-3)


def test_splits_share_no_digit_and_no_background() -> None:
    ranges = [set(range(*span)) for span in scenes.SPLITS.values()]
    assert not any(a & b for a, b in itertools.combinations(ranges, 2))


def test_paired() -> None:
    rng = np.random.default_rng(0)
    a = {kind: rng.random(300) < 0.8 for kind in "xy"}
    b = {kind: rng.random(300) < 0.6 for kind in "xy"}
    found = paired(a, b)
    low, high = found["interval"]
    assert low < found["difference"] < high and low > 0 and found["p"] < 0.01
    same = paired(a, a)
    assert same["difference"] == 0 and same["interval"] == [0, 0] and same["p"] > 0.99


def test_another_llm_or_arrangement_leaves_the_model_as_it_is() -> None:
    model, processor = converters.load(FAMILY / "clip")
    base, _ = converters.load(FAMILY / "base")
    batch = processor(None, [processor.chat("how many digits ?", images=0)])
    before = np.asarray(next_logits(model, batch))
    swapped = np.asarray(next_logits(with_llm(model, base.llm), batch))
    assert np.abs(swapped - before).max() > 1e-3
    assert arranged(model, "parallel", "block").config.mask == "block" != model.config.mask
    np.testing.assert_array_equal(before, next_logits(model, batch))


def test_tokenizer_and_corpus_agree() -> None:
    tokenizer = converters.load(FAMILY / "base")[1].tokenizer
    assert tokenizer("where is 3 ?").input_ids[1:] == language.encode("where is 3 ?")
    assert tokenizer.convert_tokens_to_ids(list(language.WORDS)) == list(language.IDS.values())
