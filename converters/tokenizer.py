"""A folder's tokenizer, as the code that its model was trained with had it."""

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from converters.files.names import TOKENIZERS
from converters.files.reader import first_line
from converters.source import Source, has_tokenizer
from vfjax import InputError
from vfjax.atomic import read_json, temporary
from vfjax.errors import cut

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LLAMA = (
    *("LlamaTokenizer", "LlamaTokenizerFast", "LLaMATokenizer", "LLaMATokenizerFast"),
    *("InternLM2Tokenizer", "InternLM2TokenizerFast"),  # of code that does the same
)
BPE = 2
"""SentencePiece's number of the kind of model that Llama has."""

GEMMA = "<bos>"
"""A piece of Gemma's SentencePiece files that Llama's have not."""

SETTINGS = "tokenizer_config.json"


class Piece(Protocol):
    """A token of a SentencePiece file."""

    piece: str
    score: float


class Trainer(Protocol):
    """How a SentencePiece file was made; `model_type` is a number, see `BPE`."""

    model_type: int


class Normalizer(Protocol):
    """What SentencePiece does to a text first."""

    add_dummy_prefix: bool


class Pieces(Protocol):
    """What is read here of `sentencepiece_model.proto`'s ModelProto."""

    pieces: Sequence[Piece]
    trainer_spec: Trainer
    normalizer_spec: Normalizer


def tokenizer_of(source: Source) -> "PreTrainedTokenizerBase | None":
    """The transformers tokenizer of an opened folder, see `load_tokenizer`."""
    return load_tokenizer(source.home, source.tokenizer)


def load_tokenizer(
    folder: Path, config: Mapping[str, str] | None = None
) -> "PreTrainedTokenizerBase | None":
    """The folder's transformers tokenizer, None if it has none; no code of the folder is run.

    A folder of transformers' gives what its AutoTokenizer gives. Authors' code ran older versions:
    their folders give SentencePiece's ids where there is a SentencePiece file of Llama's kind, as
    with `use_fast=False`, else what tokenizer.json computes.

    Args:
        folder: where the tokenizer's files are; a config.json there is not read.
        config: for a folder of transformers' the `model_type` and `tokenizer_class` of its
            config.json, by which AutoTokenizer chooses a class; nothing for others.

    Raises:
        InputError: files that transformers can't read, or that need code of their own.
    """
    if not has_tokenizer(folder):
        return None
    settings = folder / SETTINGS
    known = read_json(settings) if settings.is_file() else {}
    try:
        with _alone(folder) as home:
            tokenizer = _load(home, known, dict(config or {}))
        tokenizer("a b")  # a setting of a wrong type may show with the first text only
        tokenizer.name_or_path = str(folder)
        return tokenizer
    except BaseException as error:  # tokenizers has no class of its own
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # Rust's
            raise
        own = f"auto_map {cut(repr(known['auto_map']))}, " if "auto_map" in known else ""
        raise InputError(
            folder,
            found=f"a tokenizer that transformers can't read ({own}{cut(first_line(error), 300)})",
            expected="tokenizer.json, or tokenizer.model and tokenizer_config.json",
            fix="copy the tokenizer files from the published repository"
            + (", without auto_map: code of a folder is never run" if own else ""),
        ) from error


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[Path]:
    """A folder with links to another's files, without config.json and code.

    Transformers reads config.json in several places, and refuses what it doesn't know there.
    """
    with temporary() as home:
        for path in folder.iterdir():
            if path.name != "config.json" and path.suffix != ".py":
                (home / path.name).symlink_to(path.absolute())
        yield home


