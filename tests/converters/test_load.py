"""Loading: tensor by tensor, any dtype, and the files around the weights."""

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import tokenizers
import transformers
from flax import nnx
from sentencepiece import sentencepiece_model_pb2

import converters
from converters import open_source, registry
from converters.inspect import inspect
from converters.load import model_config
from converters.tokenizer import load_tokenizer, tokenizer_of
from tests.checkpoints import (
    hf_llava_folder,
    llama_folder,
    tokenizer_files,
    tower_folder,
    write_json,
)
from vfjax import InputError, Processor
from vfjax.atomic import read_json
from vfjax.vision.encoders import CLIPConfig


def edit_json(file: Path, **changes: Any) -> None:
    write_json(file, {**(read_json(file) if file.is_file() else {}), **changes})


def test_progress_counts_the_bytes_of_the_parameters(tmp_path: Path):
    hf_llava_folder(tmp_path)
    seen: list[int] = []
    model, _ = converters.load(tmp_path, dtype="bfloat16", progress=seen.append)
    sizes = [x.size for x in jax.tree.leaves(nnx.state(model))]
    assert sorted(seen) == sorted(2 * size for size in sizes)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", jnp.bfloat16, np.float16])
def test_dtypes(tmp_path: Path, dtype: Any):
    llama_folder(tmp_path)
    model, _ = converters.load(tmp_path, dtype=dtype)
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("dtype", ["int8", "float64", "half", "f32", np.int32])
def test_dtypes_that_parameters_do_not_have(tmp_path: Path, dtype: Any):
    with pytest.raises(InputError, match=r"^dtype: found .*, expected bfloat16, float16, float32"):
        converters.load(tmp_path, dtype=dtype)


def test_an_encoder_alone(tmp_path: Path):
    tower = tower_folder(tmp_path, "clip", 1)
    encoder = converters.load_encoder(tmp_path, dtype="float16")
    assert isinstance(encoder.config, CLIPConfig)
    theirs = tower.state_dict()
    name = next(n for n in theirs if n.endswith("encoder.layers.2.mlp.fc1.weight"))
    np.testing.assert_array_equal(encoder.blocks[2].mlp.fc1.kernel, theirs[name].half().numpy().T)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="found no weights, expected model.safetensors or"):
        converters.load_encoder(tmp_path)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"config.json": {"eos_token_id": 7}}, (2, 7)),
        ({"config.json": {"eos_token_id": None}}, (2,)),
        ({"config.json": {"eos_token_id": 7}, "generation_config.json": {}}, (2, 7)),
        (
            {
                "config.json": {"eos_token_id": 7},
                "generation_config.json": {"eos_token_id": [9, 8]},
            },
            (2, 8, 9),
        ),
    ],
)
def test_ids_that_end_an_answer(tmp_path: Path, files: dict, expected: tuple[int, ...]):
    """Those of the tokenizer, and of generation_config.json or else config.json."""
    llama_folder(tmp_path)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    for name, changes in files.items():
        edit_json(tmp_path / name, **changes)
    assert load_processor(tmp_path).stop_ids == expected


@pytest.mark.parametrize("ids", ["</s>", {"id": 2}, [2, None], 2.5])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_what_is_no_id_of_a_token(tmp_path: Path, file: str, ids: object):
    llama_folder(tmp_path)
    edit_json(tmp_path / file, eos_token_id=ids)
    with pytest.raises(InputError, match=f"{file}: eos_token_id: .* expected the id of a token"):
        inspect(tmp_path)


def load_processor(folder: Path) -> Processor:
    return converters.load(folder)[1]


