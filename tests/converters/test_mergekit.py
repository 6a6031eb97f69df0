"""YAMLs of mergekit whose tokenizers are made of several, beside what mergekit 0.1.5 made.

tests/peers/mergekit_tokenizers.py recorded its results, and makes the folders.
"""

import contextlib
import json
import os
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
import yaml
from safetensors.numpy import save_file

import converters
from converters.files.reader import read_weights
from vfjax import InputError
from vfjax.atomic import read_json

TESTS = Path(__file__).resolve().parents[1]
RECORD = np.load(TESTS / "data" / "mergekit_tokenizers.npz")
CASES = json.loads(str(RECORD["cases"]))
PEER = runpy.run_path(str(TESTS / "peers" / "mergekit_tokenizers.py"))
TENSORS = {"embed": "model.embed_tokens.weight", "head": "lm_head.weight"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    PEER["write"](root, lambda tensors, file: save_file(tensors, file, {"format": "pt"}))
    return root


def fused(models: Path, out: Path, config: Any, **options: Any) -> dict[str, np.ndarray]:
    """Tensors of the folder that a YAML makes."""
    text = config if isinstance(config, str) else yaml.safe_dump(config, sort_keys=False)
    (out.parent / f"{out.name}.yml").write_text(text)
    here = Path.cwd()
    os.chdir(models)
    try:
        converters.fuse({}, out, recipe=out.parent / f"{out.name}.yml", export="llm", **options)
    finally:
        os.chdir(here)
    return {name: tensor[...] for name, tensor in read_weights(out).items()}


@pytest.mark.parametrize("case", [case for case in CASES if "error" not in CASES[case]])
def test_tokens_and_embeddings(models: Path, tmp_path: Path, case: str):
    """Token by token: the same tokens, ids, added ones, template and rows."""
    known = CASES[case]
    found = fused(models, tmp_path / "out", known["yaml"])
    made = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    vocab = made.get_vocab()
    assert set(vocab) == set(known["vocab"])
    ordered = sorted(vocab, key=vocab.get)
    if case not in UNORDERED:
        assert vocab == known["vocab"]
    if "base_model" in known["yaml"]:  # else mergekit takes whose hash comes first
        assert sorted(x.content for x in made.added_tokens_decoder.values()) == known["added"]
    assert read_json(tmp_path / "out" / "config.json")["vocab_size"] == known["rows"]
    if "chat" in known:
        chat = made.apply_chat_template(
            PEER["MESSAGES"], tokenize=False, add_generation_prompt=True
        )
        assert chat == known["chat"]
    else:
        assert not made.chat_template
    for kind, name in TENSORS.items():
        theirs = RECORD[f"{case}/{kind}"]
        assert found[name].shape == theirs.shape == (known["rows"], PEER["HIDDEN"])
        same = [known["vocab"][word] for word in ordered]
        ours = found[name][[vocab[word] for word in ordered]]
        np.testing.assert_allclose(ours, theirs[same], rtol=0, atol=2e-6)
        padding = slice(len(vocab), None)
        np.testing.assert_allclose(found[name][padding], theirs[padding], rtol=0, atol=2e-6)


def test_what_becomes_of_tokens_is_said(models: Path, tmp_path: Path):
    """In MERGE.md, as for `vocab`: rows and tokens that a model gets or loses."""
    fused(models, tmp_path / "out", CASES["from_other"]["yaml"])
    said = (tmp_path / "out" / "MERGE.md").read_text().partition("## Vocabulary")[2]
    lines = [line for line in said.partition("## Sources")[0].splitlines() if line]
    assert lines == [
        "- member 'base-2': 3 rows more than its 32, with 'more' (32), 'words' (33), "
        "'<|im_end|>' (34)",
        "- member 'chatml': 1 row more than its 34, without its tokens '<|im_start|>' (32), "
        "with 'more' (32), 'words' (33)",
        "- member 'other': 5 of 40 rows dropped",
    ]
    fused(models, tmp_path / "same", CASES["chat_text"]["yaml"])
    said = (tmp_path / "same" / "MERGE.md").read_text()
    assert "'padded': without its tokens '<UNUSED_0>' (32), '<UNUSED_1>' (33)" in said


UNORDERED = {"task", "shared", "no_base", "chat_auto"}
"""Where mergekit's ids of new tokens hang on a hash; ours are in the recipe's order."""


def test_tokens_that_mergekit_fails_at(models: Path, tmp_path: Path):
    """A token without a row in the tokenizer's own model: a KeyError there, no token here."""
    known = CASES["tokens_base"]
    assert known["error"].startswith("KeyError: ")
    found = fused(models, tmp_path / "out", known["yaml"])[TENSORS["embed"]]
    one, two = (read_weights(models / x)[TENSORS["embed"]][...] for x in ("base", "chatml"))
    vocab = transformers.AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    assert sorted(set(vocab) - set(PEER["WORDS"])) == ["<|im_end|>", "new"]
    np.testing.assert_array_equal(found[vocab["<|im_end|>"]], two[33])
    np.testing.assert_array_equal(found[vocab["_tok_13"]], two[33])
    np.testing.assert_array_equal(found[vocab["_tok_12"]], 0)
    np.testing.assert_array_equal(found[vocab["new"]], one[3])
    np.testing.assert_allclose(found[20], (one[20] + two[20]) / 2, rtol=1e-6)


LISTED = [{"model": "base", "parameters": {"weight": 0.3}}, {"model": "chatml"}]
TASK = {"merge_method": "task_arithmetic", "base_model": "chatml", "models": LISTED[:1]}
LONG = {"model": {"model": {"path": "long", "revision": "main"}, "lora": None}}


@pytest.mark.parametrize(
    ("config", "like"),
    [
        ({"models": [{"model": {"model": "base"}}]}, {"models": [{"model": "base"}]}),
        ({"models": [LONG]}, {"models": [{"model": "long"}]}),
        ({"models": [{"model": "long@v1"}]}, {"models": [{"model": "long"}]}),
        (
            {"slices": [{"sources": [{**LONG, "layer_range": [0, 1]}]}], "base_model": "long"},
            {"models": [{"model": "long"}]},
        ),
        ({"models": [{"model": "base"}], "name": "mine"}, {"models": [{"model": "base"}]}),
    ],
)
def test_references(models: Path, tmp_path: Path, config: dict[str, Any], like: dict[str, Any]):
    """Mappings, revisions and `name` say the same as the folder's name."""
    found, wanted = (
        fused(models, tmp_path / str(i), {"merge_method": "passthrough", **each})
        for i, each in enumerate((config, like))
    )
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value)


