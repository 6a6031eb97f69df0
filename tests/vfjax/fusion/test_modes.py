"""Ways to combine members: against transformers, against one another, with the cache and without.

Two members, each with a tower and an LLM of its own that were tuned from one base.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import DynamicCache, LlamaForCausalLM

import converters
import vfjax.nn.layers
from tests import checkpoints
from tests.checkpoints import make_connector, make_llama, make_tower, tuned
from vfjax import (
    CacheFusion,
    InputError,
    LogitsFusion,
    MemberProcessors,
    Model,
    Processor,
    forward,
    generate,
    generate_ids,
)
from vfjax.fusion import segments as places
from vfjax.generate import prefill
from vfjax.nn.flash import splash
from vfjax.sharding import make_mesh

PICTURE = -200
ROWS = [
    [1, 40, PICTURE, 50, 60],
    [1, PICTURE, 70, PICTURE, PICTURE, 80, 90, 41],
    [1, 42, 43],
    [1, 44, PICTURE],
]
"""One picture, several with and without text between, none, one at the end."""

NEW = 6
LENGTH = 128
"""Of all batches, so that few programs are compiled."""

TOWERS = {
    "a": ("clip", {"taps": [-1], "drop": 1, "aspect": "pad"}),
    "b": ("dinov2", {"taps": [-1], "drop": 0, "aspect": "crop"}),
}
"""16 and 17 tokens a picture."""


def pictures(n: int = 5) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8) for i in range(n)]


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> SimpleNamespace:
    """Folders of base and members; torch's LLMs, their mean, and branches."""
    root = tmp_path_factory.mktemp("family")
    base = checkpoints.llama_folder(root / "base", llm=make_llama(20, num_hidden_layers=2))
    llms, branches = {}, {}
    for i, (name, (kind, entry)) in enumerate(TOWERS.items()):
        llms[name] = tuned(base, i + 1)
        tower = make_tower(kind, 30 + i, num_hidden_layers=1)
        sizes = (tower.config.hidden_size, base.config.hidden_size)
        branches[name] = (tower, make_connector(sizes, 40 + i), entry)
        checkpoints.fused_folder(root / name, llms[name], {"only": branches[name]})
    merged = make_llama(20, num_hidden_layers=2)
    states = [llm.state_dict() for llm in llms.values()]
    merged.load_state_dict({key: sum(s[key] for s in states) / 2 for key in states[0]})
    return SimpleNamespace(root=root, llms=llms, branches=branches, merged=merged)


def fuse(family: SimpleNamespace, names: str = "ab", **options) -> tuple:
    """Half of each member."""
    members = {name: family.root / name for name in names}
    params = {"weights": (0.5,) * len(names)}
    mode = options.get("mode", "tokens")
    if mode != "logits":
        options["params"] = params
    if mode == "tokens":
        options = {"positions": "parallel", "mask": "block"} | options
    model, processor = converters.load_fused(members, base=family.root / "base", **options)
    if isinstance(processor, MemberProcessors):
        return model, MemberProcessors(tuple(map(padded, processor.processors)))
    return model, padded(processor)


def padded(processor: Processor) -> Processor:
    return dataclasses.replace(processor, lengths=(LENGTH,), stop_ids=())


@pytest.fixture(scope="module")
def tokens(family) -> tuple:
    return fuse(family)


@pytest.fixture(scope="module")
def cache(family) -> tuple:
    return fuse(family, mode="cache")


@pytest.fixture(scope="module")
def logits(family) -> tuple:
    return fuse(family, mode="logits")


def test_by_an_attention_kernel(cache, monkeypatch) -> None:
    """As on a TPU: what the merged LLM reads sees what the joined cache holds already."""
    model, processor = cache
    batch = processor(pictures(), input_ids=ROWS)

    def read() -> np.ndarray:
        return jax.jit(lambda model, batch: model.prefill(batch, LENGTH + NEW)[0])(model, batch)

    expected = read()
    kernel = functools.partial(splash, interpret=True)
    monkeypatch.setattr(vfjax.nn.layers, "kernel_for", lambda q: kernel if q.shape[1] > 1 else None)
    np.testing.assert_allclose(read(), expected, atol=1e-5)