def test_a_folder_without_a_tokenizer(tmp_path: Path):
    llama_folder(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    processor = load_processor(tmp_path)
    assert processor.tokenizer is None
    assert processor(input_ids=[[1, 5]]).mask.sum() == 2
    with pytest.raises(InputError, match="tokenizer: found none in the checkpoint folder"):
        processor(None, ["a"])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", ""),
        ("tokenizer.json", '{"model": {"type": "BPE"}}'),
        ("tokenizer.json", '{"version": "1.0", "added_tokens": [], "model": {"type": "none"}}'),
        ("tokenizer.json", '{"version": "1.0", "added_tokens": [], "model": {"type": "BPE"}}'),
        ("tokenizer_config.json", "{"),
        ("tokenizer.model", "no protocol buffer"),
        ("tokenizer.model", ""),
    ],
)
def test_a_broken_tokenizer(tmp_path: Path, name: str, content: str):
    tokenizer_files(tmp_path)
    write_json(tmp_path / "config.json", {"model_type": "llama"})
    if name == "tokenizer.model":
        (tmp_path / "tokenizer.json").unlink()
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError) as error:
        load_tokenizer(tmp_path)
    where = f"{tmp_path}: found a tokenizer that transformers can't read"
    if name == "tokenizer_config.json":
        where = f"{tmp_path / name}: found no readable JSON"
    assert str(error.value).startswith(where)
    assert "\n" not in str(error.value)


