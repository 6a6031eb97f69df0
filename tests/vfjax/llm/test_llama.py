"""Decoders against LlamaForCausalLM, weights read from its folders."""

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import converters
from converters.params.llama import TABLE
from tests import decoding
from tests.checkpoints import LLAMA, llama_folder
from vfjax import InputError
from vfjax.llm import Cache, Llama, LlamaConfig
from vfjax.llm.llama import frequencies

LIMIT = 2e-5
"""Largest difference, as a share of the activation's largest value."""

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

VARIANTS = {
    "grouped": {},
    "multi-head": {"num_key_value_heads": 4},
    "one key head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "llama3 rope": {"rope_parameters": LLAMA3},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 16},
    "gelu": {"hidden_act": "gelu_pytorch_tanh"},
}


@functools.partial(jax.jit, static_argnames="size")
def prefill(llm: Llama, ids: jax.Array, mask: jax.Array, *, size: int) -> tuple:
    hidden, cache = llm(llm.embed(ids), mask, llm.new_cache(len(ids), size))
    return llm.logits(hidden), cache


@jax.jit
def extend(llm: Llama, ids: jax.Array, mask: jax.Array, cache: Cache) -> tuple:
    hidden, cache = llm(llm.embed(ids), mask, cache)
    return llm.logits(hidden), cache


@jax.jit
def uncached(llm: Llama, ids: jax.Array, mask: jax.Array) -> tuple:
    hidden, cache = llm(llm.embed(ids), mask)
    assert cache is None
    return hidden, llm.logits(hidden)


def load(folder: Path, seed: int = 0, **config) -> tuple:
    theirs = llama_folder(folder, seed, **config)
    model, _ = converters.load(folder)
    return theirs, model.llm


@pytest.fixture(scope="module")
def grouped(tmp_path_factory) -> tuple:
    return load(tmp_path_factory.mktemp("grouped"))


def tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, LLAMA["vocab_size"], shape).astype(np.int32)