def test_anchors(models: Path, tmp_path: Path):
    """Anchors and merge keys are read as YAML has them, also where one is merged into another."""
    text = """
merge_method: linear
models:
- &one {model: base, parameters: &half {weight: '0.5'}}
- &two {<<: *one, model: chatml}
- {<<: *two, model: padded, parameters: {<<: *half, weight: 1e-1}}
tokenizer_source: base
dtype: float32
"""
    listed = [("base", 0.5), ("chatml", 0.5), ("padded", 0.1)]
    like = [{"model": model, "parameters": {"weight": weight}} for model, weight in listed]
    config = {"merge_method": "linear", "models": like, "tokenizer_source": "base"}
    found = fused(models, tmp_path / "out", text)
    for name, value in fused(models, tmp_path / "like", config).items():
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings(models: Path, tmp_path: Path, encoding: str):
    """A recipe in any encoding that YAML has is read, and kept as it is in the result's card."""
    file = tmp_path / "recipe.yml"
    text = f"# né\n{documents(half('base', 'chatml', tokenizer_source='base'))}"
    file.write_bytes(text.encode(encoding))
    with contextlib.chdir(models):
        converters.fuse({}, tmp_path / "out", recipe=file, export="llm", account=False)
    card = (tmp_path / "out" / "MERGE.md").read_text("utf-8")
    assert json.dumps(text)[1:-1] in card


