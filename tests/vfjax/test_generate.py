"""Generation against transformers' generate, and batches against rows."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import converters
from tests import checkpoints
from tests.checkpoints import IMAGE_TOKEN
from tests.vfjax.generating import NEW, TEXTS, reference
from vfjax import Batch, InputError, Settings, generate, generate_ids, stream, stream_ids
from vfjax.generate import decode, prefill
from vfjax.sampling import GREEDY, Sampling

PICTURE = -200


ROWS = [
    [1, 40, PICTURE, 50, 60],
    [1, 70],
    [1, PICTURE, 80, 81, 82, PICTURE, 83, 84, 85, 86, 87],
    [PICTURE, 5],
]


def pictures(n: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8) for i in range(n)]


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> tuple:
    """Torch's LLaVA; model, processor."""
    folder = tmp_path_factory.mktemp("llava")
    theirs = checkpoints.hf_llava_folder(folder, 12, vision={"num_hidden_layers": 2})
    return theirs, *converters.load(folder)


@pytest.fixture(scope="module")
def greedy(llm) -> list[list[int]]:
    """Transformers' tokens of TEXTS."""
    return reference(llm[0], TEXTS)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_greedy_text_equals_transformers(llm, greedy, padding: str):
    _, model, processor = llm
    batch = processor(input_ids=TEXTS, padding=padding)
    found = generate_ids(model, batch, max_new_tokens=NEW)
    assert found == greedy
    assert len({token for row in found for token in row}) > 20  # not one token for ever


def test_greedy_with_pictures_equals_transformers(llava):
    theirs, model, processor = llava
    batch = processor(pictures(4), input_ids=ROWS)
    count = model.config.branches[0].tokens
    rows = [[t for x in r for t in ([IMAGE_TOKEN] * count if x == PICTURE else [x])] for r in ROWS]
    pixels = np.moveaxis(batch.images["clip"].given.pixels, -1, 1)
    expected = reference(theirs, rows, pixel_values=torch.from_numpy(pixels.copy()))
    assert generate_ids(model, batch, max_new_tokens=NEW) == expected


def mixed(processor, rows: list[list[int]], some: list[np.ndarray]) -> Batch:
    """Rows 0 and 2 padded on the right, 1 and 3 on the left."""
    right, left = (processor(some, input_ids=rows, padding=p) for p in ("right", "left"))
    odd = (np.arange(len(rows)) % 2 == 1)[:, None]
    names = ("tokens", "visual", "mask")
    fields = {n: np.where(odd, getattr(left, n), getattr(right, n)) for n in names}
    assert not np.array_equal(fields["mask"], right.mask)
    assert not np.array_equal(fields["mask"], left.mask)
    return dataclasses.replace(right, **fields)


def test_four_at_once_equal_one_by_one(llava):
    _, model, processor = llava
    some = pictures(4)
    together = generate_ids(model, processor(some, input_ids=ROWS), max_new_tokens=NEW)
    assert generate_ids(model, mixed(processor, ROWS, some), max_new_tokens=NEW) == together
    first = 0
    for i, row in enumerate(ROWS):
        last = first + row.count(PICTURE)
        alone = processor(some[first:last], input_ids=[row])
        assert generate_ids(model, alone, max_new_tokens=NEW) == together[i : i + 1], i
        first = last


def cut(rows: list[list[int]], stop: tuple[int, ...]) -> list[list[int]]:
    """What is before the first stop id of each row."""
    ends = [next((i for i, t in enumerate(row) if t in stop), len(row)) for row in rows]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


def test_each_row_stops_by_itself(llm, greedy):
    _, model, processor = llm
    batch = processor(input_ids=TEXTS)
    for places in [(0, 0), (3, 9), (31, 31), (5, 17)]:
        stop = (greedy[0][places[0]], greedy[1][places[1]])
        expected = cut(greedy, stop)
        assert len({len(row) for row in expected}) > 1
        assert generate_ids(model, batch, max_new_tokens=NEW, stop=stop) == expected
    first = tuple(row[0] for row in greedy)
    assert generate_ids(model, batch, max_new_tokens=NEW, stop=first) == [[], [], [], []]