@pytest.fixture(scope="module")
def alone(family) -> dict[str, tuple]:
    """Each member by itself: model, processor, logits of `ROWS`."""
    out = {}
    for name in "ab":
        model, processor = converters.load(family.root / name)
        processor = padded(processor)
        batch = processor(pictures(), input_ids=ROWS)
        ends = LENGTH - 1 - batch.mask[:, ::-1].argmax(axis=1)
        every = np.asarray(forward(model, batch))
        out[name] = model, processor, every, every[np.arange(len(ROWS)), ends]
    return out


def arranged(model: Model, positions: str, mask: str) -> Model:
    model = nnx.clone(model)
    model.config = dataclasses.replace(model.config, positions=positions, mask=mask)
    return model


def layout(rows: Sequence[int], counts: Sequence[int]) -> tuple[list[int], list[int]]:
    """Of one row's ids the segments and parallel positions, token by token."""
    segments, positions, at = [], [], 0
    for token in rows:
        if token != PICTURE:
            segments, positions, at = [*segments, 0], [*positions, at], at + 1
            continue
        for k, count in enumerate(counts):
            segments += [k + 1] * count
            positions += range(at, at + count)
        at += max(counts)
    return segments, positions


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("left", [False, True])
def test_parallel_positions(count: int, left: bool):
    """Also where a connector leaves tokens out; with one branch they are the running ones."""
    rng = np.random.default_rng(count)
    for _ in range(20):
        row = [PICTURE if draw < 0.4 else 5 for draw in rng.random(7)]
        most = rng.integers(1, 5, count)  # slots of a picture's branches, some of them left out
        segments, kept = layout(row, most)[0], []
        positions, at = [], 0
        for token in row:
            seen = [rng.random(n) < 0.7 for n in (most if token == PICTURE else [])]
            if token == PICTURE:
                kept += [bool(x) for one in seen for x in one]
                positions += [at + int(one[:i].sum()) for one in seen for i in range(len(one))]
            else:
                kept, positions = [*kept, True], [*positions, at]
            at += max((int(one.sum()) for one in seen), default=1)
        pad = 90 - len(segments)
        width = (pad, 0) if left else (0, pad)
        segments, mask, expected = (np.pad(x, width) for x in (segments, kept, positions))
        found = parallel(jnp.asarray(segments), jnp.asarray(mask), count)
        np.testing.assert_array_equal(np.asarray(found)[mask], expected[mask])
        if count == 1:
            np.testing.assert_array_equal(expected[mask], np.arange(mask.sum()))


@functools.partial(jax.jit, static_argnums=2)
def parallel(segments: jax.Array, mask: jax.Array, count: int) -> jax.Array:
    return places.parallel(segments[None], mask[None], count)[0, 0]


def visual(family: SimpleNamespace, batch, row: int) -> dict[str, list[torch.Tensor]]:
    """Branch -> the torch visual tokens of each of a row's pictures."""
    first = sum(r.count(PICTURE) for r in ROWS[:row])
    last = first + ROWS[row].count(PICTURE)
    out = {}
    for name, (tower, connector, entry) in family.branches.items() if last > first else ():
        pixels = np.moveaxis(batch.images[name].given.pixels[first:last], -1, 1).copy()
        with torch.no_grad():
            states = tower(torch.from_numpy(pixels), output_hidden_states=True).hidden_states
            out[name] = list(connector(states[entry["taps"][0]][:, entry["drop"] :]))
    return out


@torch.no_grad()
def read(llm: LlamaForCausalLM, parts: Sequence[torch.Tensor], positions, **more) -> torch.Tensor:
    """Torch's LLM on ids and visual tokens, one after another."""
    embed = llm.get_input_embeddings()
    x = torch.cat([embed(p) if p.dtype == torch.int64 else p for p in parts])[None]
    return llm(inputs_embeds=x, position_ids=torch.tensor(positions)[None], **more)