def documents(*configs: dict[str, Any]) -> str:
    return yaml.safe_dump_all(configs, sort_keys=False)


def half(*names: str, **more: Any) -> dict[str, Any]:
    listed = [{"model": name, "parameters": {"weight": 0.5}} for name in names]
    return {"merge_method": "linear", "models": listed, "dtype": "float32", **more}


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_documents(models: Path, tmp_path: Path, named: bool, first: bool):
    """A merge of merges is that of the merges' folders, wherever it stands in the file."""
    inner = half("base", "padded", name="one", tokenizer_source="base")
    also = half("base", "chatml", name="two", tokenizer_source="union", base_model="base")
    outer = half("one", "two", base_model="two", tokenizer={"source": "union"})
    outer |= {"name": "last"} if named else {}
    order = (outer, inner, also) if first else (inner, also, outer)
    found = fused(models, tmp_path / "out", documents(*order))
    for each in (inner, also):
        fused(models, tmp_path / each["name"], each)
    paths = json.dumps(outer).replace('"one"', f'"{tmp_path / "one"}"')
    wanted = fused(models, tmp_path / "again", paths.replace('"two"', f'"{tmp_path / "two"}"'))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value)
    vocabs = [read_json(tmp_path / x / "tokenizer.json") for x in ("out", "again")]
    assert vocabs[0] == vocabs[1] and "<|im_start|>" in json.dumps(vocabs[0])
    card = (tmp_path / "out" / "MERGE.md").read_text()
    assert card.count("model.safetensors") == 4


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (documents(half("base"), half("chatml")), "name: found None, expected a name of its own"),
        (
            documents(half("base", name="a"), half("chatml", name="b")),
            "found a, b, expected one result",
        ),
        (documents(half("b", name="a"), half("a", name="b")), "found documents that need one"),
        (documents(half("b", name="a"), half("a", name="b"), half("a")), "'a' made of itself"),
        (documents(half("base", name="a"), half("base")), "found a, expected one result"),
        (half({"path": "base"}), "models.0.model: found key 'path', expected model, lora"),
        (half("a+b+c"), "found 'a+b+c', expected folder, or folder+adapter"),
        (half({"model": "base", "override_architecture": "X"}), "override_architecture 'X'"),
        (half("base", tokenizer={"sauce": "union"}), "tokenizer: found key 'sauce'"),
        (half("base", tokenizer={"pad_to_multiple_of": 0}), "pad_to_multiple_of: found 0"),
        (
            half("base", tokenizer={"tokens": {"x": {}}}),
            "tokenizer.tokens: 'x': found no source, expected one",
        ),
        (
            half("base", tokenizer={"tokens": {"x": {"source": "chatml"}}}),
            "tokenizer.tokens: 'x': found model 'chatml', expected one that is merged",
        ),
        (
            half("base", tokenizer={"tokens": {"x": {"source": "base"}}}),
            "tokenizer.tokens: 'x': found no 'x' in 'base-2', expected a token that it has",
        ),
        (half("base", tokenizer={"tokens": {"x": {"source": {"kind": "one"}}}}), "kind: zero"),
        (half("base", chat_template="chatmi"), "chat_template: found 'chatmi', expected auto"),
        ("- a", "found list, expected a mapping"),
        ("# nothing\n---\n", "found nothing, expected a mapping"),
        ("\tmodels: a", "found character '\\t' that cannot start any token in line 1"),
        ("merge_method: slerp\nmerge_method: linear", "found key 'merge_method' twice in line 2"),
        ("{merge_method: linear, model: [a]}", "recipe: found key 'model', expected models"),
        (
            half("base", "chatml", base_model="long", merge_method="slerp"),
            "models: found base-2, chatml, long with the base, expected two, the base among them",
        ),
    ],
)
def test_refusals(models: Path, tmp_path: Path, config: Any, line: str):
    with pytest.raises(InputError) as error:
        fused(models, tmp_path / "out", config)
    assert line in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
