"""GGUF files of causal LMs as HF folders: config.json, tokenizer, names of tensors.

What an LLM sees with, in a file of its own, is in `converters.mmproj`.

As llama.cpp writes and reads them (its gguf-py/gguf/constants.py and tensor_mapping.py, which the
package `gguf` is; src/llama-model.cpp). The tokenizer is built by transformers
(integrations/gguf/gguf_tokenizer_mapping.py), but for how BPEs split text, see `SPLITS`.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from converters import mmproj
from converters.files import gguf, gguf_header
from converters.files.gguf_header import Header
from converters.registry import find
from converters.values import ANY, REQUIRED, Unused, Values
from vfjax import InputError
from vfjax.atomic import JSON

if TYPE_CHECKING:
    import tokenizers

KINDS = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma": ("gemma", "GemmaForCausalLM"),
    "phi3": ("phi3", "Phi3ForCausalLM"),
}
"""`general.architecture` -> `model_type` and class; Mistral's are llama's there."""

SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "num_attention_heads": "attention.head_count",
    "num_hidden_layers": "block_count",
}
"""Key of config.json -> key in the file behind its architecture."""

UNUSED: Unused = {
    "rope.dimension_count": ANY,  # the heads' size, as their tensors have it; see `_rope`
    "vocab_size": ANY,  # the embedding's rows say it
    "attention.value_length": ANY,  # tensors' shapes are checked
    "attention.causal": (True,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "logit_scale": (1.0,),
    "use_parallel_residual": (False,),
    "tensor_data_layout": ANY,  # of old files: their rows are swapped in any case
}
"""Keys in the file behind its architecture without effect."""

FACTORS = "rope_freqs.weight"
"""What llama.cpp divides a head's frequencies by, in place of Llama 3's keys of config.json."""

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Of all of Llama 3.1 to 3.3; the file does not say them."""


def write(headers: Sequence[Header], folder: Path) -> dict[str, gguf.Held]:
    """Writes a model's config.json and tokenizer into a folder; its tensors by HF names.

    Args:
        headers: of its LLM's file, and of its `mmproj` file.
        folder: what they stand for.

    Raises:
        InputError: an architecture, a key, a tensor or a tokenizer that is not known.
    """
    header = headers[0]
    config = config_of(header)
    tensors = tensors_of(header, config)
    tokenizer = tokenizer_of(header)
    if tokenizer is not None:
        kept = tokenizer_files(header, tokenizer, folder)
        config |= kept
        settings = json.dumps({**kept, **sampling(header)})
        (folder / "generation_config.json").write_text(settings)
    if headers[1:]:
        config, tensors = mmproj.seeing(headers[1], header, config, tensors, folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return tensors


def config_of(header: Header) -> dict[str, Any]:
    """config.json of a file.

    Raises:
        InputError: another architecture, a key that is not known, or one of a wrong type.
    """
    whole = Values(header.values, str(header.path))
    kind = whole.text("general.architecture")
    if kind not in KINDS:
        raise InputError(
            f"{header.path}: general.architecture",
            found=repr(kind)[:60],
            expected=", ".join(KINDS),
            fix="not supported: take its repository",
        )
    own = {
        key.removeprefix(f"{kind}."): value
        for key, value in header.values.items()
        if key.startswith(f"{kind}.")
    }
    others = [
        key
        for key in header.values
        if not key.startswith((f"{kind}.", "general.", "tokenizer.", "quantize."))
    ]
    if others:
        raise InputError(
            f"{header.path}: {others[0]}",
            found="a key that is not known",
            expected=f"those of {kind}",
            fix="take its repository",
        )
    values = Values(own, f"{header.path}: {kind}")
    model_type, architecture = KINDS[kind]
    config: dict[str, Any] = {"model_type": model_type, "architectures": [architecture]}
    config |= {key: values.whole(name) for key, name in SIZES.items()}
    heads = config["num_attention_heads"]
    config["num_key_value_heads"] = values.whole("attention.head_count_kv", heads)
    size = config["hidden_size"] // heads
    if kind != "phi3":  # whose class derives it
        config["head_dim"] = values.whole("attention.key_length", size)
    config["rms_norm_eps"] = round(values.number("attention.layer_norm_rms_epsilon"), 12)
    window = values.whole("attention.sliding_window", None, least=0)
    if window and kind == "phi3":
        config["sliding_window"] = window
    elif window:
        raise values.error("attention.sliding_window", "none")
    config["tie_word_embeddings"] = "output.weight" not in header.tensors
    config["vocab_size"] = _shape(header, "token_embd.weight")[0]
    config |= _rope(header, values, size if kind == "phi3" else config["head_dim"])
    if kind == "gemma":
        config["hidden_activation"] = "gelu_pytorch_tanh"
    if kind == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
    values.done(UNUSED)
    return config


def _shape(header: Header, name: str) -> tuple[int, ...]:
    if name not in header.tensors:
        raise InputError(
            header.path, found=f"no tensor {name}", expected="it", fix="download it again"
        )
    return header.tensors[name][0]


def _rope(header: Header, values: Values, size: int) -> dict[str, Any]:
    """How positions turn; `size` is a head's.

    Raises:
        InputError: heads that turn in part, scaling that is not known, or without its factors.
    """
    turned = values.whole("rope.dimension_count", size)
    if turned != size:
        raise values.error("rope.dimension_count", f"{size}, a head's size")
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": values.number("rope.freq_base", 1e4),
    }
    kind = values.choice("rope.scaling.type", ("none", "linear", "yarn", "longrope"), "none")
    factor = values.number("rope.scaling.factor", 1.0)
    before = values.whole("rope.scaling.original_context_length", None)
    attention = values.number("rope.scaling.attn_factor", None)
    values.any("rope.scaling.finetuned")  # says nothing of how
    found: dict[str, Any] = {}
    long, short = (f"rope_factors_{which}.weight" for which in ("long", "short"))
    if FACTORS in header.tensors:
        rope |= _llama3(header, rope["rope_theta"], size)
    elif long in header.tensors:
        rope |= {"rope_type": "longrope"}
        rope |= {
            key: gguf.tensor(header, name)[...].astype(np.float64).tolist()
            for key, name in (("long_factor", long), ("short_factor", short))
            if _shape(header, name)
        }
        found["original_max_position_embeddings"] = before
        if attention is not None:
            rope["attention_factor"] = attention
    elif kind in ("linear", "yarn"):
        rope |= {"rope_type": kind, "factor": factor}
        if kind == "yarn" and before is not None:
            rope["original_max_position_embeddings"] = before
        if kind == "yarn" and attention is not None:
            rope["attention_factor"] = attention
    elif kind == "longrope" or (kind == "none" and factor not in (0.0, 1.0)):
        raise values.error("rope.scaling.type", "its factors among the tensors, or a known one")
    return {"rope_parameters": rope, **found}