@pytest.mark.parametrize("count", [1, 2, 31, 64, 65])
def test_number_of_new_tokens(llm, greedy, count: int):
    _, model, processor = llm
    found = generate_ids(model, processor(input_ids=TEXTS), max_new_tokens=count)
    assert [len(row) for row in found] == [count] * 4
    assert [row[:NEW] for row in found] == [row[:count] for row in greedy]


def test_generate_gives_text(llm, greedy):
    """Stop ids are the processor's, and special tokens are no text."""
    _, model, processor = llm
    stop = greedy[2][10]
    assert processor.stop_ids == (2,)
    processor = dataclasses.replace(processor, stop_ids=(2, stop), template="vicuna_v1")
    found = generate(model, processor, processor(input_ids=TEXTS), max_new_tokens=NEW)
    assert found == [processor.decode(row) for row in cut(greedy, (2, stop))]
    assert len(set(found)) == 4


def test_a_templates_own_token_ends_an_answer(llm):
    """Though it is no tokenizer's eos, and no text where special tokens are skipped."""
    _, _, processor = llm
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.add_tokens(["<|eot_id|>"], special_tokens=True)
    end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    other = dataclasses.replace(processor, tokenizer=tokenizer, template="llama3")
    assert (processor.stops, other.stops) == ((2,), (2, end))
    yes = tokenizer("yes", add_special_tokens=False).input_ids
    assert other.decode([*yes, end, *yes]) == processor.decode(yes)


def test_nan_is_no_answer(llm):
    """Weights that hold it, or that overflow, are said; other rows don't hide them."""
    _, model, processor = llm
    graph, state = nnx.split(model)
    broken = nnx.merge(graph, jax.tree.map(jnp.copy, state))
    scale = broken.llm.norm.scale
    scale[...] = scale[...].at[3].set(jnp.nan)
    with pytest.raises(InputError, match="^row 0: found logits that are NaN, expected numbers"):
        generate_ids(broken, processor(input_ids=TEXTS), max_new_tokens=3)


