"""A folder's tokenizer, as the code that its model was trained with had it."""

import warnings
from pathlib import Path
from typing import Any

from converters.layouts import TOKENIZERS, has_tokenizer
from converters.reader import first_line, read_json
from vfjax import InputError

LLAMA = ("LlamaTokenizer", "LlamaTokenizerFast", "LLaMATokenizer", "LLaMATokenizerFast")
BPE = 2
"""SentencePiece's number of the kind of model that Llama has."""


def load_tokenizer(folder: Path) -> Any:
    """The folder's transformers tokenizer, None if it has none; no code of the folder is run.

    Raises:
        InputError: files that transformers can't read.
    """
    if not has_tokenizer(folder):
        return None
    import transformers  # takes seconds, so only where it is needed

    load, options, old = transformers.AutoTokenizer, {}, False
    try:
        if not (folder / TOKENIZERS[0]).is_file():
            # SentencePiece alone: what transformers 4, which wrote these folders, meant by silence.
            known = _json(folder / "tokenizer_config.json")
            options = {k: known.get(k, True) for k in ("add_bos_token", "legacy")}
            gemma = "gemma" in str(_json(folder / "config.json").get("model_type"))
            old = known.get("tokenizer_class", "" if gemma else LLAMA[0]) in LLAMA
            load = transformers.LlamaTokenizer if old else load
        transformers.logging.set_verbosity_error()  # it warns of every model_type but its own
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # and of older versions' configs
            tokenizer = load.from_pretrained(folder, trust_remote_code=False, **options)
        if old:
            _as_sentencepiece(tokenizer, folder / TOKENIZERS[1], options["legacy"])
        return tokenizer
    except InputError:
        raise
    except Exception as error:  # tokenizers has no class of its own
        raise InputError(
            folder,
            found=f"a tokenizer that transformers can't read ({first_line(error)})",
            expected="tokenizer.json, or tokenizer.model and tokenizer_config.json",
            fix="copy the tokenizer files from the published repository",
        ) from error


def _json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _as_sentencepiece(tokenizer: Any, file: Path, legacy: bool) -> None:
    """Lets a Llama tokenizer give SentencePiece's ids, as that of transformers 4 did.

    Transformers 5 ranks merges by id, where Llama's runs of spaces must merge last, and puts no
    space before a text that begins with one.
    """
    from sentencepiece import sentencepiece_model_pb2 as pb
    from tokenizers import Regex, models, normalizers
    from transformers.convert_slow_tokenizer import generate_merges

    proto = pb.ModelProto.FromString(file.read_bytes())  # type: ignore[attr-defined]
    if proto.trainer_spec.model_type != BPE:
        return
    scores = [(piece.piece, piece.score) for piece in proto.pieces]
    vocab = {piece: i for i, (piece, _) in enumerate(scores)}
    backend, merges = tokenizer.backend_tokenizer, generate_merges(vocab, scores)
    backend.model = models.BPE(vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True)
    if legacy:  # a space before each piece of text between special tokens
        prepend = [normalizers.Prepend("▁")] if proto.normalizer_spec.add_dummy_prefix else []
        backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = None
    else:  # before the first, which the pre-tokeniser does unless it has one
        backend.normalizer = normalizers.Replace(Regex(r"\A "), "  ")
