"""A decoder family against transformers: random weights, one folder, float32."""

import functools
from pathlib import Path

import jax
import numpy as np
import torch
import transformers

import converters
from tests.checkpoints import randomize
from vfjax.llm import Cache, Llama

LIMIT = 2e-5
"""Largest difference, as a share of the activation's largest value."""

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Of the toys, under transformers' names."""

MASK = np.array([[1] * 12, [0] * 5 + [1] * 7, [1] * 9 + [0] * 3], bool)
"""A whole row, one padded on the left, one on the right."""


@functools.partial(jax.jit, static_argnames="size")
def read(llm: Llama, ids: jax.Array, mask: jax.Array, *, size: int) -> tuple:
    hidden, cache = llm(llm.embed(ids), mask, llm.new_cache(len(ids), size))
    return hidden, llm.logits(hidden), cache


@jax.jit
def extend(llm: Llama, ids: jax.Array, mask: jax.Array, cache: Cache) -> jax.Array:
    hidden, _ = llm(llm.embed(ids), mask, cache)
    return llm.logits(hidden)


def assert_close(found: np.ndarray, expected: np.ndarray, what: object) -> None:
    assert found.shape == expected.shape, what
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error <= LIMIT, (what, error)


@torch.no_grad()
def assert_family(path: Path, theirs: torch.nn.Module, *, seed: int = 0) -> Llama:
    """Hidden states and logits of padded rows, read at once and in two pieces; export.

    Args:
        path: an empty folder.
        theirs: transformers' causal LM; its weights are drawn here.
        seed: of the weights.

    Returns:
        Our decoder.
    """
    randomize(theirs, seed).eval().save_pretrained(path / "theirs")
    model, _ = converters.load(path / "theirs")
    ids = np.random.default_rng(seed).integers(3, SIZES["vocab_size"], MASK.shape).astype(np.int32)
    hidden, logits, _ = read(model.llm, ids, MASK, size=16)
    hidden, logits = np.asarray(hidden), np.asarray(logits)
    first, rest = slice(0, 8), slice(8, 12)
    _, _, cache = read(model.llm, ids[:, first], MASK[:, first], size=16)
    later = np.asarray(extend(model.llm, ids[:, rest], MASK[:, rest], cache))
    for i, mask in enumerate(MASK):
        out = theirs(torch.from_numpy(ids[i][mask]).long()[None], output_hidden_states=True)
        assert_close(hidden[i][mask], out.hidden_states[-1][0].numpy(), ("hidden", i))
        assert_close(logits[i][mask], out.logits[0].numpy(), ("logits", i))
        count = int(mask[first].sum())
        assert_close(later[i][mask[rest]], out.logits[0, count:].numpy(), ("in two pieces", i))

    converters.export(model, path / "ours")
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        path / "ours", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = theirs.state_dict()
    assert {name: x.tolist() for name, x in again.state_dict().items()} == {
        name: x.tolist() for name, x in expected.items()
    }
    return model.llm
