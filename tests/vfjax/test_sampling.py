"""Draws and filters against numpy and transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    GenerationConfig,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tests.vfjax.generating import NEW, TEXTS, reference
from vfjax import InputError, generate_ids, stream_ids
from vfjax.sampling import Sampling, filtered, penalise, sample

LOGITS = np.array([2.0, -1.0, 0.5, 1.9, 0.0, -3.0, 1.0, 0.4, -0.5, 1.2, -2.0, 0.1], np.float32)


SAMPLINGS = {
    "plain": (1.0, None, 1.0),
    "cold": (0.5, None, 1.0),
    "hot": (2.0, None, 1.0),
    "top_k": (1.0, 4, 1.0),
    "top_p": (1.0, None, 0.7),
    "small top_p": (1.0, None, 0.01),
    "hot top_p": (2.0, None, 0.7),
    "all": (0.8, 6, 0.8),
    "top_k above the vocabulary": (1.0, 99, 1.0),
}


compiled_sample = jax.jit(sample, static_argnums=3)


def expected_distribution(
    logits: np.ndarray, temperature: float, top_k: int | None, top_p: float
) -> np.ndarray:
    """Probabilities after the filters, in numpy."""
    p = np.exp(logits.astype(np.float64) / temperature)
    order = np.argsort(-p)
    p[order[top_k:]] = 0 if top_k is not None else p[order[top_k:]]
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= top_p]] = 0
    return p / p.sum()


@pytest.mark.parametrize("name", SAMPLINGS)
def test_sampled_distribution(name: str):
    temperature, top_k, top_p = SAMPLINGS[name]
    p = expected_distribution(LOGITS, temperature, top_k, top_p)
    warpers = [TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p)]
    if top_k is not None:
        warpers.insert(1, TopKLogitsWarper(top_k))
    scores = torch.from_numpy(LOGITS.copy())[None]
    for warper in warpers:
        scores = warper(None, scores)
    np.testing.assert_allclose(p, scores.softmax(dim=-1)[0], atol=1e-6)

    count = 20000
    rows = jnp.broadcast_to(LOGITS, (count, len(LOGITS)))
    draws = compiled_sample(jax.random.key(3), rows, temperature, top_k, top_p)
    found = np.bincount(draws, minlength=len(LOGITS)) / count
    assert not found[p == 0].any()
    deviation = np.abs(found - p) / np.sqrt(np.maximum(p * (1 - p), 1e-12) / count)
    assert deviation.max() < 4.5


def test_filters_equal_transformers(llm):
    """Its own list of processors, in its order, on 16 rows of as many settings at once."""
    theirs, rng, v = llm[0], np.random.default_rng(5), 200
    logits = np.round(rng.normal(size=(16, v)) * 3, 1).astype(np.float32)  # some are equal
    prompts = rng.integers(0, v, (16, 30))
    seen = np.zeros((16, v), bool)
    np.put_along_axis(seen, prompts, True, axis=1)
    hows = [
        {
            "temperature": float(rng.choice([0.3, 1.0, 1.7])),
            "top_k": int(rng.choice([0, 1, 5, 40, 1000])),
            "top_p": float(rng.choice([0.2, 0.9, 1.0])),
            "min_p": float(rng.choice([0.0, 0.05, 0.5, 1.0])),
            "repetition_penalty": float(rng.choice([0.8, 1.0, 1.5])),
        }
        for _ in range(16)
    ]
    column = {key: np.array([[each[key]] for each in hows], np.float32) for key in hows[0]}
    ks = np.where(column["top_k"] == 0, v, column["top_k"]).astype(np.int32)
    found = filtered(
        penalise(jnp.asarray(logits), seen, column["repetition_penalty"]),
        column["temperature"], ks, column["top_p"], column["min_p"],
    )  # fmt: skip
    for i, each in enumerate(hows):
        config = GenerationConfig(do_sample=True, **each)
        processors = theirs._get_logits_processor(
            config, input_ids_seq_length=30, encoder_input_ids=None,
            prefix_allowed_tokens_fn=None, logits_processor=[], device="cpu",
        )  # fmt: skip
        (expected,) = processors(
            torch.from_numpy(prompts[i : i + 1]), torch.tensor(logits[i : i + 1])
        )
        np.testing.assert_array_equal(np.isfinite(found[i]), np.isfinite(expected.numpy()))
        np.testing.assert_allclose(found[i], expected, rtol=1e-6)


def test_a_rows_draw_does_not_depend_on_the_others():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(64, 320)), jnp.float32)
    every = compiled_sample(jax.random.key(1), logits, 1.0, None, 1.0)
    some = compiled_sample(jax.random.key(1), logits[:7], 1.0, None, 1.0)
    np.testing.assert_array_equal(some, every[:7])


def test_filters_of_any_numbers() -> None:
    """What stays has less than k, or p, above it; huge, tiny and equal numbers, both zeros."""
    rng = np.random.default_rng(2)
    rows = [
        rng.normal(size=64) * 10.0 ** rng.integers(-30, 30, 64),
        np.repeat([3.0, -np.inf], 32),
        np.tile([0.0, -0.0, 1e-30, -1e-30], 16),
        np.where(rng.random(64) < 0.5, -np.inf, rng.normal(size=64)),
        -np.arange(64.0),
        np.full(64, -7.0),
    ]
    logits = np.array(rows, np.float32)
    for k, p in ((1, 1.0), (5, 1.0), (64, 1.0), (64, 0.3), (64, 0.999), (7, 0.5)):
        found = np.isfinite(jax.jit(filtered)(logits, 1.0, k, p, 0.0))
        for row, kept in zip(logits, found, strict=True):
            first = (row[None] > row[:, None]).sum(axis=1) < k
            share = np.where(first, np.exp(row.astype(np.float64) - row.max()), 0)
            above = np.where(row[None] > row[:, None], share / share.sum(), 0).sum(axis=1)
            np.testing.assert_array_equal(
                kept, first & (above < (p if p < 1 else 2)) & np.isfinite(row)
            )


def test_ties_with_the_kth_stay() -> None:
    """As transformers' TopKLogitsWarper: all that are as likely as the k-th."""
    logits = np.array([[0.0, 2.0, 1.0, 1.0, 1.0, -1.0]], np.float32)
    warped = TopKLogitsWarper(2)(None, torch.tensor(logits))
    expected = set(torch.isfinite(warped)[0].nonzero()[:, 0].tolist())
    rows = np.repeat(logits, 400, axis=0)
    draws = compiled_sample(jax.random.key(0), jnp.asarray(rows), 1.0, 2, 1.0)
    assert set(np.asarray(draws).tolist()) == expected == {1, 2, 3, 4}


def test_repetition_penalty_equals_transformers(llm) -> None:
    """Words of the prompt and new ones; a penalty a row; none leaves the row as it is."""
    theirs, model, processor = llm
    rows = [TEXTS[0], TEXTS[2][:7]]
    expected = [
        reference(theirs, [row], repetition_penalty=penalty)[0]
        for row, penalty in zip(rows, (1.3, 1.0), strict=True)
    ]
    batch = processor(input_ids=rows)
    how = Sampling(repetition_penalty=[1.3, 1.0])
    found = generate_ids(model, batch, max_new_tokens=NEW, sampling=how)
    assert found == expected
    assert found != generate_ids(model, batch, max_new_tokens=NEW)
    pieces = stream_ids(model, batch, max_new_tokens=NEW, sampling=how)
    joined = [sum(parts, []) for parts in zip(*(piece.ids for piece in pieces), strict=True)]
    assert joined == expected
    with pytest.raises(InputError, match=r"repetition_penalty: found 0, expected more than 0"):
        generate_ids(model, batch, sampling=Sampling(repetition_penalty=0))
