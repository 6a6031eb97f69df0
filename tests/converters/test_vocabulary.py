"""Members of other numbers of rows and tokens: what is merged, kept, said, and what travels."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers.pre_tokenizers import Metaspace

import converters
from converters import open_source
from converters.files.reader import read_weights
from converters.tokenizer import load_tokenizer, tokenizer_of
from experiments.configs.fuse import get_config
from experiments.tasks import fuse as task
from tests.checkpoints import (
    hf_llava_folder,
    llama_folder,
    make_llama,
    tuned,
    upstream_llava_folder,
    write_json,
)
from vfjax import InputError
from vfjax.atomic import read_json

ROWS = 259
"""Of the base, as many as its tokenizer has tokens."""

EMBEDDING = "model.embed_tokens.weight"


def add_tokens(folder: Path, words: list[str], *, special: bool = True) -> None:
    """Tokens behind the vocabulary, in the files that transformers writes."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([transformers.AddedToken(x, special=special) for x in words])
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def ports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and two LLaVAs as transformers has them: `<image>`, `<pad>` and rows of padding."""
    root = tmp_path_factory.mktemp("ports")
    llama_folder(root / "base", 1, vocab_size=ROWS)
    for seed, name in enumerate("ab"):
        hf_llava_folder(root / name, seed, text={"vocab_size": ROWS + 13})
        add_tokens(root / name, ["<image>", "<pad>"])
        config = read_json(root / name / "config.json")
        write_json(root / name / "config.json", {**config, "image_token_index": ROWS})
    return root


def of(root: Path, names: str) -> dict[str, Path]:
    return {name: root / name for name in names}


def test_the_command_line_says_the_flag_to_add(ports: Path, tmp_path: Path, caplog: Any):
    """README's example: it fails with one flag to add, and with it says what was dropped."""
    config = get_config()
    config.members = tuple(str(ports / name) for name in "ab")
    config.base, config.family = str(ports / "base"), False  # weights are drawn apart here
    with pytest.raises(InputError) as error:
        task.run(config, tmp_path)
    assert str(error.value) == (
        f"a: vocab_size: found vocabulary of {ROWS + 13} rows, base has {ROWS}, expected one "
        "vocabulary; if they differ at the end only (added tokens, padding), "
        "--config.vocab='base' keeps the base's, --config.vocab='NAME' those of member NAME; "
        "otherwise merge only models that were fine-tuned from one base LLM"
    )
    config.vocab = "base"
    with caplog.at_level(logging.WARNING):
        task.run(config, tmp_path)
    said = [
        f"member '{name}': 13 of {ROWS + 13} rows dropped, without its tokens '<image>' ({ROWS}), "
        f"'<pad>' ({ROWS + 1})"
        for name in "ab"
    ]
    assert caplog.messages == [f"vocabulary: {line}" for line in said]
    out = tmp_path / "fused"
    assert "\n".join(["## Vocabulary", "", *(f"- {x}" for x in said)]) in (
        (out / "MERGE.md").read_text()
    )
    assert read_json(out / "config.json")["recipe"]["vocabulary"] == said