def _llama3(header: Header, theta: float, size: int) -> dict[str, Any]:
    """Llama 3's scaling by what it divides frequencies by.

    Raises:
        InputError: factors that Llama 3's keys don't make.
    """
    factors = gguf.tensor(header, FACTORS)[...].astype(np.float64)
    factor = float(factors.max())
    low, high, before = LLAMA3.values()
    waves = 2 * np.pi * theta ** (np.arange(0, size, 2) / size)
    smooth = ((before / waves - low) / (high - low)).clip(0, 1)
    made = 1 / ((1 - smooth) / factor + smooth)
    if made.shape != factors.shape or not np.allclose(made, factors, rtol=1e-5):
        raise InputError(
            f"{header.path}: {FACTORS}",
            found="factors that differ from Llama 3.1's",
            expected=", ".join(f"{key} {value:g}" for key, value in LLAMA3.items()),
            fix="take the repository that the file was made from",
        )
    return {"rope_type": "llama3", "factor": round(factor, 4), **LLAMA3}


def tensors_of(header: Header, config: Mapping[str, Any]) -> dict[str, gguf.Held]:
    """HF name -> tensor, of a causal LM.

    Raises:
        InputError: a tensor that no name of the model's table fits.
    """
    package = gguf_header.package(header.path)
    kind = header.values["general.architecture"]
    arch = next(x for x, name in package.MODEL_ARCH_NAMES.items() if name == kind)
    layers = config["num_hidden_layers"]
    known = package.get_tensor_name_map(arch, layers)
    heads = {
        "attn_q": config["num_attention_heads"] * (kind == "llama"),
        "attn_k": config["num_key_value_heads"] * (kind == "llama"),
    }
    out: dict[str, gguf.Held] = {}
    for name in _names(config, layers):
        own = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if own in header.tensors:
            swapped = re.search(r"\.(attn_[qk])\.", own)
            less = float(kind == "gemma" and "norm" in own)
            pairs = heads[swapped[1]] if swapped else 0
            out[name] = gguf.tensor(header, own, heads=pairs, less=less)
    left = set(header.tensors) - {tensor.name for tensor in out.values()}
    left -= {FACTORS, "rope_factors_long.weight", "rope_factors_short.weight"}
    if left:
        raise InputError(
            f"{header.path}: {min(left)}",
            found=f"a tensor that no part of a {config['model_type']} is",
            expected=f"those of gguf's names for {kind}",
            fix="take the repository that the file was made from",
        )
    return out