@torch.no_grad()
def reference(model: torch.nn.Module, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Transformers' normed hidden states and logits of unpadded rows."""
    out = model(torch.from_numpy(ids).long(), output_hidden_states=True)
    return out.hidden_states[-1].numpy(), out.logits.numpy()


def assert_close(found: jax.Array, expected: np.ndarray, what: object = "") -> None:
    assert found.shape == expected.shape, what
    error = np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()
    assert error <= LIMIT, (what, error)


@pytest.mark.parametrize("name", VARIANTS)
def test_variant(tmp_path, name: str):
    theirs, ours = load(tmp_path, 1, **VARIANTS[name])
    ids = tokens(2, 48)
    hidden, logits = uncached(ours, ids, np.ones(ids.shape, bool))
    expected = reference(theirs, ids)
    assert_close(hidden, expected[0], "hidden")
    assert_close(logits, expected[1], "logits")
    assert logits.dtype == jnp.float32


def test_head_is_tied_or_not(tmp_path):
    _, tied = load(tmp_path / "tied", tie_word_embeddings=True)
    _, free = load(tmp_path / "free")
    assert not hasattr(tied, "head")
    assert free.head.kernel.shape == (LLAMA["hidden_size"], LLAMA["vocab_size"])


def rows(mask: np.ndarray, ids: np.ndarray) -> list[np.ndarray]:
    return [row[real] for row, real in zip(ids, mask, strict=True)]


PADDINGS = {
    "right": [[1] * 12, [1] * 7 + [0] * 5, [1] + [0] * 11],
    "left": [[1] * 12, [0] * 5 + [1] * 7, [0] * 11 + [1]],
    "mixed": [[1] * 12, [0] * 5 + [1] * 7, [1] * 3 + [0] * 9],
    "inside": [[1] * 4 + [0] * 3 + [1] * 5, [0, 1] * 6, [0, 0, 1, 1, 0, 0] * 2],
}


@pytest.mark.parametrize("name", PADDINGS)
def test_padding(grouped, name: str):
    """Every row equals itself alone without padding; what stands at padding does not matter."""
    theirs, ours = grouped
    mask = np.array(PADDINGS[name], bool)
    ids = tokens(*mask.shape)
    hidden, logits = (np.asarray(x) for x in uncached(ours, ids, mask))
    for i, row in enumerate(rows(mask, ids)):
        expected = reference(theirs, row[None])
        assert_close(hidden[i][mask[i]], expected[0][0], i)
        assert_close(logits[i][mask[i]], expected[1][0], i)
    _, other = uncached(ours, np.where(mask, ids, tokens(*mask.shape, seed=1)), mask)
    np.testing.assert_array_equal(np.asarray(other)[mask], logits[mask])


@pytest.mark.parametrize("name", PADDINGS)
def test_cache_equals_no_cache(grouped, name: str):
    """Rows of unequal length, then six steps of one token, then three tokens at once."""
    theirs, ours = grouped
    mask = np.array(PADDINGS[name], bool)
    ids, more = tokens(*mask.shape), tokens(3, 9, seed=5)
    logits, cache = prefill(ours, ids, mask, size=24)
    parts = [np.asarray(logits)]
    steps = [more[:, i : i + 1] for i in range(6)] + [more[:, 6:]]
    for step in steps:
        logits, cache = extend(ours, step, np.ones(step.shape, bool), cache)
        parts.append(np.asarray(logits))
    found = np.concatenate(parts, axis=1)
    assert int(cache.index) == 21
    np.testing.assert_array_equal(cache.length, mask.sum(axis=1) + 9)
    full = np.concatenate([mask, np.ones((3, 9), bool)], axis=1)
    every = np.concatenate([ids, more], axis=1)
    _, whole = uncached(ours, every, full)
    assert_close(found[full], np.asarray(whole)[full], "uncached")
    for i, row in enumerate(rows(full, every)):
        assert_close(found[i][full[i]], reference(theirs, row[None])[1][0], i)


def test_padding_inside_a_cached_step(grouped):
    """Some rows may go on while others wait: masked tokens take a slot, but no position."""
    theirs, ours = grouped
    mask = np.ones((2, 5), bool)
    ids, more = tokens(2, 5), tokens(2, 4, seed=5)
    go = np.array([[1, 1, 1, 1], [1, 0, 0, 1]], bool)
    _, cache = prefill(ours, ids, mask, size=16)
    found = []
    for i in range(4):
        logits, cache = extend(ours, more[:, i : i + 1], go[:, i : i + 1], cache)
        found.append(np.asarray(logits)[:, 0])
    for i in range(2):
        row = np.concatenate([ids[i], more[i][go[i]]])
        expected = reference(theirs, row[None])[1][0, 5:]
        assert_close(np.stack([x[i] for x in found])[go[i]], expected, i)


def test_cache_has_the_sizes_asked_for(grouped):
    cache = grouped[1].new_cache(3, 40)
    assert len(cache.k) == len(cache.v) == LLAMA["num_hidden_layers"]
    assert {x.shape for x in cache.k} == {(3, 2, 8, 40)}
    assert {x.shape for x in cache.v} == {(3, 2, 40, 8)}
    assert cache.k[0].dtype == jnp.float32
    assert not cache.mask.any()
    assert int(cache.index) == 0 and not cache.length.any()


@pytest.mark.parametrize("rope", [None, LLAMA3], ids=["default", "llama3"])
def test_long_row(tmp_path, rope: dict | None):
    """1500 positions, and a step after them."""
    config = {"num_hidden_layers": 1, "max_position_embeddings": 4096}
    config |= {"rope_parameters": rope} if rope else {}
    theirs, ours = load(tmp_path, 2, **config)
    ids = tokens(1, 1500)
    expected = reference(theirs, ids)[1]
    logits, cache = prefill(ours, ids[:, :-1], np.ones((1, 1499), bool), size=1500)
    assert_close(logits, expected[:, :-1])
    logits, _ = extend(ours, ids[:, -1:], np.ones((1, 1), bool), cache)
    assert_close(logits, expected[:, -1:])


PUBLISHED_ROPES = {
    "llama-2": (4096, 32, {"rope_type": "default", "rope_theta": 10000.0}),
    "llama-3": (8192, 32, {"rope_type": "default", "rope_theta": 500000.0}),
    "llama-3.1": (
        131072,
        32,
        {**LLAMA3, "original_max_position_embeddings": 8192},
    ),
    "llama-3.2": (
        131072,
        64,
        {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED_ROPES)
def test_frequencies_of_published_models(name: str):
    """Equal but for a rounding of torch's own: at position 4000 each moves an angle by 2e-4."""
    context, heads, rope = PUBLISHED_ROPES[name]
    hf = transformers.LlamaConfig(
        hidden_size=4096,
        num_attention_heads=heads,
        max_position_embeddings=context,
        rope_parameters=rope,
    )
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(hf)
    assert rotary.attention_scaling == 1
    found, expected = frequencies(TABLE.config(hf.to_dict())), rotary.inv_freq.numpy()
    np.testing.assert_array_max_ulp(found, expected, maxulp=1)
    assert np.mean(found != expected) <= 0.04


def test_rope_of_older_configs():
    """rope_theta and rope_scaling at the top, as before transformers 5, mean the same."""
    scaling = {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
    new = TABLE.config({**LLAMA, "rope_parameters": LLAMA3})
    old = TABLE.config({**LLAMA, "rope_theta": 500000.0, "rope_scaling": scaling})
    assert old == new
    assert old.rope_scaling is not None
    assert TABLE.config({**LLAMA, "rope_scaling": None}).rope_theta == 10000.0
    with pytest.raises(InputError, match="found 'linear', expected 'default', 'dynamic', 'llama3'"):
        TABLE.config({**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}})


def test_config_is_read_from_the_folder(grouped):
    assert dataclasses.asdict(grouped[1].config) == dataclasses.asdict(
        LlamaConfig(
            vocab=320,
            width=32,
            layers=2,
            heads=4,
            kv_heads=2,
            head_dim=8,
            mlp=48,
            context=512,
            eps=1e-3,
        )
    )


@pytest.fixture(scope="module")
def wide(room, tmp_path_factory) -> tuple:
    """12 layers, 1024 wide, heads and feed-forward as wide as in published models."""
    folder = tmp_path_factory.mktemp("wide")
    pair = load(
        folder,
        3,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=12,
        num_attention_heads=16,
        num_key_value_heads=8,
        rms_norm_eps=1e-5,
    )
    shutil.rmtree(folder)  # 0.6 GB
    return pair


def test_true_width(wide):
    theirs, ours = wide
    ids = tokens(1, 128)
    _, expected = reference(theirs, ids)
    logits, cache = prefill(ours, ids[:, :126], np.ones((1, 126), bool), size=128)
    assert_close(logits, expected[:, :126])
    for at in (126, 127):
        logits, cache = extend(ours, ids[:, at : at + 1], np.ones((1, 1), bool), cache)
        assert_close(logits[:, 0], expected[:, at], at)


def test_a_step_of_decoding_copies_no_parameter() -> None:
    """By the TPU compiler, which needs no TPU; in a process of its own, as it is a platform."""
    home = Path(sys.prefix) / "tpu"
    if not (home / "libtpu").is_dir():
        pytest.skip(f"no TPU compiler in {home}; make test installs it there")
    paths = [str(Path(__file__).parents[3]), str(home)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.decoding"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert len(found) == len(decoding.CASES)
    assert found == dict.fromkeys(found, [])