@pytest.mark.parametrize(("vocab", "rows", "tokens"), [("base", ROWS, ROWS), ("b", 272, 261)])
@pytest.mark.parametrize("export", ["model", "llm"])
def test_the_tokenizer_fits_the_rows(
    ports: Path, tmp_path: Path, vocab: str, rows: int, tokens: int, export: str
):
    members, more = of(ports, "ab"), {"base": ports / "base", "vocab": vocab, "family": False}
    converters.fuse(members, tmp_path / "out", export=export, **more)
    model, processor = converters.load(tmp_path / "out")
    assert model.config.llm.vocab == rows
    assert len(processor.tokenizer) == tokens
    text = processor.chat("hi")
    batch = processor([np.zeros((30, 40, 3), np.uint8)] if export == "model" else None, [text])
    assert batch.tokens.max() < rows
    if export == "llm":
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert theirs.config.vocab_size == rows
        return
    fused, own = converters.load_fused(members, **more)
    assert fused.config.llm.vocab == rows
    assert own.tokenizer.get_vocab() == processor.tokenizer.get_vocab()


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLMs of one origin and tokenizer, each with other padding: base 272, a 264, b 280."""
    root = tmp_path_factory.mktemp("padded")
    base = make_llama(0, vocab_size=272)
    llama_folder(root / "base", llm=base)
    for seed, (name, rows) in enumerate({"a": 264, "b": 280}.items(), 1):
        member = tuned(base, seed)
        member.resize_token_embeddings(rows)
        with torch.no_grad():
            for p in (member.model.embed_tokens.weight, member.lm_head.weight):
                p[272:] = seed
        llama_folder(root / name, llm=member)
    return root


@pytest.mark.parametrize(("vocab", "rows"), [("base", 272), ("a", 264), ("b", 280)])
def test_rows_that_a_member_lacks_have_no_delta(
    padded: Path, tmp_path: Path, vocab: str, rows: int
):
    more = {"base": padded / "base", "export": "llm", "params": {"weights": (0.5, 0.25)}}
    out = tmp_path / "out"
    converters.fuse(of(padded, "ab"), out, vocab=vocab, **more)
    for name in (EMBEDDING, "lm_head.weight"):
        base, a, b = (read_weights(padded / x)[name][...] for x in ("base", "a", "b"))
        expected = np.concatenate([base, b[272:]])
        expected[:264] += 0.5 * (a - base[:264])
        expected[:272] += 0.25 * (b[:272] - base)
        np.testing.assert_allclose(read_weights(out)[name][...], expected[:rows], atol=1e-6)
    config = read_json(out / "config.json")
    assert config["vocab_size"] == rows
    text = (out / "MERGE.md").read_text()
    told = {"a": rows - 264, "b": rows - 280, "base": rows - 272}
    assert sum("rows" in x for x in text.splitlines() if x.startswith("- ")) == 2
    for label, more_rows in told.items():
        who = "base" if label == "base" else f"member '{label}'"
        assert (f"- {who}: {more_rows} rows more than its" in text) == (more_rows > 0)
        assert (f"- {who}: {-more_rows} of " in text) == (more_rows < 0)


@pytest.mark.parametrize(("vocab", "rows"), [("a", 264), ("b", 280)])
def test_without_a_base(padded: Path, tmp_path: Path, vocab: str, rows: int):
    """What all have is merged, the rest is the kept member's."""
    more = {"method": "linear", "export": "llm", "params": {"weights": (1.0, 1.0)}}
    converters.fuse(of(padded, "ab"), tmp_path / "out", vocab=vocab, **more)
    a, b = (read_weights(padded / x)[EMBEDDING][...] for x in "ab")
    expected = np.concatenate([(a + b[:264]) / 2, b[264:]])[:rows]
    np.testing.assert_allclose(read_weights(tmp_path / "out")[EMBEDDING][...], expected, atol=1e-6)
    with pytest.raises(InputError, match="vocab: found 'base', expected a member; name a base"):
        converters.fuse(of(padded, "ab"), tmp_path / "no", vocab="base", **more)


def test_nothing_is_said_where_nothing_changes(padded: Path, tmp_path: Path, caplog: Any):
    members = {"a": padded / "base", "b": padded / "base"}
    with caplog.at_level(logging.WARNING):
        converters.fuse(members, tmp_path / "out", method="linear", export="llm")
    assert not caplog.messages
    assert "Vocabulary" not in (tmp_path / "out/MERGE.md").read_text()


