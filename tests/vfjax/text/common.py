"""What tests of prompts and of labels share."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

from transformers import LlamaTokenizer

from converters.tokenizer import load_tokenizer
from vfjax.text.prompts import TEMPLATES, Template

BASES = ("LLaVA", "MGM", "SliME", "DenseConnector")
# Names that mean something else in this code base than elsewhere.
VARIANTS = {("MGM", "mistral_instruct"): "mistral_instruct_mgm"}
VARIANTS |= {("DenseConnector", "llama_3"): "llama_3_dc"}


def template_of(base: str, name: str) -> Template:
    return TEMPLATES[VARIANTS.get((base, name), name)]


def llama(model: Path, folder: Path, **options) -> LlamaTokenizer:
    """A SentencePiece file as people have it: a folder with tokenizer.model."""
    folder.mkdir()
    shutil.copy(model, folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    return load_tokenizer(folder)


class Letters:
    """One id a letter (its code point); puts `bos` first if asked."""

    bos_token_id = 1

    def __init__(self, bos: bool):
        self.bos = bos

    def __call__(self, text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[1] * self.bos + [ord(c) for c in text])