@pytest.mark.parametrize("mask", places.MASKS)
@pytest.mark.parametrize("positions", places.POSITIONS)
def test_tokens_equal_transformers(family, tokens, positions: str, mask: str):
    """Given the same positions and mask."""
    model, processor = tokens
    model = arranged(model, positions, mask)
    batch = processor(pictures(), input_ids=ROWS)
    found = np.asarray(forward(model, batch))
    for i, row in enumerate(ROWS):
        seen = {name: iter(x) for name, x in visual(family, batch, i).items()}
        parts = [
            part
            for t in row
            for part in ([next(x) for x in seen.values()] if t == PICTURE else [torch.tensor([t])])
        ]
        branches = [b.tokens for b in model.config.branches]
        segments, where = layout(row, branches)
        of = np.array(segments)
        see = np.tril(np.ones((len(of),) * 2, bool))
        if mask == "block":
            see &= (of[:, None] == 0) | (of == 0) | (of[:, None] == of)
        bias = torch.where(torch.from_numpy(see), 0.0, torch.finfo(torch.float32).min)
        if positions == "running":
            where = list(range(len(of)))
        out = read(family.merged, parts, where, attention_mask=bias[None, None]).logits[0]
        ours = found[i][batch.mask[i]]
        np.testing.assert_allclose(ours, out.numpy(), atol=2e-4, err_msg=str(row))


def test_arrangements_differ(tokens):
    """The comparison above tells each from the others."""
    model, processor = tokens
    batch = processor(pictures(), input_ids=ROWS)
    found = [
        np.asarray(forward(arranged(model, p, m), batch))[0][batch.mask[0]]
        for p in places.POSITIONS
        for m in places.MASKS
    ]
    for i, one in enumerate(found):
        assert all(np.abs(one - other).max() > 1e-2 for other in found[:i])


def test_one_branch_has_no_choice(family, alone):
    """Bit for bit."""
    _, processor, expected, _ = alone["a"]
    model, _ = converters.load(family.root / "a", positions="parallel", mask="block")
    assert (model.config.positions, model.config.mask) == ("parallel", "block")
    found = forward(model, processor(pictures(), input_ids=ROWS))
    np.testing.assert_array_equal(found, expected)


def test_order_of_members_does_not_matter_when_parallel_and_blind(family, tokens):
    found = []
    for model, processor in (tokens, fuse(family, "ba")):
        batch = processor(pictures(), input_ids=ROWS)
        found.append(np.asarray(forward(model, batch))[batch.mask & (batch.visual < 0)])
    np.testing.assert_allclose(*found, atol=1e-5)


def last(model, batch) -> np.ndarray:
    """Logits of each row's next token."""
    return np.asarray(prefill(*jax.tree.flatten(model), batch, size=LENGTH + 64)[0])


def same_llms(model: Model) -> CacheFusion:
    return CacheFusion(model, [nnx.clone(model.llm) for _ in model.config.branches])


@pytest.mark.parametrize("padding", ["right", "left"])
def test_cache_of_one_llm_is_tokens_parallel_and_blind(tokens, padding: str):
    """Where no text stands between pictures, which a member reads without the other branches."""
    model, processor = tokens
    rows = [ROWS[0], [1, PICTURE, PICTURE, PICTURE, 80, 90, 41], *ROWS[2:]]
    batch = processor(pictures(), input_ids=rows, padding=padding)
    np.testing.assert_allclose(last(same_llms(model), batch), last(model, batch), atol=1e-4)