def _names(config: Mapping[str, Any], layers: int) -> Iterator[str]:
    """Names that a checkpoint of the model may have."""
    for rule in find(config, "config.json").rules:
        if "{}" in rule.source:
            yield from (rule.source.format(layer) for layer in range(layers))
        else:
            yield rule.source


SPLITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
"""`tokenizer.ggml.pre` of BPEs that take each digit by itself; transformers does not know them."""

WHOLE = ("gpt-2", "gpt2", "olmo", "jais", "mpt", "phi-2", "granite-docling", "trillion")
"""Those that split as GPT-2's."""

DEFAULT = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)
"""How llama.cpp splits for "default", or a file that does not say how, one after another."""

COMPOSED = ("qwen2", "deepseek-r1-qwen")
"""Those whose letters are composed first (NFC)."""


def tokenizer_of(header: Header) -> "tokenizers.Tokenizer | None":
    """A file's tokenizer; None if it has none.

    Raises:
        InputError: one of a kind, or that splits text in a way, that is not known.
    """
    from tokenizers import Regex, normalizers, pre_tokenizers
    from transformers.integrations.gguf import gguf_tokenizer_mapping as theirs

    values = Values(header.values, str(header.path))
    kind = values.text("tokenizer.ggml.model", None)
    if kind in (None, "none", "no_vocab"):
        return None
    split = values.text("tokenizer.ggml.pre", "default")
    known = ("default", *SPLITS, *WHOLE, *theirs.GGUF_PRE_TOKENIZER_SPLITS)
    if kind not in ("gpt2", "llama"):
        raise values.error("tokenizer.ggml.model", "'gpt2' or 'llama'")
    if kind == "gpt2" and split not in known:
        raise values.error("tokenizer.ggml.pre", ", ".join(known), "take its repository")
    renamed = theirs.GGUF_TOKENIZER_MAPPING["tokenizer"]
    given = {
        name: header.values[f"tokenizer.{key}"]
        for key, name in renamed.items()
        if f"tokenizer.{key}" in header.values
    }
    try:
        made, _ = theirs.convert_gguf_tokenizer(header.values["general.architecture"], given)
    except Exception as error:  # of a vocabulary that does not fit itself
        raise InputError(
            f"{header.path}: tokenizer.ggml",
            found=f"a vocabulary that makes no tokenizer ({type(error).__name__}: {error})",
            expected="tokens, and merges or scores",
            fix="download it again",
        ) from error
    if kind == "gpt2" and split in SPLITS:
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        digits = pre_tokenizers.Digits(individual_digits=True)
        made.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    if kind == "gpt2" and split == "default":
        parts = [pre_tokenizers.Split(Regex(x), behavior="isolated") for x in DEFAULT]
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.pre_tokenizer = pre_tokenizers.Sequence([*parts, bytes_])
    if kind == "gpt2" and split in COMPOSED:
        made.normalizer = normalizers.NFC()
    if kind == "llama":  # transformers' leaves a space out where a text begins with one
        space = values.flag("tokenizer.ggml.add_space_prefix", True)
        first = [normalizers.Prepend("\u2581")] * space
        made.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "\u2581")])
        made.pre_tokenizer = None
    return made


NAMED = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown", "eot": "eot", "eom": "eom"}
"""A special token -> what the file calls it."""

STOPS = ("eos", "eot", "eom")
"""Those that end an answer."""

READ = (
    *("model", "pre", "tokens", "token_type", "scores", "merges"),
    *("bos_token_id", "eos_token_id", "eot_token_id", "eom_token_id"),
    *("padding_token_id", "unknown_token_id", "add_bos_token", "add_eos_token", "add_space_prefix"),
)
"""Keys behind "tokenizer.ggml." that are read; the space's of SentencePiece alone."""

