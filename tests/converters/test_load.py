"""Loading: tensor by tensor, any dtype, and the files around the weights."""

import random
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
from flax import nnx

import converters
from converters.reader import read_json
from converters.tokenizer import load_tokenizer
from tests.checkpoints import (
    hf_llava_folder,
    llama_folder,
    tokenizer_files,
    tower_folder,
    write_json,
)
from vfjax import InputError, Processor
from vfjax.encoders import CLIP


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
    assert isinstance(encoder, CLIP)
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
    assert str(error.value).startswith(
        f"{tmp_path}: found a tokenizer that transformers can't read"
    )
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
@pytest.mark.parametrize("kind", ["llava_llama", "llava", "mistral"])
def test_ids_are_sentencepieces(tmp_path: Path, shared: Path, kind: str, legacy: bool):
    """Whatever the spaces, and whatever class transformers takes the model for."""
    model = shared / "tokenizers" / "llama2" / "tokenizer.model"
    (tmp_path / "tokenizer.model").symlink_to(model)
    write_json(tmp_path / "config.json", {"model_type": kind})
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    write_json(tmp_path / "tokenizer_config.json", {**settings, "legacy": legacy})
    tokenizer, rng = load_tokenizer(tmp_path), random.Random(0)
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