def test_cache_equals_transformers(family, cache):
    """Members of different weights, each row by itself: caches joined, the rest read."""
    model, processor = cache
    batch = processor(pictures(), input_ids=ROWS)
    found = last(model, batch)
    row, seen = ROWS[0], visual(family, batch, 0)
    at = row.index(PICTURE)
    caches = []
    for name, llm in family.llms.items():
        parts = [torch.tensor(row[:at]), seen[name][0]]
        end = at + len(parts[1])
        caches.append(read(llm, parts, range(end), use_cache=True).past_key_values)
    joined = DynamicCache()
    for layer, (a, b) in enumerate(zip(*(c.layers for c in caches), strict=True)):
        keys = torch.cat([a.keys, b.keys[:, :, at:]], dim=2)
        joined.update(keys, torch.cat([a.values, b.values[:, :, at:]], dim=2), layer)
    rest = torch.tensor(row[at + 1 :])
    start = at + max(len(x[0]) for x in seen.values())
    positions = range(start, start + len(rest))
    out = read(family.merged, [rest], positions, past_key_values=joined).logits[0, -1]
    np.testing.assert_allclose(found[0], out.numpy(), atol=2e-4)

    out = read(family.merged, [torch.tensor(ROWS[2])], range(3)).logits[0, -1]
    np.testing.assert_allclose(found[2], out.numpy(), atol=2e-4)


def test_text_between_pictures_sees_all_branches(cache):
    """Of what stands before it, and nothing behind; rows don't see one another."""
    model, processor = cache
    rows = [ROWS[1], ROWS[0], ROWS[2], ROWS[0]]
    some = pictures(6)
    expected = last(model, processor([*some[:3], some[3], some[3]], input_ids=rows))
    np.testing.assert_allclose(expected[3], expected[1], atol=1e-5)
    for i in range(3):
        changed = [some[5] if i == k else some[k] for k in range(3)]
        other = last(model, processor([*changed, some[3], some[3]], input_ids=rows))
        np.testing.assert_array_equal(other[1:], expected[1:])
        assert np.abs(other[0] - expected[0]).max() > 1e-3, i


def test_logits_are_mean_probabilities(alone, logits):
    model, processor = logits
    assert isinstance(model, LogitsFusion)
    shares = [np.asarray(jax.nn.softmax(ends)) for *_, ends in alone.values()]
    found = np.exp(last(model, processor(pictures(), input_ids=ROWS)))
    np.testing.assert_allclose(found, (shares[0] + shares[1]) / 2, atol=1e-6)
    assert np.abs(shares[0] - shares[1]).max() > 1e-3
    member, own, *_ = alone["a"]
    batch = own(pictures(), input_ids=ROWS)
    np.testing.assert_allclose(np.exp(last(LogitsFusion([member]), (batch,))), shares[0], atol=1e-6)


@pytest.mark.parametrize("mode", ["tokens", "cache", "logits"])
def test_decoding_equals_reading_all_again(request, mode: str):
    """Greedy tokens with the cache are those of a prefill of all that is written so far."""
    model, processor = request.getfixturevalue(mode)
    batch = processor(pictures(), input_ids=ROWS)
    written = generate_ids(model, batch, max_new_tokens=NEW)
    texts = generate(model, processor, batch, max_new_tokens=NEW)
    assert texts == [processor.decode(ids) for ids in written]
    rows = [list(row) for row in ROWS]
    for step in range(NEW):
        found = last(model, processor(pictures(), input_ids=rows)).argmax(axis=-1)
        assert found.tolist() == [row[step] for row in written], step
        rows = [[*row, int(token)] for row, token in zip(rows, found, strict=True)]
    assert len({token for row in written for token in row}) > 8


@pytest.mark.parametrize("mode", ["tokens", "cache", "logits"])
def test_sides_of_padding_write_the_same(request, mode: str):
    model, processor = request.getfixturevalue(mode)
    left, right = (
        generate_ids(model, processor(pictures(), input_ids=ROWS, padding=side), max_new_tokens=NEW)
        for side in ("left", "right")
    )
    assert left == right


def test_eight_devices_write_the_same(family, tokens):
    model, processor = tokens
    batch = processor(pictures(), input_ids=ROWS)
    expected = generate_ids(model, batch, max_new_tokens=NEW)
    sharded, _ = fuse(family, mesh=make_mesh(data=2, model=4))
    assert generate_ids(sharded, batch, max_new_tokens=NEW) == expected


