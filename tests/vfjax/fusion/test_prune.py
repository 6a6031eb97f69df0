"""Pruned visual tokens: against transformers' attention, and a rule written out in loops."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import converters
from tests import checkpoints
from tests.checkpoints import make_connector, make_llama, make_tower
from vfjax import CacheFusion, InputError, Prune, Video, forward, generate_ids
from vfjax.data import Batches, Conversations
from vfjax.fusion.prune import marks, merged, rank
from vfjax.sharding import make_mesh

PICTURE = -200
ROWS = [[1, 40, PICTURE, 50, 60], [1, PICTURE, 70, PICTURE, PICTURE, 80, 90], [1, 42, 43]]
"""One picture, several with and without text between, none."""

KEEP = (0.5, 0.3)
STAY = (8, 6)  # of 16 and of 17


def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8) for i in range(4)]


@pytest.fixture(scope="module")
def fused(tmp_path_factory) -> SimpleNamespace:
    """A fused folder of two branches, and torch's LLM."""
    folder = tmp_path_factory.mktemp("fused")
    llm = make_llama(20, num_hidden_layers=3)
    width = llm.config.hidden_size
    kinds = {
        "a": ("clip", {"taps": [-1], "drop": 1, "aspect": "pad"}),
        "b": ("dinov2", {"taps": [-1], "drop": 0, "aspect": "crop"}),
    }
    branches = {}
    for i, (name, (kind, entry)) in enumerate(kinds.items()):
        tower = make_tower(kind, 30 + i, num_hidden_layers=1)
        branches[name] = (tower, make_connector((tower.config.hidden_size, width), 40 + i), entry)
    checkpoints.fused_folder(folder, llm, branches)
    return SimpleNamespace(folder=folder, llm=llm)


def load(folder: Path, prune: Prune | None, **options):
    return converters.load(folder, prune=prune, **options)


def test_share_of_one_changes_no_bit(fused):
    plain, processor = load(fused.folder, None)
    model, other = load(fused.folder, Prune((1.0, 1.0)))
    a, b = (p(pictures(), input_ids=ROWS) for p in (processor, other))
    assert b.groups is None and b.read == b.tokens.shape[1]
    np.testing.assert_array_equal(forward(plain, a), forward(model, b))


def whole(fused) -> tuple:
    """What the LLM would read, without pruning: embeddings, mask, visual segments."""
    model, processor = load(fused.folder, None)
    batch = processor(pictures(), input_ids=ROWS)
    x, mask = model.embed(batch)
    return np.array(x), np.array(mask), batch


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()


def stays(batch, i: int, score: np.ndarray) -> list[int]:
    """Places of a row that stay: text, of each picture and branch those of the highest score."""
    groups = {int(g) for g in batch.groups.of[i] if g >= 0}
    out = list(np.flatnonzero(batch.mask[i] & (batch.visual[i] < 0)))
    for group in groups:
        places = np.flatnonzero(batch.groups.of[i] == group)
        best = sorted(places, key=lambda p: (-score[p], p))
        out += best[: batch.groups.most[i][places[0]]]
    return sorted(out)


def test_attention_is_that_of_transformers(fused):
    """Ranked by torch's attention of the second layer; then torch's LLM on what stays."""
    prune = Prune(KEEP, by="attention", depth=2)
    model, processor = load(fused.folder, prune)
    x, _, _ = whole(fused)
    batch = processor(pictures(), input_ids=ROWS)
    logits = np.asarray(forward(model, batch))
    assert logits.shape[1] == batch.read < batch.tokens.shape[1]
    fused.llm.set_attn_implementation("eager")
    for i, row in enumerate(ROWS):
        length = int(batch.mask[i].sum())
        count = row.count(PICTURE)
        inputs = torch.from_numpy(x[i][None, :length])
        with torch.no_grad():
            seen = fused.llm(inputs_embeds=inputs, output_attentions=True).attentions[1]
            kept = stays(batch, i, seen[0].mean(dim=0)[-1].numpy())
            assert len(kept) == len(row) - count + count * sum(STAY)
            expected = fused.llm(
                inputs_embeds=inputs[:, kept], position_ids=torch.tensor([kept])
            ).logits[0]
        assert_close(logits[i][: len(kept)], expected.numpy())


def likeness(x: np.ndarray) -> np.ndarray:
    y = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return y @ y.T


def test_similarity_is_the_rule_in_loops(fused):
    model, processor = load(fused.folder, Prune(KEEP, by="similarity"))
    x, _, _ = whole(fused)
    batch = processor(pictures(), input_ids=ROWS)
    logits = np.asarray(forward(model, batch))
    for i in range(len(ROWS)):
        cosine, score = likeness(x[i].astype(np.float64) + 1e-30), np.full(len(x[i]), -np.inf)
        of = batch.groups.of[i]
        for p in np.flatnonzero(of >= 0):
            before = [q for q in range(p) if of[q] == of[p]]
            score[p] = -max((cosine[p, q] for q in before), default=-np.inf)
        kept = stays(batch, i, score)
        inputs, sizes = x[i].copy(), np.ones(len(x[i]))
        for p in np.flatnonzero(of >= 0):
            if p not in kept:
                target = max((q for q in kept if of[q] == of[p]), key=lambda q: cosine[p, q])
                inputs[target] += x[i][p]
                sizes[target] += 1
        inputs = torch.from_numpy((inputs / sizes[:, None])[kept][None].astype(np.float32))
        with torch.no_grad():
            expected = fused.llm(inputs_embeds=inputs, position_ids=torch.tensor([kept])).logits[0]
        assert_close(logits[i][: len(kept)], expected.numpy())


