"""Tokenizers and chat templates of folders in another layout, against transformers' processors."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import transformers
from PIL import Image

import converters
from converters.chat import jinja
from converters.load import model_config
from converters.processor import processor
from tests.checkpoints import make_llama, upstream_llava_folder, write_json
from vfjax import Processor
from vfjax.text.chat import from_turns
from vfjax.text.prompts import TEMPLATES, get_template, render


def processor_of(folder: Path) -> Processor:
    source = converters.open_source(folder)
    return processor(source, model_config(source))


def test_ids_of_llama_2(shared: Path, tmp_path: Path):
    """SentencePiece marks the text after each picture, as that of a prompt's beginning."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    folder = tmp_path / "own"
    upstream_llava_folder(folder, llm=make_llama(1, vocab_size=32000, **sizes, **heads))
    for file in folder.glob("*token*"):
        file.unlink()
    shutil.copy(shared / "tokenizers/llama2/tokenizer.model", folder)
    write_json(
        folder / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "legacy": False}
    )
    converters.export(folder, tmp_path / "hf", layout="hf")
    converters.export(tmp_path / "hf", tmp_path / "back", layout="llava")
    llms = [converters.open_source(tmp_path / x).parts["llm"] for x in ("own", "hf", "back")]
    rows = [llm["lm_head.weight"] for llm in llms]
    assert [len(x[...]) for x in rows] == [32000, 32064, 32000]
    np.testing.assert_array_equal(rows[0][...], rows[2][...])
    theirs = transformers.AutoProcessor.from_pretrained(tmp_path / "hf")
    ours, again = processor_of(folder), processor_of(tmp_path / "back")
    assert (theirs.image_token_id, theirs.tokenizer.padding_side) == (32000, "left")
    texts = ("<image>\nWhat?", "a <image><image> b", " <image></s> c</s>USER: <image>  x", "  no")
    for text in texts:
        pictures = [Image.new("RGB", (9, 7))] * text.count("<image>")
        found, ids = theirs(images=pictures or None, text=text).input_ids[0], []
        while found:
            ids.append(-200 if found[0] == 32000 else found[0])
            found = found[16 if found[0] == 32000 else 1 :]
        assert ids == ours.tokenize(text) == again.tokenize(text), text
    asked = [{"type": "image"}, {"type": "text", "text": "What?"}]
    prompt = theirs.apply_chat_template(
        [{"role": "user", "content": asked}], add_generation_prompt=True
    )
    assert prompt == ours.chat("What?")
    assert again.template == "vicuna_v1"


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_has_a_twin(name: str):
    template = get_template(name)
    turns = [("<image>\nWhat\n'is' \"it\"?", "é {{ x }}"), ("a <b>", "c\n"), ("And?", None)]
    turns = turns if template.tail is not None else turns[-1:]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE())
    )
    text = tokenizer.apply_chat_template(
        from_turns(turns),
        chat_template=jinja(template, ["<image>"]),
        tokenize=False,
        add_generation_prompt=True,
    )
    assert text == render(template, turns)