def test_each_member_has_its_prompt(alone):
    first, second = (processor for _, processor, *_ in alone.values())
    second = dataclasses.replace(second, template="llava_llama_2", stop_ids=(3, 2))
    first = dataclasses.replace(first, lengths=(512,), stop_ids=(2,))
    mixed = MemberProcessors((first, second))
    assert mixed.stops == (2, 3)
    prompts = mixed.chat("What is it?")
    assert prompts == (first.chat("What is it?"), second.chat("What is it?"))
    assert prompts[0] != prompts[1]
    batches = mixed(pictures(1), [prompts])
    both = mixed(pictures(1), prompts[:1])  # a text is every member's prompt
    for i, (processor, own) in enumerate(zip(mixed.processors, batches, strict=True)):
        expected = processor(pictures(1), [prompts[i]])
        np.testing.assert_array_equal(own.tokens, expected.tokens)
        expected = processor(pictures(1), [prompts[0]])
        np.testing.assert_array_equal(both[i].tokens, expected.tokens)


def test_folders_keep_the_arrangement(family, tmp_path):
    members = {name: family.root / name for name in "ab"}
    options = {"base": family.root / "base", "params": {"weights": (0.5, 0.5)}}
    source = converters.fuse(members, tmp_path / "0", positions="parallel", mask="block", **options)
    assert (source.positions, source.mask) == ("parallel", "block")
    converters.export(converters.load(tmp_path / "0")[0], tmp_path / "1")
    model, _ = converters.load(tmp_path / "1", positions="running")
    assert (model.config.positions, model.config.mask) == ("running", "block")
    converters.export(model, tmp_path / "2")
    model, _ = converters.load(tmp_path / "2")
    assert (model.config.positions, model.config.mask) == ("running", "block")
    old, _ = converters.load(family.root / "a")  # its config.json says nothing
    assert (old.config.positions, old.config.mask) == ("running", "causal")


def smaller(member: Model) -> Model:
    """A member that says it has fewer words."""
    member = nnx.clone(member)
    llm = dataclasses.replace(member.config.llm, vocab=7)
    member.config = dataclasses.replace(member.config, llm=llm)
    return member


def test_bad_input_is_one_line(family: SimpleNamespace, tokens, logits, tmp_path: Path):
    model, processor = tokens
    a = logits[0].members[0]
    odd = converters.load(checkpoints_llm(tmp_path / "odd"))[0].llm

    def again(**tokenizer) -> MemberProcessors:
        words = SimpleNamespace(get_vocab=lambda: tokenizer)
        return MemberProcessors((processor, dataclasses.replace(processor, tokenizer=words)))

    calls = {
        "positions: found 'sideways', expected 'running' or 'parallel'": lambda: converters.load(
            family.root / "a", positions="sideways"
        ),
        "mask: found 'all', expected 'causal' or 'block'": lambda: fuse(family, mask="all"),
        "mode: found 'both', expected 'tokens' or 'cache' or 'logits'": lambda: fuse(
            family, mode="both"
        ),
        "owners: found LLMs [0] of 1, for 2 branches": lambda: CacheFusion(model, [a.llm]),
        "owners: found LLMs [0, 1] of 1": lambda: CacheFusion(model, [a.llm], [0, 1]),
        "llms[1]: found LlamaConfig(": lambda: CacheFusion(model, [a.llm, odd]),
        "members: found vocabularies of none": lambda: LogitsFusion([]),
        "members: found vocabularies of 320, 7": lambda: LogitsFusion([a, smaller(a)]),
        "members: found tokenizers with different ids": lambda: again(cat=3),
    }
    for message, call in calls.items():
        with pytest.raises(InputError) as error:
            call()
        assert str(error.value).startswith(message), str(error.value)
        assert "\n" not in str(error.value)


def checkpoints_llm(path: Path) -> Path:
    """An LLM of another depth."""
    checkpoints.llama_folder(path, llm=make_llama(9, num_hidden_layers=1))
    return path
