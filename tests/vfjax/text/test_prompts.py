"""Prompts and token ids against recordings of the four upstream code bases."""

import json
from pathlib import Path

import pytest
from transformers import LlamaTokenizer

from tests.vfjax.text.common import BASES, VARIANTS, Letters, llama, template_of
from vfjax.errors import InputError
from vfjax.text.prompts import (
    IMAGE_ID,
    TEMPLATES,
    get_template,
    render,
    tokenize,
    tokenize_whole,
)

FORMS = ("first_question", "second_question", "complete")


def turns_of(talk: list[list[str]], form: str) -> list[tuple[str, str | None]]:
    turns = [tuple(turn) for turn in talk]
    if form == "complete":
        return turns
    turns = turns[: 1 if form == "first_question" else 2]
    return [*turns[:-1], (turns[-1][0], None)]


@pytest.fixture(scope="module")
def prompts(shared: Path) -> dict:
    return json.loads((shared / "golden" / "prompts.json").read_text())


@pytest.fixture(scope="module")
def llama2(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> LlamaTokenizer:
    model = shared / "tokenizers" / "llama2" / "tokenizer.model"
    return llama(model, tmp_path_factory.mktemp("llama2") / "t", legacy=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("base", BASES)
def test_prompts_equal_upstream(prompts, base, form):
    turns = turns_of(prompts["conversation"], form)
    for name, recorded in prompts["templates"][base].items():
        if isinstance(recorded[form], dict):
            assert "upstream_raises" in recorded[form]
            with pytest.raises(InputError, match="plain"):
                render(template_of(base, name), turns)
        else:
            assert render(template_of(base, name), turns) == recorded[form], name


INTERNVL = {"Hermes-2", "internlm2-chat", "internvl2_5", "internvl_zh", "phi3-chat"}
"""InternVL's (internvl_chat/internvl/conversation.py), tested with its authors' folders."""


def test_every_recorded_template_is_known(prompts):
    recorded = {
        VARIANTS.get((base, name), name) for base in BASES for name in prompts["templates"][base]
    }
    others = {*NEXT, *INTERNVL, *CAMBRIAN, "smollm2"}  # the last in experiments/family/real
    assert recorded == set(TEMPLATES) - others


VISION = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)
NEXT = {
    "llava_llama_3": "<|start_header_id|>system<|end_header_id|>\n\n"
    f"{VISION}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
    "a<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    "b<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
    "c<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "qwen_1_5": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "a<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
    "<|im_start|>assistant\n",
}
"""LLaVA-NeXT's (llava/conversation.py), which none of the recorded code bases has."""


CAMBRIAN = {
    "llama_3_cambrian": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>You are "
    "Cambrian, a highly intelligent multimodal AI trained by NYU Vision X. \n    As a multimodal "
    "AI, you have the ability to process and analyze images. Whenever an image is present in the "
    "conversation, very carefully examine it and consider its content when formulating your "
    "response.\n    You should give concise responses to very simple questions, but provide "
    "thorough responses to more complex and open-ended questions. <|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>a<|eot_id|><|start_header_id|>assistant"
    "<|end_header_id|>b<|eot_id|><|start_header_id|>user<|end_header_id|>c<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>",
    "chatml_direct_cambrian": "<|im_start|>system\nYou are Cambrian, a highly intelligent "
    "multimodal AI trained by NYU Vision X. As a multimodal AI, you have the ability to process "
    "and analyze images. Whenever an image is present in the conversation, very carefully examine "
    "it and consider its content when formulating your response. You should give concise responses "
    "to very simple questions, but provide thorough responses to more complex and open-ended "
    "questions.<|im_end|><|im_start|>user\na<|im_end|><|im_start|>assistant\nb<|im_end|>"
    "<|im_start|>user\nc<|im_end|><|im_start|>assistant\n",
    "phi3": "<|system|>\nYou are a helpful AI assistant.<|end|>\n<|user|>\na<|end|>\n"
    "<|assistant|>\nb<|end|>\n<|user|>\nc<|end|>\n<|assistant|>\n",
}
"""Cambrian's (cambrian/conversation.py), as its get_prompt writes them."""


@pytest.mark.parametrize(("name", "text"), [*NEXT.items(), *CAMBRIAN.items()])
def test_prompts_of_other_code(name, text):
    assert render(get_template(name), [("a", "b"), ("c", None)]) == text


def test_stop_strings(prompts):
    for base in BASES:
        for name, recorded in prompts["templates"][base].items():
            stop, upstream = template_of(base, name).stop, recorded["stop_string_in_upstream_eval"]
            # Upstream waits for an empty string or for `<s>`, which no answer ends with.
            assert upstream in stop or upstream in ("", "<s>"), name
            assert all(stop)


def test_names_are_keys_and_identical_templates_are_one_object():
    for template in TEMPLATES.values():
        assert TEMPLATES[template.name] is template
    texts = [
        render(t, [("q", None)]) if t.tail is None else render(t, [("q", "a"), ("q", "a")])
        for t in {id(t): t for t in TEMPLATES.values()}.values()
    ]
    assert len(set(texts)) == len(texts)


def test_empty_texts_are_texts():
    turns = [("", ""), ("", None)]
    assert render(TEMPLATES["mistral_instruct"], turns) == "[INST]  [/INST]  </s>[INST]  [/INST]"


def test_unknown_template():
    with pytest.raises(InputError, match="'vicuna'.*vicuna_v1"):
        get_template("vicuna")


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "at least one question"),
        ([("q", None), ("q", None)], r"turns\[0\].*no answer"),
    ],
)
def test_bad_turns(turns, message):
    with pytest.raises(InputError, match=message):
        render(TEMPLATES["v1"], turns)