def _load(
    home: Path, known: Mapping[str, Any], config: dict[str, str]
) -> "PreTrainedTokenizerBase":
    """The tokenizer of a folder that holds nothing else; `known` is its tokenizer_config.json."""
    import transformers  # takes seconds, so only where it is needed

    fast, slow = (home / name for name in TOKENIZERS)
    proto = _sentencepiece(slow) if slow.is_file() and not (config and fast.is_file()) else None
    default = LLAMA[0]
    if proto and (GEMMA in {piece.piece for piece in proto.pieces} or "gemma" in str(config)):
        config.setdefault("tokenizer_class", default := "GemmaTokenizer")
    llama = proto is not None and known.get("tokenizer_class", default) in LLAMA
    options: dict[str, Any] = {}
    if slow.is_file() and (not fast.is_file() or llama):
        # SentencePiece alone: what transformers 4, which wrote these folders, meant by silence.
        options = {k: known.get(k) is not False for k in ("add_bos_token", "legacy")}
    settings = dict(known)
    if not config:
        settings.pop("auto_map", None)  # authors' code asks for none
    if llama:
        settings["added_tokens_decoder"] = _added(home, known)
        fast.unlink(missing_ok=True)
    if settings != known:
        (home / SETTINGS).unlink(missing_ok=True)
        (home / SETTINGS).write_text(json.dumps(settings))
    transformers.logging.set_verbosity_error()  # it warns of every model_type but its own
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # and of older versions' configs
        load: Any = transformers.LlamaTokenizer
        if not llama:
            load, kinds = transformers.AutoTokenizer, transformers.CONFIG_MAPPING
            known_type = config.get("model_type") in kinds
            kind = kinds[config["model_type"]] if known_type else transformers.PreTrainedConfig
            options["config"] = kind(tokenizer_class=config.get("tokenizer_class"))
        tokenizer = load.from_pretrained(home, trust_remote_code=False, **options)
    if llama and proto is not None:
        _as_sentencepiece(tokenizer, proto, options["legacy"])
        for i, token in settings["added_tokens_decoder"].items():
            if tokenizer.convert_tokens_to_ids(token["content"]) != int(i):
                raise ValueError(f"no place for added token {token['content']!r} of id {i}")
    elif fast.is_file() and not config:
        _as_file(tokenizer, fast)
    return tokenizer


def _sentencepiece(file: Path) -> "Pieces | None":
    """The model of a SentencePiece file; None if it is of another kind, as tiktoken's."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2 as pb

    try:
        return pb.ModelProto.FromString(file.read_bytes())  # type: ignore[attr-defined]
    except DecodeError:
        return None


def _added(home: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    """added_tokens_decoder of a folder: id -> token; of an old one from the files that held them.

    Tokens are found in the text as it is, as transformers 4's slow classes did.
    """
    found = dict(known.get("added_tokens_decoder", {}))
    if "added_tokens_decoder" not in known:
        special = str(_json(home / "special_tokens_map.json"))
        old = _json(home / "added_tokens.json")
        found = {str(i): {"content": x, "special": repr(x) in special} for x, i in old.items()}
        for token in _json(home / TOKENIZERS[0]).get("added_tokens", []):
            found[str(token["id"])] = {k: v for k, v in token.items() if k != "id"}
    return {i: {**token, "normalized": False} for i, token in found.items()}


def _json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _as_sentencepiece(tokenizer: "PreTrainedTokenizerBase", proto: "Pieces", legacy: bool) -> None:
    """Lets a Llama tokenizer give SentencePiece's ids, as that of transformers 4 did.

    Transformers 5 ranks merges by id, where Llama's runs of spaces must merge last, and puts no
    space before a text that begins with one.
    """
    from tokenizers import models, normalizers, pre_tokenizers
    from transformers.convert_slow_tokenizer import generate_merges

    if proto.trainer_spec.model_type != BPE:
        return
    scores = [(piece.piece, piece.score) for piece in proto.pieces]
    vocab = {piece: i for i, (piece, _) in enumerate(scores)}
    backend, merges = tokenizer.backend_tokenizer, generate_merges(vocab, scores)
    backend.model = models.BPE(vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True)
    spaces = normalizers.Replace(" ", "▁")
    if legacy:  # a space before each piece of text between special tokens
        prepend = [normalizers.Prepend("▁")] if proto.normalizer_spec.add_dummy_prefix else []
        backend.normalizer = normalizers.Sequence([*prepend, spaces])
        backend.pre_tokenizer = None
    else:  # before the first piece alone; Metaspace would not put one before another
        backend.normalizer = spaces
        first = pre_tokenizers.Metaspace(" ", prepend_scheme="first", split=False)
        rest = pre_tokenizers.Metaspace("▁", prepend_scheme="never", split=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([first, rest])


def _as_file(tokenizer: "PreTrainedTokenizerBase", file: Path) -> None:
    """Lets a tokenizer compute what its tokenizer.json says: some classes rebuild it by rules."""
    from tokenizers import Tokenizer

    written = Tokenizer.from_file(str(file))
    for part in ("model", "normalizer", "pre_tokenizer", "post_processor", "decoder"):
        setattr(tokenizer.backend_tokenizer, part, getattr(written, part))
