"""The plug-in of lmms-eval, with its own base class: where that is installed."""

from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import converters
import vfjax
from vfjax import InputError

pytest.importorskip("lmms_eval.api.model", reason="the extra lmms-eval is not installed")

from lmms_eval.api.instance import Instance

from converters.lmms_eval import manifests
from converters.lmms_eval_models import Chat, Simple

MODEL = Path(__file__).resolve().parents[2] / "experiments" / "family" / "models" / "clip"
QUESTIONS = ["how many digits ?", "where is the 3 ?", "which digit is red ?", "is there a blue 3 ?"]
GREEDY = {"max_new_tokens": 8, "temperature": 0, "do_sample": False, "until": ["\n\n"]}


def picture(i: int) -> Image.Image:
    pixels = np.random.default_rng(i).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


DOCS = [{"question": text, "pictures": [picture(i)]} for i, text in enumerate(QUESTIONS)]
DOCS.append({"question": "red red red red", "pictures": []})


def messages(doc: dict) -> list[dict]:
    content = [{"type": "image", "url": image} for image in doc["pictures"]]
    content.append({"type": "text", "text": doc["question"]})
    return [{"role": "user", "content": content}]


def request(chat: bool, i: int, how: dict) -> Instance:
    text, visual = DOCS[i]["question"], lambda doc: doc["pictures"]
    args = (text, messages, how, i, "t", "test") if chat else (text, how, visual, i, "t", "test")
    metadata = {"task": "t", "doc_id": i, "repeats": 1}
    return Instance(request_type="generate_until", arguments=args, idx=0, metadata=metadata)


def make(kind: type, **options):
    made = kind(pretrained=str(MODEL), dtype="float32", device=None, max_batch_size=None, **options)
    made.task_dict = {"t": {"test": DOCS}}
    return made


@pytest.fixture(scope="module")
def expected() -> list[str]:
    """Each question alone, without the plug-in."""
    model, processor = converters.load(MODEL, dtype="float32")
    out = []
    for doc in DOCS:
        prompt = processor.chat(doc["question"], images=len(doc["pictures"]))
        batch = processor(doc["pictures"], [prompt])
        out += vfjax.generate(model, processor, batch, max_new_tokens=8)
    return out


@pytest.mark.parametrize("batch_size", [1, "3"])
@pytest.mark.parametrize("kind", [Simple, Chat])
def test_answers_are_in_the_order_of_the_requests(kind: type, batch_size, expected: list[str]):
    made = make(kind, batch_size=batch_size)
    order = [4, 2, 0, 3, 1]
    found = made.generate_until([request(kind is Chat, i, GREEDY) for i in order])
    assert [result.text for result in found] == [expected[i] for i in order]
    assert all(result.token_counts.output_tokens >= 1 for result in found)
    assert found[0].token_counts.input_tokens < found[1].token_counts.input_tokens - 20


def test_settings_are_each_rows_own(expected: list[str]):
    made = make(Simple, batch_size=8)
    sampled = {"max_new_tokens": 30, "temperature": 3.0, "seed": 1}
    hows = [GREEDY, sampled, sampled | {"until": " "}, sampled | {"max_new_tokens": 10**6}]
    found = [r.text for r in made.generate_until([request(False, 4, how) for how in hows])]
    assert found[0] == expected[4]
    assert len(found[1].split()) > 2
    assert found[2] == found[1].split()[0]
    assert found[3].startswith(found[1])


def test_a_placeholder_in_the_text_is_a_pictures_place():
    made = make(Simple)
    visual = lambda doc: doc["pictures"]  # noqa: E731
    args = ("red <image> blue", GREEDY, visual, 0, "t", "test")
    metadata = {"task": "t", "doc_id": 0, "repeats": 1}
    one = Instance(request_type="generate_until", arguments=args, idx=0, metadata=metadata)
    ids, pictures = made.row(one)
    assert ids.count(-200) == len(pictures) == 1
    assert ids.index(-200) > 2


def test_what_is_refused():
    with pytest.raises(InputError, match="lmms-eval: model_args: found modle, expected pretrained"):
        make(Simple, modle=3)
    with pytest.raises(InputError, match="batch_size: found auto"):
        make(Simple, batch_size="auto")
    with pytest.raises(InputError, match="template"):
        make(Simple, template="none")
    made = make(Chat, max_images=0)
    with pytest.raises(InputError, match="max_images: found 1 picture"):
        made.generate_until([request(True, 0, GREEDY)])
    with pytest.raises(InputError, match="num_beams: found 3"):
        made.generate_until([request(True, 4, GREEDY | {"num_beams": 3})])
    for verb in (made.loglikelihood, made.generate_until_multi_round):
        with pytest.raises(InputError, match="lmms-eval: "):
            verb([])


def test_lmms_eval_finds_the_classes():
    from lmms_eval.models import get_model

    (manifest,) = manifests()
    assert manifest.model_id == "vfjax"
    (point,) = entry_points(group="lmms_eval.models", name="vfjax")
    assert point.load() is manifests
    assert get_model("vfjax") is Chat
    assert get_model("vfjax", force_simple=True) is Simple