@pytest.mark.parametrize(
    ("by", "arranged"),
    [("attention", ("running", "causal")), ("similarity", ("parallel", "block"))],
)
def test_decoding_goes_on_where_reading_ended(fused, by: str, arranged: tuple[str, str]):
    """Tokens of each row alone, on either side, in a batch, and on eight devices are the same."""
    prune = Prune(KEEP, by=by)
    options = dict(zip(("positions", "mask"), arranged, strict=True))
    model, processor = load(fused.folder, prune, **options)
    batch = processor(pictures(), input_ids=ROWS)
    found = generate_ids(model, batch, max_new_tokens=5)
    left = processor(pictures(), input_ids=ROWS, padding="left")
    assert generate_ids(model, left, max_new_tokens=5) == found
    alone = processor(pictures()[:1], input_ids=ROWS[:1])
    assert generate_ids(model, alone, max_new_tokens=5) == found[:1]
    sharded, _ = load(fused.folder, prune, mesh=make_mesh(2, 4), **options)
    assert generate_ids(sharded, batch, max_new_tokens=5) == found
    everything, other = load(fused.folder, None, **options)
    whole = generate_ids(everything, other(pictures(), input_ids=ROWS), max_new_tokens=5)
    assert whole[2] == found[2], "a row without a picture loses nothing"
    cache = model.prefill(batch, batch.read + 8)[1]
    assert cache.mask.shape == (3, batch.read + 8)
    np.testing.assert_array_equal(cache.mask.sum(axis=1), [4 + 14, 4 + 3 * 14, 3])


def test_rows_that_are_cut_keep_what_is_there(fused):
    model, processor = load(fused.folder, Prune(KEEP))
    batch = processor(pictures(), input_ids=ROWS, truncate=20)
    cache = model.prefill(batch, batch.read)[1]
    np.testing.assert_array_equal(cache.mask.sum(axis=1), [2 + 8 + 2, 1 + 8 + 3, 3])


@given(data=st.data(), sizes=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), max_size=3))
@settings(max_examples=30, deadline=None)
def test_what_stays(data, sizes: list[tuple[int, int]]):
    """As many of each picture and branch as its share says, by score, whatever the others are."""
    shares = (data.draw(st.sampled_from([0.1, 0.25, 0.5, 1.0])), 0.3)
    parts = [[np.arange(n) for n in each] for each in sizes]
    of, most = marks(parts, shares)
    count = [n for each in sizes for n in each]
    assert [int((of == g).sum()) for g in range(len(count))] == count
    scores = data.draw(
        st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=len(of), max_size=len(of))
    )
    score = np.array(scores, np.float32)
    places = np.asarray(rank(jnp.asarray(score)[None], jnp.asarray(of[:, None] == of)[None]))[0]
    for g, n in enumerate(count):
        mine = np.flatnonzero(of == g)
        stay = [p for p in mine if places[p] < most[p]]
        assert len(stay) == -(-n * round(100 * shares[g % 2]) // 100)
        assert stay == sorted(sorted(mine, key=lambda p: (-score[p], p))[: len(stay)])


def test_equal_tokens_become_one():
    x = np.array([[[1.0, 0], [1, 0], [0, 1], [1, 0]]], np.float32)
    visual, kept = np.ones((1, 4), bool), np.array([[True, False, True, False]])
    found = merged(jnp.asarray(x), jnp.asarray(likeness(x[0])[None]), visual, kept)
    np.testing.assert_array_equal(found[0, [0, 2]], x[0, [0, 2]])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Prune(0.0), "prune.keep: found 0.0"),
        (lambda: Prune((0.5, 1.5)), "prune.keep"),
        (lambda: Prune(by="luck"), "'attention' or 'similarity'"),
        (lambda: Prune(depth=0), "prune.depth"),
    ],
)
def test_refused(make, said: str):
    with pytest.raises(InputError, match=said):
        make()


def test_a_video_is_one_group_of_each_branch(fused):
    """Beside a picture, too: shares are of the video's tokens, not of a frame's."""
    _, processor = load(fused.folder, Prune([0.25, 1.0]))
    video = Video(tuple(map(Image.fromarray, pictures()[:3])), pool=1)
    batch = processor([video, pictures()[3]], input_ids=[[1, PICTURE, 5, PICTURE, 6]])
    groups, places = np.unique(batch.groups.of, return_index=True)
    most = batch.groups.most.ravel()[places[groups >= 0]]
    sizes = [(batch.groups.of == group).sum() for group in groups if group >= 0]
    assert sizes == [3 * 16, 3 * 17, 16, 17]
    assert most.tolist() == [12, 3 * 17, 4, 17]


def test_refused_for_a_model(fused, tmp_path):
    with pytest.raises(InputError, match="3 shares"):
        load(fused.folder, Prune((0.5, 0.5, 0.5)))
    model, processor = load(fused.folder, Prune(0.5))
    with pytest.raises(InputError, match="prune"):
        CacheFusion(model, [model.llm, model.llm])
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    (tmp_path / "rows.json").write_text(json.dumps([{"conversations": turns}]))
    data = Conversations(tmp_path / "rows.json", tmp_path)
    with pytest.raises(InputError, match="prune"):
        Batches([(data, 1.0)], processor, batch=1, seed=0)


def test_a_shallow_llm_is_ranked_by_its_last_layer(fused):
    found = []
    for depth in (3, 9):
        model, processor = load(fused.folder, Prune(0.5, depth=depth))
        found.append(np.asarray(forward(model, processor(pictures(), input_ids=ROWS))))
    np.testing.assert_array_equal(*found)
