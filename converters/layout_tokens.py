"""Tokenizer, chat template and stops of a folder in another layout.

Authors tokenise the text around each picture by itself and know prompts by name; transformers
tokenises a prompt whole, a picture being a special token, by a template in Jinja. Files that are
written here give the same ids, which is checked on conversations before anything is written.
"""

import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from converters.chat import jinja
from converters.source import Source
from converters.tokenizer import SETTINGS, load_tokenizer
from vfjax import InputError, Processor
from vfjax.atomic import JSON, read_json, temporary
from vfjax.errors import cut
from vfjax.text import chat, prompts
from vfjax.text.prompts import IMAGE_TOKEN, TEMPLATES, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CLASS = "PreTrainedTokenizerFast"
"""The tokenizer class of every version of transformers that computes what tokenizer.json says."""

MULTIPLE = 64
"""New vocabularies have a multiple of rows, as transformers' conversions of LLaVA have."""

Files = dict[str, dict[str, Any]]
"""JSON files by name."""


def tokens_for(
    tokenizer: "PreTrainedTokenizerBase | None", tokens: Sequence[str], rows: int
) -> tuple[list[int], int]:
    """Ids of tokens that stand for pictures, added where they lack, and the rows that they need.

    Args:
        tokenizer: gets the tokens; None: their ids follow those of the embedding.
        tokens: their texts.
        rows: of the embedding.
    """
    if tokenizer is None:
        ids = [rows + i for i in range(len(tokens))]
    else:
        _piecewise(tokenizer, tokens)
        ids = [int(tokenizer.convert_tokens_to_ids(token)) for token in tokens]
    need = max(ids, default=-1) + 1
    return ids, rows if need <= rows else -(-need // MULTIPLE) * MULTIPLE


def _piecewise(tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[str]) -> None:
    """Makes pictures special tokens, the text after each being tokenised as that of a prompt's
    beginning.

    SentencePiece marks the start of a text. Where it does so but once, that mark is put by a
    pattern at the start of each piece between pictures, unless another special token is there:
    those are looked for afterwards.
    """
    from tokenizers import AddedToken, Tokenizer

    tokenizer.add_special_tokens(
        {
            "additional_special_tokens": [
                AddedToken(token, special=True, normalized=False) for token in tokens
            ]
        },
        replace_extra_special_tokens=False,
    )
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    before = state["pre_tokenizer"] or {}
    marks = before.get("pretokenizers", [before])
    first = [mark for mark in marks if mark.get("prepend_scheme") == "first"]
    if not first:
        return
    others = [token for token in state["added_tokens"] if token["content"] not in tokens]
    for token in others:
        token["normalized"] = True
    stops = "|".join(_escaped(token["content"]) for token in others)
    start = {"Regex": rf"\A(?!{stops})" if stops else r"\A"}
    mark = {"type": "Replace", "pattern": start, "content": "▁"}
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    state["normalizer"] = {"type": "Sequence", "normalizers": [mark, spaces]}
    state["pre_tokenizer"] = None
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))  # it has no setter


def _escaped(text: str) -> str:
    return "".join(letter if letter.isalnum() else f"\\x{{{ord(letter):x}}}" for letter in text)