IDLE: Unused = {
    "add_sep_token": (False,),
    "remove_extra_whitespaces": (False,),
    "token_type_count": ANY,  # BERT's
    **dict.fromkeys(f"fim_{x}_token_id" for x in ("pre", "suf", "mid", "pad", "rep", "sep")),
    **dict.fromkeys(("prefix_token_id", "suffix_token_id", "middle_token_id")),  # older words
    **dict.fromkeys(("seperator_token_id", "cls_token_id", "mask_token_id")),
}
"""Other keys there without effect on a causal LM that is asked."""


def _check_keys(header: Header) -> None:
    """Whether all keys of the tokenizer are known.

    Raises:
        InputError: one is not.
    """
    start = "tokenizer.ggml."
    own = {k.removeprefix(start): v for k, v in header.values.items() if k.startswith(start)}
    values = Values(own, f"{header.path}: {start[:-1]}")
    for key in READ:
        values.any(key)
    values.done(IDLE)
    templates = ("tokenizer.chat_template", "tokenizer.huggingface.json", start)
    for key in header.values:
        if key.startswith("tokenizer.") and not key.startswith(templates):
            raise Values(header.values, str(header.path)).error(key, "no such key")


SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
"""Keys behind "general.sampling." -> generation_config.json's."""


def sampling(header: Header) -> dict[str, JSON]:
    """How answers are drawn, for generation_config.json; empty if the file does not say.

    Raises:
        InputError: it asks for what is not supported.
    """
    start = "general.sampling."
    own = {k.removeprefix(start): v for k, v in header.values.items() if k.startswith(start)}
    values = Values(own, f"{header.path}: {start[:-1]}")
    found = {name: values.number(key) for key, name in SAMPLING.items() if key in values}
    values.done({})
    out: dict[str, JSON] = {
        name: int(x) if name == "top_k" else float(str(np.float32(x))) for name, x in found.items()
    }
    return {"do_sample": found.get("temperature", 1.0) > 0, **out} if out else {}


def _templates(values: Values) -> str | dict[str, str] | None:
    """The chat template, or templates by name, the file's own as "default"."""
    start = "tokenizer.chat_template."
    named = {k.removeprefix(start): values.text(k) for k in values.data if k.startswith(start)}
    found = values.text("tokenizer.chat_template", None)
    return {"default": found, **named} if found and named else found


def tokenizer_files(
    header: Header, tokenizer: "tokenizers.Tokenizer", folder: Path
) -> dict[str, JSON]:
    """Writes the tokenizer's files; its bos, eos and pad ids, as config.json has them.

    Raises:
        InputError: an id outside the vocabulary.
    """
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    _check_keys(header)
    values = Values(header.values, str(header.path))
    tokens = values.any("tokenizer.ggml.tokens", REQUIRED)
    ids: dict[str, JSON] = {}
    ends: list[int] = []
    named = {}
    for name, key in NAMED.items():
        found = values.whole(f"tokenizer.ggml.{key}_token_id", None, least=0, most=0xFFFFFFFF)
        if found is None or found == 0xFFFFFFFF:
            continue
        if found >= len(tokens):
            raise values.error(f"tokenizer.ggml.{key}_token_id", f"below {len(tokens)}")
        if name in STOPS:
            ends.append(found)
        if name in STOPS[1:]:
            continue
        named[f"{name}_token"] = tokens[found]
        if name != "unk":
            ids[f"{name}_token_id"] = found
    if len(ends := list(dict.fromkeys(ends))) > 1:
        ids["eos_token_id"] = ends
    spm = header.values["tokenizer.ggml.model"] == "llama"
    starts = values.flag("tokenizer.ggml.add_bos_token", spm) and "bos_token" in named
    ended = values.flag("tokenizer.ggml.add_eos_token", False) and "eos_token" in named
    around = [*(["bos"] * starts), "$", *(["eos"] * ended)]
    if starts or ended:
        words = [named[f"{x}_token"] if x != "$" else "$A" for x in around]
        both = [named[f"{x}_token"] if x != "$" else "$B" for x in around]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join(words) if " " not in "".join(words) else words,
            pair=[*words, *(f"{x}:1" for x in both)],
            special_tokens=[
                (named[f"{x}_token"], tokens.index(named[f"{x}_token"]))
                for x in sorted({*around} - {"$"})
            ],
        )
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    made.chat_template = _templates(values)
    made.save_pretrained(folder)
    return ids


gguf.register(write)