def test_tokenize_keeps_one_bos():
    a, b = ord("a"), ord("b")
    assert tokenize(Letters(True), "a<image>b<image>") == [1, a, IMAGE_ID, b, IMAGE_ID]
    assert tokenize(Letters(True), "<image>b") == [1, IMAGE_ID, b]
    assert tokenize(Letters(True), "ab") == [1, a, b]


@pytest.mark.parametrize("text", ["a \ud800", "<image>\udcff"])
def test_half_a_character(text: str):
    """JSON and command lines may have it, tokenizers do not take it."""
    for run in (tokenize, lambda tokenizer, prompt: tokenize_whole(tokenizer, prompt, "<i>")):
        with pytest.raises(InputError, match="prompt: found half a character"):
            run(None, text)


def test_tokenize_drops_nothing_without_bos():
    a, b = ord("a"), ord("b")
    assert tokenize(Letters(False), "a<image>b") == [a, IMAGE_ID, b]
    assert tokenize(Letters(False), "<image>b") == [IMAGE_ID, b]


def test_tokenize_drops_a_real_token_after_a_literal_bos():
    # Upstream behaviour Dense Connector's Llama-3 was trained with (BOS in the template).
    assert tokenize(Letters(False), "\x01a<image>\nb") == [1, ord("a"), IMAGE_ID, ord("b")]


def test_text_after_the_picture_starts_a_sentencepiece_word(llama2):
    ids = tokenize(llama2, "USER: <image>\nHi")
    place = ids.index(IMAGE_ID)
    assert ids[0] == llama2.bos_token_id
    assert ids[place + 1 : place + 3] == [29871, 13]
    assert llama2.bos_token_id not in ids[1:]


def test_llama_3_answers_as_the_system():
    """Mini-Gemini's Llama-3 models were trained with this header before answers; SliME's not."""
    turns = [("Hello", None)]
    end = "<|start_header_id|>{}<|end_header_id|>\n\n"
    assert render(get_template("llama_3"), turns).endswith(end.format("system"))
    assert render(get_template("llama3"), turns).endswith(end.format("assistant"))