def test_tokens_of_a_member_in_rows_that_all_have(padded: Path, tmp_path: Path, caplog: Any):
    """A row that is padding in one and a token in the other: it leaves the tokenizer, said."""
    for name in "xy":
        llama_folder(tmp_path / name, llm=tuned(make_llama(0, vocab_size=272), 5))
    add_tokens(tmp_path / "y", ["<new>"])
    with caplog.at_level(logging.WARNING):
        converters.fuse(of(tmp_path, "xy"), tmp_path / "out", base=padded / "base", export="llm")
    assert caplog.messages == ["vocabulary: member 'y': without its tokens '<new>' (259)"]


def test_no_tokenizer_that_fits(ports: Path, tmp_path: Path):
    base = tmp_path / "base"
    base.mkdir()
    for name in ("config.json", "model.safetensors"):
        (base / name).symlink_to(ports / "base" / name)
    with pytest.raises(
        InputError, match=r"a: tokenizer: found 261 tokens, expected at most the 25"
    ):
        converters.fuse(of(ports, "ab"), tmp_path / "out", base=base, vocab="base", family=False)


def test_tokens_that_the_template_needs(ports: Path, tmp_path: Path):
    hf_llava_folder(
        tmp_path / "c", 3, text={"vocab_size": ROWS + 13}, mm_prompt_template="qwen_1_5"
    )
    add_tokens(tmp_path / "c", ["<|im_start|>", "<|im_end|>"])
    more: dict = {"base": ports / "base", "family": False}
    members = {"c": tmp_path / "c", "b": ports / "b"}
    with pytest.raises(InputError, match=r"'<\|im_start\|>', which prompts of template qwen_1_5"):
        converters.fuse(members, tmp_path / "out", vocab="base", **more)
    source = converters.fuse(members, tmp_path / "out", vocab="c", **more)
    assert source.template == "qwen_1_5"


def test_members_that_read_by_themselves_know_fewer_ids(ports: Path):
    """In mode "cache" each member embeds the prompt: an id must have a row in all of them."""
    more: dict = {"base": ports / "base", "vocab": "b", "family": False}
    members = {"a": ports / "a", "b": ports / "b"}
    _, processor = converters.load_fused(members, mode="cache", **more)
    assert processor.config.llm.vocab == ROWS + 13
    base = {"a": ports / "a", "b": ports / "short"}
    hf_llava_folder(ports / "short", 5, text={"vocab_size": ROWS + 4})
    _, processor = converters.load_fused(base, mode="cache", **{**more, "vocab": "a"})
    assert processor.config.llm.vocab == ROWS + 4


@pytest.mark.parametrize("ported", [True, False])
def test_a_fused_folder_keeps_its_members_ids(tmp_path: Path, shared: Path, ported: bool):
    """Transformers' LLaVA goes by tokenizer.json, an authors' folder by SentencePiece's file."""
    if ported:
        hf_llava_folder(tmp_path / "a", text={"vocab_size": 32000})
    else:
        upstream_llava_folder(
            tmp_path / "a", llm=make_llama(1, vocab_size=32000), weights="safetensors"
        )
    model = shared / "tokenizers" / "llama2" / "tokenizer.model"
    (tmp_path / "a/tokenizer.model").symlink_to(model)
    write_json(tmp_path / "a/tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"})
    engine = load_tokenizer(tmp_path / "a").backend_tokenizer
    engine.normalizer, engine.pre_tokenizer = None, Metaspace(prepend_scheme="first", split=False)
    engine.save(str(tmp_path / "a/tokenizer.json"))
    members = {"a": tmp_path / "a", "b": tmp_path / "a"}
    converters.fuse(members, tmp_path / "out", method="linear")
    expected = tokenizer_of(open_source(tmp_path / "a"))
    found = tokenizer_of(open_source(tmp_path / "out"))
    texts = (" hi", "hi</s>USER", "hi</s> USER: a")
    assert [found(x).input_ids for x in texts] == [expected(x).input_ids for x in texts]
    one = [engine.encode(x).ids for x in texts] == [found(x).input_ids for x in texts]
    assert one == ported
