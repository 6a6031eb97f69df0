"""A head under a config that ties it to the embedding: by values, as transformers decides."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import converters
from converters.inspect import inspect
from tests.checkpoints import (
    LLAMA,
    hf_llava_folder,
    llama_folder,
    llava_next_folder,
    make_llama,
    tokenizer_files,
    tuned,
    write_json,
)
from vfjax import InputError
from vfjax.atomic import read_json

IDS = [1, 5, 9, 250, 7, 33]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Tensors = dict[str, torch.Tensor]


def edit(folder: Path, change: Callable[[Tensors], Any], **config: Any) -> None:
    """Rewrites the tensors of a folder, and keys of its config.json."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if config:
        write_json(folder / "config.json", read_json(folder / "config.json") | config)


def noise(like: torch.Tensor, seed: int = 9) -> torch.Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)) * like.std()


def own_head(tensors: Tensors) -> None:
    tensors[HEAD] = noise(tensors[EMBEDDING])


def logits(folder: Path, **options: Any) -> np.ndarray:
    """Ours, of `IDS`."""
    model, processor = converters.load(folder, **options)
    batch = processor([], input_ids=[IDS])
    return np.asarray(model(batch))[0][np.asarray(batch.mask)[0]]


def reference(folder: Path, kind: Any = transformers.AutoModelForCausalLM) -> np.ndarray:
    """Their logits of the same; loading must find no fault."""
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        return model.eval()(torch.tensor([IDS])).logits[0].float().numpy()


def assert_like_transformers(folder: Path, kind: Any = transformers.AutoModelForCausalLM) -> None:
    expected = reference(folder, kind)
    found = logits(folder)
    assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()


def assert_round_trip(folder: Path, out: Path, kind: Any = transformers.AutoModelForCausalLM):
    """What is exported is, to transformers and here, what was loaded; heads are where they were."""
    converters.export(converters.load(folder)[0], out)
    before, after = (load_file(x / "model.safetensors") for x in (folder, out))
    assert before.keys() == after.keys()
    assert all(torch.equal(x, before[name]) for name, x in after.items())
    assert read_json(out / "config.json") == read_json(folder / "config.json")
    np.testing.assert_array_equal(reference(out, kind), reference(folder, kind))


KINDS = {
    "llama": (transformers.LlamaConfig, {}),
    "gemma": (transformers.GemmaConfig, {"head_dim": 8}),
}
"""Decoder -> its config's class, and sizes beside `LLAMA`'s; the second is tied by default."""


@pytest.mark.parametrize("kind", KINDS)
def test_an_own_head_is_kept(tmp_path: Path, kind: str):
    """Under a tied config, as mergers, adapters and careless scripts leave it."""
    config_class, sizes = KINDS[kind]
    config = config_class(**{**LLAMA, "num_hidden_layers": 1, "tie_word_embeddings": True, **sizes})
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    model.save_pretrained(tmp_path / "llm")
    tokenizer_files(tmp_path / "llm")
    edit(tmp_path / "llm", own_head)
    assert_like_transformers(tmp_path / "llm")
    assert_round_trip(tmp_path / "llm", tmp_path / "out")
    assert ", tied head" not in inspect(tmp_path / "llm")


def test_a_head_that_equals_the_embedding_is_left_out(tmp_path: Path):
    """As `.bin` files always hold it."""
    llama_folder(tmp_path / "llm", tie_word_embeddings=True)
    before = logits(tmp_path / "llm")
    edit(tmp_path / "llm", lambda t: t.update({HEAD: t[EMBEDDING].clone()}))
    np.testing.assert_array_equal(logits(tmp_path / "llm"), before)
    assert_like_transformers(tmp_path / "llm")
    assert f"{HEAD}: equal to {EMBEDDING}, not read" in inspect(tmp_path / "llm").splitlines()
    converters.export(converters.load(tmp_path / "llm")[0], tmp_path / "out")
    assert HEAD not in load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(reference(tmp_path / "out"), reference(tmp_path / "llm"))


def test_a_head_alone_is_the_embedding(tmp_path: Path):
    llama_folder(tmp_path / "llm", tie_word_embeddings=True)
    before = logits(tmp_path / "llm")
    edit(tmp_path / "llm", lambda t: t.update({HEAD: t.pop(EMBEDDING)}))
    np.testing.assert_array_equal(logits(tmp_path / "llm"), before)
    assert_like_transformers(tmp_path / "llm")
    converters.export(converters.load(tmp_path / "llm")[0], tmp_path / "out")
    np.testing.assert_array_equal(reference(tmp_path / "out"), reference(tmp_path / "llm"))


def test_int8_and_other_dtypes_have_the_own_head(tmp_path: Path):
    llama_folder(tmp_path, tie_word_embeddings=True)
    edit(tmp_path, own_head)
    exact = reference(tmp_path)
    found = logits(tmp_path, dtype="bfloat16", int8=True)
    assert np.abs(found - exact).max() < 0.1 * np.abs(exact).max()


TOP = {"true": {"tie_word_embeddings": True}, "false": {"tie_word_embeddings": False}, "absent": {}}
LLAVAS = {
    "llava": (transformers.LlavaForConditionalGeneration, hf_llava_folder),
    "next": (transformers.LlavaNextForConditionalGeneration, llava_next_folder),
}