BAD = {
    "no token": ({"max_new_tokens": 0}, "max_new_tokens: found 0, expected at least 1"),
    "negative temperature": (
        {"sampling": Sampling(temperature=-0.1)},
        "temperature: found -0.1, expected 0 or more",
    ),
    "temperature nan": ({"sampling": Sampling(temperature=float("nan"))}, "temperature: found nan"),
    "top_k": ({"sampling": Sampling(top_k=0)}, "top_k: found 0, expected None or at least 1"),
    "top_p 0": (
        {"sampling": Sampling(top_p=0.0)},
        r"top_p: found 0.0, expected None or within (0, 1]",
    ),
    "min_p": ({"sampling": Sampling(min_p=1.5)}, "min_p: found 1.5, expected within [0, 1]"),
    "top_p above 1": ({"sampling": Sampling(top_p=1.5)}, "top_p: found 1.5"),
    "too long": (
        {"max_new_tokens": 502},
        "max_new_tokens: found 11 tokens in the longest row and 502 new ones, expected at most 512",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_parameters(llm, name: str):
    _, model, processor = llm
    arguments, message = BAD[name]
    with pytest.raises(InputError) as error:
        generate_ids(model, processor(input_ids=TEXTS), **arguments)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_context_may_be_filled(llm):
    """The context counts a row's tokens, not the padding of its batch."""
    theirs, model, processor = llm
    rows = [[1 + i % 300 for i in range(500)], [1, 70]]
    batch = processor(input_ids=rows)
    assert batch.tokens.shape[1] == 512
    found = generate_ids(model, batch, max_new_tokens=12)
    assert found == [row[:12] for row in (reference(theirs, [r])[0] for r in rows)]


def test_sampling_differs_between_steps_rows_and_seeds(llm):
    """Logits of zero: 16 seeds, 4 rows and 64 steps are 4096 even draws of 320."""
    _, model, processor = llm
    model = nnx.clone(model)
    model.llm.norm.scale[...] = jnp.zeros_like(model.llm.norm.scale[...])
    batch = processor(input_ids=TEXTS)
    draws = np.array(
        [generate_ids(model, batch, sampling=Sampling(1.0, seed=s)) for s in range(16)]
    )
    assert draws.shape == (16, 4, 64)
    expected = draws.size / 320
    chi2 = ((np.bincount(draws.ravel(), minlength=320) - expected) ** 2 / expected).sum()
    assert 319 - 4 * 25.3 < chi2 < 319 + 4 * 25.3  # mean and standard deviation of chi-squared
    for axis in range(3):
        for k in range(1, 4):  # by chance 1 / 320 are equal
            a, b = np.take(draws, range(k, draws.shape[axis]), axis), draws
            b = np.take(b, range(draws.shape[axis] - k), axis)
            assert (a == b).mean() < 0.02, (axis, k)


def test_seeds_and_filters_reach_the_loop(llm, greedy):
    _, model, processor = llm
    batch = processor(input_ids=TEXTS)

    def run(**options) -> list[list[int]]:
        return generate_ids(model, batch, max_new_tokens=NEW, sampling=Sampling(**options))

    one = run(temperature=1.0, seed=1)
    compiled = decode._cache_size()
    assert run(temperature=1.0, seed=1) == one
    assert run(temperature=1.0, seed=2) != one
    assert one != greedy
    assert run(temperature=1.0, top_p=1e-6, seed=1) == greedy
    assert run(temperature=1.0, min_p=1.0, seed=1) == greedy
    assert run(temperature=1.0, top_k=1, seed=1) == greedy
    assert run(temperature=1e-4, seed=1) == greedy
    assert decode._cache_size() == compiled  # they are no constants
    assert run(temperature=0.0, top_k=None, top_p=0.5, seed=1) == greedy


def test_compilations_are_as_few_as_buckets(tmp_path):
    """50 pictures of 50 sizes, prompts of 50 lengths, three buckets."""
    small = {"vision": {"num_hidden_layers": 1}, "text": {"num_hidden_layers": 1}}
    checkpoints.hf_llava_folder(tmp_path, 13, **small)
    model, processor = converters.load(tmp_path)
    processor = dataclasses.replace(processor, lengths=(32, 48, 80))
    rng = np.random.default_rng(1)
    before = prefill._cache_size(), decode._cache_size()
    used = set()
    for i in range(50):
        h, w = rng.integers(10, 120, 2)
        picture = rng.integers(0, 256, (h, w, 3), dtype=np.uint8)
        words = rng.integers(3, 300, 3 + i).tolist()
        batch = processor([picture], input_ids=[[1, PICTURE, *words]])
        used.add(batch.tokens.shape)
        generate_ids(model, batch, max_new_tokens=1 + i % 5)
    assert used == {(1, 32), (1, 48), (1, 80)}
    assert prefill._cache_size() - before[0] == 3
    assert decode._cache_size() - before[1] == 3


def join(pieces) -> tuple[list[list[int]], int]:
    """The ids of a stream's rows, and how many pieces they came in."""
    rows, count, ended = [], 0, [False]
    for new, ended, _ in pieces:  # noqa: B007
        rows = [row + more for row, more in zip(rows or [[]] * len(new), new, strict=True)]
        count += 1
    assert all(ended)
    return rows, count


@pytest.mark.parametrize("every", [1, 5, NEW, 100])
@pytest.mark.parametrize("how", [GREEDY, Sampling(temperature=1.0, seed=3, top_p=0.9)])
def test_streamed_ids_are_the_generated(llm, greedy, every: int, how: Sampling):
    _, model, processor = llm
    batch = processor(input_ids=TEXTS)
    stop = (greedy[0][3], greedy[1][9])
    expected = generate_ids(model, batch, max_new_tokens=NEW, stop=stop, sampling=how)
    compiled = prefill._cache_size(), decode._cache_size()
    pieces = stream_ids(model, batch, every=every, max_new_tokens=NEW, stop=stop, sampling=how)
    rows, count = join(pieces)
    assert rows == expected
    assert count == -(-NEW // every)
    assert (prefill._cache_size(), decode._cache_size()) == compiled


def test_a_stream_ends_with_its_last_row(llm, greedy):
    _, model, processor = llm
    batch = processor(input_ids=TEXTS)
    stop = tuple(row[2] for row in greedy)
    rows, count = join(stream_ids(model, batch, every=1, max_new_tokens=NEW, stop=stop))
    assert rows == cut(greedy, stop)
    assert count == 1 + max(map(len, rows))
    pieces = stream_ids(model, batch, every=1, max_new_tokens=NEW)
    next(pieces)
    pieces.close()


def test_room_changes_nothing(llm, greedy):
    _, model, processor = llm
    batch = processor(input_ids=TEXTS)
    assert join(stream_ids(model, batch, max_new_tokens=NEW, room=128))[0] == greedy
    for wrong in ({"room": NEW - 1}, {"every": 0}):
        with pytest.raises(InputError, match=f"{next(iter(wrong))}: found"):
            stream_ids(model, batch, max_new_tokens=NEW, **wrong)


def test_each_row_in_its_own_way(llm, greedy):
    """What a row gets, it gets alone too, with the same seed."""
    _, model, processor = llm
    how = {
        "temperature": [0.0, 1.0, 2.0, 0.0],
        "top_k": [None, 40, 7, 1],
        "top_p": [0.5, 0.9, None, 1.0],
        "min_p": [0.0, 0.01, 0.0, 1.0],
        "repetition_penalty": [1.0, 1.2, 1.0, 1.0],
        "seed": [7, 8, 8, 2**40],
    }
    news, batch = [5, 32, 1, 20], processor(input_ids=TEXTS)
    together = generate_ids(model, batch, max_new_tokens=news, sampling=Sampling(**how))
    assert [len(row) for row in together] == news
    each = [Sampling(**dict(zip(how, row, strict=True))) for row in zip(*how.values(), strict=True)]
    assert Sampling.stack(each) == Sampling(**how)
    assert together[0] == greedy[0][:5]
    assert together[1] != greedy[1]
    for i, row in enumerate(TEXTS):
        alone = processor(input_ids=[row])
        found = generate_ids(model, alone, max_new_tokens=news[i], sampling=each[i])
        assert found == [together[i]]
    with pytest.raises(InputError, match="seed: found 3 values, expected one, or "):
        generate_ids(model, batch, sampling=Sampling(seed=[1, 2, 3]))
    with pytest.raises(InputError, match="found 7 tokens in the longest row and 506 new ones"):
        generate_ids(model, batch, max_new_tokens=[506, 1, 1, 1])


def test_streamed_text_is_the_generated(llm, greedy):
    _, model, processor = llm
    processor = dataclasses.replace(processor, stop_ids=(2, greedy[2][10]))
    batch = processor(input_ids=TEXTS)
    for how in (GREEDY, Sampling(temperature=1.0, seed=5)):
        args = {"max_new_tokens": NEW, "sampling": how}
        expected = generate(model, processor, batch, **args)
        pieces = list(stream(model, processor, batch, every=3, **args))
        assert ["".join(row) for row in zip(*pieces, strict=True)] == expected
        assert sum(1 for piece in pieces if any(piece)) > 5
    with pytest.raises(InputError, match="max_new_tokens"):
        stream(model, processor, batch, max_new_tokens=0)


def test_a_folders_generation_config(llm, tmp_path) -> None:
    """Its penalty is used unless the caller says otherwise; authors' codes hide the prompt."""
    theirs, model, processor = llm
    checkpoints.llama_folder(tmp_path, 11, llm=theirs)
    checkpoints.write_json(tmp_path / "generation_config.json", {"repetition_penalty": 1.3})
    _, own = converters.load(tmp_path)
    assert own.settings == Settings(1.3)
    batch = own(input_ids=[TEXTS[0]])
    given, none = Sampling(repetition_penalty=1.3), Sampling(repetition_penalty=1.0)
    assert generate(model, own, batch) == generate(model, processor, batch, sampling=given)
    assert list(stream(model, own, batch))[0][0]
    assert generate(model, own, batch, sampling=none) == generate(model, processor, batch)
    rules = {"no_repeat_ngram_size": 3, "temperature": 0.6, "top_k": 20, "do_sample": True}
    checkpoints.write_json(tmp_path / "generation_config.json", rules)
    _, own = converters.load(tmp_path)
    for run in (generate, stream):
        with pytest.raises(InputError, match="no_repeat_ngram_size: found 3, expected none"):
            run(model, own, batch)
    own.settings = Settings()
    assert generate(model, own, batch) == generate(model, processor, batch)
    checkpoints.upstream_llava_folder(tmp_path / "llava", vision={"num_hidden_layers": 2})
    assert not converters.load(tmp_path / "llava")[1].settings.penalise_prompt


def test_log_probabilities_are_the_models(llm, greedy) -> None:
    """Against torch's, of chosen and likeliest tokens, before penalties and temperature."""
    theirs, model, processor = llm
    batch = processor(input_ids=TEXTS)
    how = {"max_new_tokens": 6, "every": 4, "logprobs": 5}
    drawn = Sampling([0.0, 2.0, 2.0, 0.0], seed=[1, 2, 3, 4], top_k=20, repetition_penalty=1.3)
    pieces = list(stream_ids(model, batch, sampling=drawn, **how))
    for i, row in enumerate(TEXTS):
        ids = sum((piece.ids[i] for piece in pieces), [])
        logs = [np.concatenate(parts) for parts in zip(*(p.logs[i] for p in pieces), strict=True)]
        with torch.no_grad():
            logits = theirs(input_ids=torch.tensor([row + ids])).logits[0, len(row) - 1 : -1]
        expected = logits.log_softmax(dim=-1)
        top = expected.topk(5)
        assert len(ids) == 6 and logs[0].dtype == np.float32
        np.testing.assert_allclose(logs[0], expected[range(6), ids], atol=2e-5)
        np.testing.assert_allclose(logs[1], top.values, atol=2e-5)
        np.testing.assert_array_equal(logs[2], top.indices)


class Even:
    """Even ids alone, each above the last, then 2."""

    def __init__(self) -> None:
        self.last = 0

    def allowed(self, vocab: int) -> np.ndarray:
        ids = np.arange(vocab)
        return (ids % 2 == 0) & (ids > self.last) if self.last < 300 else ids == 2

    def take(self, token: int) -> None:
        assert token % 2 == 0 and token > self.last
        self.last = token


def test_guides_say_what_may_come(llm, greedy) -> None:
    """In their rows alone, chosen and drawn; the likeliest of what may come."""
    theirs, model, processor = llm
    guides = [Even(), None, Even(), None]
    how = {"sampling": Sampling([0.0, 0.0, 1.0, 0.0], seed=[1, 2, 3, 4]), "stop": (2,)}
    pieces = stream_ids(model, processor(input_ids=TEXTS), max_new_tokens=NEW, guides=guides, **how)
    rows, _ = join(pieces)
    assert [rows[1], rows[3]] == cut([greedy[1], greedy[3]], (2,))
    for row, guide in zip(rows[::2], guides[::2], strict=True):
        assert row == sorted(row) and not any(token % 2 for token in row)
        assert guide.last == row[-1] >= 300 and len(row) < NEW
    with torch.no_grad():
        logits = theirs(input_ids=torch.tensor([TEXTS[0] + rows[0]])).logits[0]
    steps = logits[len(TEXTS[0]) - 1 : -1].numpy()
    for k, token in enumerate(rows[0]):
        allowed = [t for t in range(320) if t % 2 == 0 and t > ([0] + rows[0])[k]]
        assert token == max(allowed, key=lambda t: steps[k, t])