def test_sentencepiece_alone_means_what_it_meant(tmp_path: Path, shared: Path):
    """Upstream's folders: no tokenizer.json, <s> first, a space before the first word."""
    (tmp_path / "tokenizer.model").symlink_to(shared / "tokenizers" / "llama2" / "tokenizer.model")
    write_json(tmp_path / "config.json", {"model_type": "llama"})
    write_json(
        tmp_path / "tokenizer_config.json",
        {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"},
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer("Hello world\n")["input_ids"] == [1, 15043, 3186, 13]
    assert tokenizer.eos_token_id == 2


SOME = "the a shows def return print( x = 1 ) café 你好 🙂 - * item: Answer. 12"
WORDS = (*SOME.split(), "", "\n", "\n\n", "\t")
GAPS = ("", " ", "  ", "    ", "\n  ")


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("kind", [None, "llava", "mistral"])
def test_ids_are_sentencepieces(tmp_path: Path, shared: Path, kind: str, legacy: bool):
    """Whatever the spaces, and whatever class transformers takes the model for."""
    model = shared / "tokenizers" / "llama2" / "tokenizer.model"
    (tmp_path / "tokenizer.model").symlink_to(model)
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    write_json(tmp_path / "tokenizer_config.json", {**settings, "legacy": legacy})
    tokenizer, rng = load_tokenizer(tmp_path, kind and {"model_type": kind}), random.Random(0)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    for text in (" lead", "  ", "safe.  Your", "x\n  - item", ""):
        assert tokenizer(text).input_ids == [1, *pieces.encode(text)], repr(text)
    for _ in range(300):
        text = "".join(rng.choice(WORDS) + rng.choice(GAPS) for _ in range(rng.randrange(1, 12)))
        assert tokenizer(text).input_ids == [1, *pieces.encode(text)], repr(text)
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    # transformers 4's: legacy has a space before each text between special tokens
    after = pieces.encode("USER") if legacy else [pieces.piece_to_id("USER")]
    assert tokenizer("hi</s>USER").input_ids == [1, *pieces.encode("hi"), 2, *after]


AFTER = ("</s>", "<s>", "<pad>", "<image>")
"""Special tokens, an added one and an added one that is not special."""


def slow(file: Path, legacy: bool) -> Callable[[str], list[int]]:
    """Transformers 4.37's slow LlamaTokenizer (tokenization_llama.py), all of AFTER special."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())
    proto.normalizer_spec.add_dummy_prefix = legacy
    pieces = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    mark = pieces.encode("<unk>")

    def encode(text: str) -> list[int]:
        ids = [1]
        parts = re.split(f"({'|'.join(AFTER)})", text)
        for i, part in enumerate(parts):
            if part in AFTER:
                ids.append(ADDED.get(part) or pieces.piece_to_id(part))
            elif legacy or not (part and (i == 0 or part[0] == " ")):
                ids += pieces.encode(part)
            else:
                ids += pieces.encode("<unk>" + " " * (i == 0) + part)[len(mark) :]
        return ids

    return encode


ADDED = {"<image>": 32000, "<pad>": 32001}


@pytest.mark.parametrize("added", ["added_tokens.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("legacy", [None, False])
def test_an_authors_folder_gives_sentencepieces_ids(
    tmp_path: Path, shared: Path, legacy: bool | None, added: str
):
    """Their code takes the slow class, whatever tokenizer.json computes, which may be older."""
    model = shared / "tokenizers" / "llama2" / "tokenizer.model"
    (tmp_path / "tokenizer.model").symlink_to(model)
    settings: dict = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy}
    tokens = [{"id": i, "content": x, "special": x == "<pad>"} for x, i in ADDED.items()]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    tokens = [{**token, **flags, "normalized": token["id"] == 32000} for token in tokens]
    engine = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    engine.save(str(tmp_path / "tokenizer.json"))
    if added == "added_tokens.json":
        write_json(tmp_path / added, ADDED)
        write_json(tmp_path / "special_tokens_map.json", {"pad_token": "<pad>"})
    elif added == "tokenizer.json":
        edit_json(tmp_path / added, added_tokens=tokens)
    else:
        settings["added_tokens_decoder"] = {str(t.pop("id")): t for t in tokens}
    write_json(tmp_path / "tokenizer_config.json", settings)
    tokenizer, rng = load_tokenizer(tmp_path), random.Random(1)
    expected = slow(model, legacy is None)
    words = (*WORDS, *AFTER, *AFTER)
    for text in ("hi</s> USER", "<image> a", " <pad>  b", "hi<image>\n<image>"):
        assert tokenizer(text).input_ids == expected(text), repr(text)
    for _ in range(200):
        text = "".join(rng.choice(words) + rng.choice(GAPS) for _ in range(rng.randrange(1, 12)))
        assert tokenizer(text).input_ids == expected(text), repr(text)


LEGACY = tokenizers.normalizers.Sequence(
    [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
)
"""What transformers 4 wrote into Llama's tokenizer.json."""


def legacy_file(folder: Path, model: Path) -> tokenizers.Tokenizer:
    """tokenizer.json of a Llama as transformers 4 wrote it, without its SentencePiece file."""
    (folder / "tokenizer.model").symlink_to(model)
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"})
    engine = load_tokenizer(folder).backend_tokenizer
    engine.normalizer, engine.pre_tokenizer = LEGACY, None
    engine.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer.model").unlink()
    return engine


TEXTS = ("hi", " hi", "  hi", "hi</s>USER", "hi</s> USER: a", "\nhi", "a</s></s>b")


def test_tokenizer_json_computes_what_it_says(tmp_path: Path, shared: Path):
    """In an authors' folder; in one of transformers' it is what AutoTokenizer gives."""
    engine = legacy_file(tmp_path, shared / "tokenizers" / "llama2" / "tokenizer.model")
    ours = load_tokenizer(tmp_path)
    assert [ours(x).input_ids for x in TEXTS] == [engine.encode(x).ids for x in TEXTS]
    assert ours.eos_token_id == 2
    other = 0
    for kind in ("llama", "mistral", "llava", "qwen2"):
        write_json(tmp_path / "config.json", {"model_type": kind})
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        ported = load_tokenizer(tmp_path, {"model_type": kind})
        assert [ported(x).input_ids for x in TEXTS] == [theirs(x).input_ids for x in TEXTS]
        assert type(ported) is type(theirs)
        other += ported(" hi").input_ids != ours(" hi").input_ids
    assert other == 2  # Llama's class puts its own rules in place of the file's


def test_vocab_json_and_merges_txt(tmp_path: Path):
    """As the slow classes of Qwen and GPT-2 write themselves; as transformers reads them."""
    words = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    ids = {word: i for i, word in enumerate([*words, "hi", "Ġhi"])}
    write_json(tmp_path / "vocab.json", ids)
    (tmp_path / "merges.txt").write_text("#version: 0.2\nh i\nĠ hi\n")
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    write_json(tmp_path / "added_tokens.json", {x: 258 + i for i, x in enumerate(specials)})
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"}
    write_json(tmp_path / "tokenizer_config.json", settings)
    write_json(tmp_path / "config.json", {"model_type": "qwen2"})
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "hi<|im_start|>a hi é\n"
    for config in (None, {"model_type": "qwen2"}):
        ours = load_tokenizer(tmp_path, config)
        assert ours(text).input_ids == theirs(text).input_ids
        assert ours(text).input_ids[:4] == [256, 259, ids["a"], 257]
        assert ours.eos_token_id == 260


ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}


@pytest.mark.parametrize("kind", ["llava_llama", "llava", "mgm", "slime", "llava_dc"])
def test_config_json_does_not_touch_the_tokenizer(tmp_path: Path, shared: Path, kind: str):
    """The published form of Llama-3.1's rope, which transformers refuses in a config it can't tell.

    Values are those of a plain LLM of the same config.
    """
    cases = {"mgm": "mgm_plain", "slime": "slime_vicuna", "llava_dc": "dc_sti"}
    case = shared / "golden" / cases.get(kind, "llava15_mlp2x")
    for file in case.iterdir():
        if file.name != "config.json":
            (tmp_path / file.name).symlink_to(file)
    config = {**read_json(case / "config.json"), "rope_theta": 500000.0, "rope_scaling": ROPE}
    if kind in ("llava", "llava_llama"):
        config["model_type"] = kind
    write_json(tmp_path / "config.json", {**config, "transformers_version": 5})
    tokenizer_files(tmp_path)
    source = open_source(tmp_path)
    ids = tokenizer_of(source)("a b").input_ids
    assert ids == load_tokenizer(tmp_path, {"model_type": "llama"})("a b").input_ids
    rope = {key: config[key] for key in ("rope_theta", "rope_scaling")}
    plain = registry.find({"model_type": "llama"}, "").config(rope)
    found = model_config(source).llm
    assert (found.rope_theta, found.rope_scaling) == (plain.rope_theta, plain.rope_scaling)
    assert found.rope_scaling is not None


def test_a_new_model_around_such_an_llm_reads_its_own_folder(tmp_path: Path):
    llama_folder(tmp_path / "llm", rope_parameters={**ROPE, "rope_theta": 500000.0})
    tower_folder(tmp_path / "clip", "clip")
    model, own = converters.create(tmp_path / "llm", tmp_path / "clip", {"kind": "mlp"})
    converters.export(model, tmp_path / "out")
    again, its = converters.load(tmp_path / "out")
    assert again.config.llm.rope_scaling == model.config.llm.rope_scaling is not None
    assert its.tokenizer("a b").input_ids == own.tokenizer("a b").input_ids


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model_type": ["llama"]}', None])
def test_a_tokenizer_needs_no_config_json(tmp_path: Path, content: str | None):
    tokenizer_files(tmp_path)
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert load_tokenizer(tmp_path)("a b").input_ids[0] == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_max_length": [2048]}, "can't read \\('>' not supported"),
        ({"bos_token": 5}, "can't read"),
        ({"padding_side": "middle"}, "can't read"),
    ],
)
def test_settings_of_wrong_types(tmp_path: Path, settings: dict, message: str):
    tokenizer_files(tmp_path)
    edit_json(tmp_path / "tokenizer_config.json", **settings)
    with pytest.raises(InputError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("form", [["own.Own", None], {"AutoTokenizer": ["own.Own", "own.Own"]}])
def test_remote_code_of_a_tokenizer(tmp_path: Path, form: Any):
    """Authors' folders go by tokenizer.json; transformers asks for the code, which is refused."""
    tokenizer_files(tmp_path)
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\nclass Own: pass\n")
    edit_json(tmp_path / "tokenizer_config.json", auto_map=form, tokenizer_class="Own")
    assert load_tokenizer(tmp_path)("a").input_ids[0] == 1
    with pytest.raises(InputError, match="auto_map .*own.Own.* without auto_map: code of a folder"):
        load_tokenizer(tmp_path, {"model_type": "llama"})
    assert not (tmp_path / "mark").exists()


def test_code_of_the_folder_is_not_run(tmp_path: Path):
    llama_folder(tmp_path)
    mark = tmp_path / "mark"
    (tmp_path / "own.py").write_text(f"open({str(mark)!r}, 'w')\nclass Own: pass\n")
    auto = {"AutoTokenizer": ["own.Own", "own.Own"], "AutoConfig": "own.Own"}
    edit_json(tmp_path / "config.json", auto_map=auto)
    edit_json(tmp_path / "tokenizer_config.json", auto_map=auto, tokenizer_class="Own")
    try:
        converters.load(tmp_path)
    except InputError as error:
        assert "tokenizer" in str(error)
    assert not mark.exists()