def tokenizer_files(
    tokenizer: "PreTrainedTokenizerBase", own: Mapping[str, JSON], rows: int, left: bool
) -> Files:
    """tokenizer.json and tokenizer_config.json of a tokenizer as it computes now.

    Args:
        tokenizer: what is written.
        own: the tokenizer_config.json that it came from, whose lengths are kept.
        rows: of the embedding; added tokens beyond them are left out.
        left: whether rows are padded on the left, as transformers' programs generate.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < rows]
    named = {
        key: str(value)
        for key in ("bos_token", "eos_token", "unk_token", "pad_token")
        if (value := getattr(tokenizer, key)) is not None
    }
    if "pad_token" not in named and (pad := named.get("unk_token") or named.get("eos_token")):
        named["pad_token"] = pad
    settings = {
        "tokenizer_class": CLASS,
        **named,
        "added_tokens_decoder": {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in state["added_tokens"]
        },
        "clean_up_tokenization_spaces": False,
        "padding_side": "left" if left else own.get("padding_side", "right"),
        "model_max_length": own.get("model_max_length", int(1e30)),
    }
    return {"tokenizer.json": state, SETTINGS: settings}


TALKS: tuple[tuple[Turn, ...], ...] = (
    (("What is it?", None),),
    (("<image>\nWhat is it?", None),),
    (("<image>\n  two spaces, 3 digits, é and 图 ", "An answer."), ("And\nthen?", None)),
    (("<image>\n<image>\nCompare them", "One is red."), ("Why", "It is."), ("<image>\nNow?", None)),
)
"""Conversations on which two ways to ask are compared."""


def check_prompts(source: Source, own: Processor, files: Files, template: str, whole: bool) -> None:
    """Whether a folder's files give the ids that the model is asked with now.

    Args:
        source: the model's.
        own: its processor.
        files: of the new folder's tokenizer.
        template: of the new folder: Jinja if `whole`, else a name of `TEMPLATES`.
        whole: whether the new folder's code tokenises a prompt whole.

    Raises:
        InputError: they do not.
    """
    with temporary() as home:
        for name, content in files.items():
            (home / name).write_text(json.dumps(content))
        made = load_tokenizer(home, {"tokenizer_class": CLASS} if whole else None)
    assert made is not None  # it was written
    for turns in TALKS:
        if own.template == "plain" and len(turns) > 1:
            continue
        text = own.render(turns)
        if whole:
            again = made.apply_chat_template(
                chat.from_turns(turns),
                chat_template=template,
                tokenize=False,
                add_generation_prompt=True,
            )
            ids = prompts.tokenize_whole(made, again, IMAGE_TOKEN)
        else:
            again = prompts.render(prompts.get_template(template), turns)
            ids = prompts.tokenize(made, again)
        if again != text:
            raise _differ(source, f"prompts as {cut(repr(again))}", cut(repr(text)))
        if ids != (wanted := own.tokenize(text)):
            at = len(os.path.commonprefix([ids, wanted]))
            raise _differ(
                source,
                f"a tokenizer that writes {ids[at : at + 4]}",
                f"{wanted[at : at + 4]}, as now, from id {at} on of {cut(repr(text))}",
            )


def _differ(source: Source, found: str, expected: str) -> InputError:
    return InputError(
        f"{source.home}: tokenizer",
        found=found + " in the new layout",
        expected=expected,
        fix="this model's prompts cannot be written so; keep the layout that it has",
    )


def template_name(source: Source, default: str, tokens: Sequence[str]) -> str | None:
    """Which of `TEMPLATES` a folder's prompts have; None: none is like its chat template.

    Args:
        source: the folder.
        default: of the models around such an LLM, which is taken where two are alike.
        tokens: what stands for pictures and videos there.
    """
    if source.template != chat.CHAT_TEMPLATE:
        return source.template
    for name in (default, *TEMPLATES):
        if jinja(prompts.get_template(name), tokens) == source.chat_template:
            return name
    return None


def generation(source: Source, own: Processor) -> dict[str, Any]:
    """generation_config.json whose stops are those of answers now.

    Raises:
        InputError: answers end with a text that is no token.
    """
    file = source.generation
    found: dict[str, Any] = read_json(file) if file.is_file() else {}
    if own.tokenizer is not None:
        known = own.tokenizer.added_tokens_encoder
        texts = [text for text in own.stop_texts if text not in known]
        if texts:
            raise InputError(
                f"{source.path}: prompt template {own.template!r}",
                found=f"answers that end with {texts[0]!r}, which is no token",
                expected="a token, as generation_config.json says ends of answers by ids",
                fix="keep the layout that it has",
            )
    stops = list(own.stops)
    return {**found, "eos_token_id": stops if stops[1:] else stops[0]} if stops else found
