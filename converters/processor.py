"""The processor of an opened folder: its tokenizer, stops and settings, beside a model."""

from typing import TYPE_CHECKING

from converters.source import Source
from converters.tokenizer import tokenizer_of
from converters.values import Values
from vfjax import InputError, Processor, Settings
from vfjax.atomic import read_json
from vfjax.model import ModelConfig
from vfjax.text.chat import CHAT_TEMPLATE
from vfjax.text.prompts import IMAGE_TOKEN, get_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def processor(source: Source, config: ModelConfig) -> Processor:
    """The processor of an opened folder.

    Raises:
        InputError: files of the tokenizer that can't be read, whose picture token has another id
            than the model's, or that have no rows for the text of prompts.
    """
    tokenizer, file = tokenizer_of(source), source.generation
    # Authors' code hands embeddings to transformers, which then knows no words of the prompt.
    ported = all(branch.code == "transformers" for branch in source.branches)
    by_ids = ported or source.layout == "visionfuse"
    if tokenizer is not None:
        _check_tokens(source, tokenizer, config.llm.vocab)
    return Processor(
        config,
        tokenizer,
        source.template,
        _stops(source, tokenizer),
        chat_template=source.chat_template,
        image_token=_image_token(source, tokenizer),
        settings=Settings.read(read_json(file) if file.is_file() else {}, by_ids, file),
    )


def _stops(source: Source, tokenizer: "PreTrainedTokenizerBase | None") -> tuple[int, ...]:
    """Ids that end an answer.

    The tokenizer's, and those of generation_config.json or else of config.json or its text_config
    (transformers generation/configuration_utils.py, from_model_config).

    Raises:
        InputError: something else than ids there.
    """
    file, found = source.generation, []
    settings = Values(read_json(file) if file.is_file() else {}, str(file))
    for whole in (settings, Values(source.config, f"{source.path}: config.json")):
        found += [x.ids("eos_token_id") for x in (whole, whole.section("text_config", None))]
    stop = set(next(filter(None, found), ()))
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        stop.add(tokenizer.eos_token_id)
    return tuple(sorted(stop))


def _image_token(source: Source, tokenizer: "PreTrainedTokenizerBase | None") -> str:
    """`Processor.image_token`; the tokenizer's own, if it names one, as transformers has it.

    A fused folder's chat template may be another member's than its tokenizer.
    """
    fused = source.layout == "visionfuse" and source.image_token in source.chat_template
    if not source.image_token or source.written or fused or tokenizer is None:
        return source.image_token
    token = getattr(tokenizer, "image_token", None) or source.image_token
    found = tokenizer.added_tokens_encoder.get(token)
    names = [key for key in ("image_token_id", "image_token_index") if key in source.config]
    key = [*names, "image_token_index"][0]
    said = source.config.get(key, source.image_id)
    expected = found if said is None else said
    lacks = found is None and token == IMAGE_TOKEN  # pictures can be told from text all the same
    if source.layout != "visionfuse" and (found is None or found != expected) and not lacks:
        raise InputError(
            f"{source.home}: {token}",
            found="none in the tokenizer" if found is None else f"id {found} in the tokenizer",
            expected="it"
            if said is None
            else f"{said}, as config.json says by {key}"
            if names
            else f"{said}, as no {key} in config.json means",
            fix="take both files from one repository",
        )
    return token


def _check_tokens(source: Source, tokenizer: "PreTrainedTokenizerBase", rows: int) -> None:
    """Whether prompts can be asked.

    Raises:
        InputError: tokens of a prompt have no rows, or what stands around pictures is no token.
    """
    said = [word for branch in source.branches for word in branch.connector.get("words", ())]
    for word in said:
        if len(tokenizer(word, add_special_tokens=False).input_ids) != 1:
            raise InputError(
                f"{source.home}: tokenizer",
                found=f"no token {word}",
                expected="it: a member was trained with it around pictures",
                fix="use the tokenizer of the member, as a fusion does with vocab=",
            )
    known = source.template != CHAT_TEMPLATE
    text = get_template(source.template).text if known else source.chat_template
    ids = tokenizer(text.replace(source.image_token or IMAGE_TOKEN, " ")).input_ids
    if beyond := [i for i in ids if i >= rows]:
        token = tokenizer.convert_ids_to_tokens(beyond[0])
        raise InputError(
            f"{source.home}: tokenizer",
            found=f"id {beyond[0]} of {token!r}, which prompts of template {source.template} have",
            expected=f"ids below {rows}, the rows of the embedding",
            fix="use the checkpoint's own tokenizer",
        )