@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize("top", TOP)
@pytest.mark.parametrize("kind", LLAVAS)
def test_which_config_ties(tmp_path: Path, kind: str, top: str, text: bool):
    """LLaVA: one of the two suffices. LLaVA-NeXT: the top level alone."""
    theirs, make = LLAVAS[kind]
    make(tmp_path)
    config = read_json(tmp_path / "config.json")
    config.pop("tie_word_embeddings", None)
    config["text_config"]["tie_word_embeddings"] = text
    write_json(tmp_path / "config.json", config | TOP[top])
    name = "language_model.lm_head.weight"
    tensors = load_file(tmp_path / "model.safetensors")
    own = theirs.config_class.from_pretrained(tmp_path).tie_word_embeddings
    assert own == (top == "true" or (text and kind == "llava"))
    if own:
        del tensors[name]
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    _, report = theirs.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert (", tied head" in inspect(tmp_path)) == own


@pytest.mark.parametrize("kind", LLAVAS)
def test_llavas_with_an_own_head(tmp_path: Path, kind: str):
    """Under a config whose text part is tied, and whose top level is: LLaVA-NeXT's false."""
    theirs, make = LLAVAS[kind]
    make(tmp_path / "mllm")
    config = read_json(tmp_path / "mllm" / "config.json")
    config["text_config"]["tie_word_embeddings"] = True
    config["tie_word_embeddings"] = kind == "llava"
    write_json(tmp_path / "mllm" / "config.json", config)
    assert_like_transformers(tmp_path / "mllm", theirs)
    assert_round_trip(tmp_path / "mllm", tmp_path / "out", theirs)


def test_tied_and_untied_models_merge(tmp_path: Path):
    """As in mergekit, a tied model's head is its embedding; the result has a head if one has."""
    base = make_llama(0, tie_word_embeddings=True)
    llama_folder(tmp_path / "base", llm=base)
    llama_folder(tmp_path / "tied", llm=tuned(base, 1))
    llama_folder(tmp_path / "own", llm=tuned(base, 2))
    edit(tmp_path / "own", own_head)
    llama_folder(tmp_path / "untied", llm=tuned(base, 3))
    edit(tmp_path / "untied", own_head, tie_word_embeddings=False)
    tensors = {x.name: load_file(x / "model.safetensors") for x in tmp_path.iterdir()}

    def merge(*names: str, **options: Any) -> Tensors:
        out = tmp_path / "-".join(names)
        members = {name: tmp_path / name for name in names}
        converters.fuse(members, out, base=tmp_path / "base", export="llm", **options)
        assert_like_transformers(out)
        return load_file(out / "model.safetensors")

    for names in (("tied", "own"), ("own", "untied")):
        found = merge(*names, params={"weights": (0.25, 0.75)})
        heads = [tensors[name].get(HEAD, tensors[name][EMBEDDING]) for name in names]
        start = tensors["base"][EMBEDDING]
        expected = start + 0.25 * (heads[0] - start) + 0.75 * (heads[1] - start)
        torch.testing.assert_close(found[HEAD], expected, rtol=0, atol=1e-6)


def test_tied_models_stay_tied(tmp_path: Path):
    base = make_llama(0, tie_word_embeddings=True)
    for i, name in enumerate(("base", "a", "b")):
        llama_folder(tmp_path / name, llm=tuned(base, i))
    edit(tmp_path / "a", lambda t: t.update({HEAD: t[EMBEDDING].clone()}))
    members = {name: tmp_path / name for name in "ab"}
    converters.fuse(members, tmp_path / "out", base=tmp_path / "base", export="llm")
    assert HEAD not in load_file(tmp_path / "out" / "model.safetensors")
    assert read_json(tmp_path / "out" / "config.json")["tie_word_embeddings"] is True
    assert_like_transformers(tmp_path / "out")


def test_a_fusion_of_members_with_own_heads(tmp_path: Path):
    """Written or not, the fused model has the merged head."""
    base = make_llama(0)
    llama_folder(tmp_path / "base", llm=base)
    members = {}
    for i, kind in enumerate(("clip", "siglip")):
        members[kind] = tmp_path / kind
        hf_llava_folder(members[kind], i, kind=kind)
        config = read_json(members[kind] / "config.json")
        config["text_config"]["tie_word_embeddings"] = True
        write_json(members[kind] / "config.json", config)
    options = {"base": tmp_path / "base", "family": False}
    converters.fuse(members, tmp_path / "out", **options)
    text = read_json(tmp_path / "out" / "config.json")["text_config"]
    assert text["tie_word_embeddings"] is False
    model, _ = converters.load(tmp_path / "out")
    again, _ = converters.load_fused(members, **options)
    heads = [load_file(m / "model.safetensors")[f"language_model.{HEAD}"] for m in members.values()]
    mean = (heads[0] + heads[1]) / 2
    for one in (model, again):
        np.testing.assert_allclose(one.llm.head.kernel[...], mean.T, atol=1e-6)


def test_a_missing_embedding_is_named(tmp_path: Path):
    llama_folder(tmp_path, tie_word_embeddings=True)
    edit(tmp_path, lambda t: t.pop(EMBEDDING))
    with pytest.raises(InputError, match=f"llm: {EMBEDDING}: found"):
        converters.load(tmp_path)
