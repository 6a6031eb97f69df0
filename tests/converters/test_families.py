"""Every kind of published MLLM: recordings of the authors' code, and several kinds fused."""

import hashlib
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

import converters
import vfjax
from converters.verify import verify
from tests.torch_fused import greedy, logits_of, open_in_torch
from vfjax import InputError, Model
from vfjax.atomic import read_json

CASES = [
    "dc_anyres",
    "dc_anyres_siglip",
    "dc_dci",
    "dc_dci_siglip",
    "dc_sci",
    "dc_sti",
    "dc_sti_siglip",
    "llava_next_anyres",
    "mgm_gemma",
    "mgm_hd",
    "mgm_plain",
    "slime_llama3",
    "slime_vicuna",
]
KINDS = {"mgm": "mgm_plain", "slime": "slime_vicuna", "next": "llava_next_anyres"}


@jax.jit
def visual_tokens(model, images):
    memory = model.visual_tokens(images)
    return memory.values, memory.keep


ROWS = [[1, 5, -200, 7, 9], [1, -200, 33, 4], [1, 2, 3]]


@pytest.mark.parametrize("case", CASES)
def test_stages_equal_the_authors_code(shared: Path, case: str):
    rows = verify(shared / "golden" / case)
    compared = [row for row in rows if row.error is not None]
    assert {"pixel_values", "image_features", "logits", "generated"} <= {r.stage for r in compared}
    assert [str(row) for row in compared if not row.ok] == []


@pytest.fixture(scope="module")
def fused(shared: Path, tmp_path_factory) -> Path:
    """Mini-Gemini, SliME and LLaVA-1.6 in one folder; their LLMs have one shape."""
    out = tmp_path_factory.mktemp("kinds") / "fused"
    members = {name: shared / "golden" / case for name, case in KINDS.items()}
    converters.fuse(
        members, out, method="linear", family=False, params={"weights": [1.0, 1.0, 1.0]}
    )
    return out


def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((80, 120), (150, 60))]


def test_members_of_several_kinds_read_as_one(fused: Path, shared: Path):
    """Each branch's tokens are its member's own; the prompt that the router reads is the row's."""
    model, processor = converters.load(fused, dtype="float32")
    assert [b.name for b in model.config.branches] == list(KINDS)
    picture = pictures()[:1]
    batch = processor(picture, input_ids=ROWS[:1])
    tokens, keep = (np.asarray(x) for x in visual_tokens(model, batch.images))
    start = 0
    for name, case in KINDS.items():
        alone, own = converters.load(shared / "golden" / case, dtype="float32")
        alone.llm = model.llm  # the router reads the fused model's embeddings
        expected, kept = visual_tokens(alone, own(picture, input_ids=ROWS[:1]).images)
        part = slice(start, start + len(expected))
        np.testing.assert_allclose(tokens[part], expected, rtol=0, atol=1e-5, err_msg=name)
        np.testing.assert_array_equal(keep[part], kept, err_msg=name)
        start += len(expected)
    assert start == len(tokens)


def test_a_batch_of_kinds_equals_its_rows(fused: Path):
    """In transformers, too."""
    model, processor = converters.load(fused, dtype="float32")
    batch = processor(pictures(), input_ids=ROWS)
    together = vfjax.generate_ids(model, batch, max_new_tokens=6)
    assert greedy(open_in_torch(fused), batch, 6) == together
    for i, row in enumerate(ROWS):
        batch = processor(pictures()[i : i + 1] if -200 in row else None, input_ids=[row])
        assert vfjax.generate_ids(model, batch, max_new_tokens=6) == [together[i]]


def test_export_gives_the_bytes_back(fused: Path, tmp_path: Path):
    """Split tensors too: SliME's attention keeps queries, keys and values in one."""
    model, _ = converters.load(fused)
    converters.export(model, tmp_path / "out")
    digests = [
        hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        for folder in (fused, tmp_path / "out")
    ]
    assert digests[0] == digests[1]


PAIR = {"mgm": "mgm_plain", "slime": "slime_vicuna"}
GLOBAL, SEPARATOR = 576, 301  # SliME's global tokens, then the token of its config
SLOTS = 7 * 144  # for its local ones


@pytest.fixture(scope="module")
def pair(shared: Path, tmp_path_factory) -> Path:
    """The headline pair at toy size: Mini-Gemini and SliME, averaged; the router is SliME's own."""
    out = tmp_path_factory.mktemp("pair") / "fused"
    members = {name: shared / "golden" / case for name, case in PAIR.items()}
    weights = {"weights": [0.5, 0.5]}
    converters.fuse(members, out, method="linear", family=False, params=weights, router="member")
    return out


@torch.no_grad()
@pytest.mark.parametrize("seen", PAIR)
def test_pair_equals_an_assembly_of_recorded_stages(shared: Path, pair: Path, seen: str):
    """On a member's recorded picture: its recorded tokens, the other's, and transformers' LLM."""
    folder = shared / "golden" / PAIR[seen]
    inputs, recorded = (load_file(folder / f"{x}.safetensors") for x in ("inputs", "outputs"))
    picture, ids = inputs["s0.image0"], inputs["s0.input_ids"]
    weights = load_file(pair / "model.safetensors")
    llm = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**read_json(pair / "config.json")["text_config"])
    )
    names = {n: torch.from_numpy(x) for n, x in weights.items() if not n.startswith("branches.")}
    llm.load_state_dict(names)
    table = weights["model.embed_tokens.weight"]

    blocks = []
    for name, case in PAIR.items():
        alone, own = converters.load(shared / "golden" / case, dtype="float32")
        tokens, keep = visual_tokens(alone, own([picture], input_ids=[ids]).images)
        block = np.array(tokens)[np.asarray(keep)]
        if name == seen:
            expected = recorded["s0.image_features"].reshape(-1, block.shape[1])
            rows = recorded.get("s0.image_features.rows", np.arange(len(block)))
            np.testing.assert_allclose(block[rows], expected, rtol=0, atol=1e-4)
            block[rows] = expected
        if name == "slime":  # its separator is the merged LLM's
            block[GLOBAL] = table[SEPARATOR]
        blocks.append(block)
    (at,) = np.flatnonzero(ids == -200)
    x = np.concatenate([table[ids[:at]], *blocks, table[ids[at + 1 :]]])
    expected = llm(inputs_embeds=torch.from_numpy(x)[None]).logits[0].numpy()

    model, processor = converters.load(pair, dtype="float32")
    batch = processor([picture], input_ids=[ids])
    _, mask = jax.jit(Model.embed)(model, batch)
    found = np.asarray(vfjax.forward(model, batch))[np.asarray(mask)]
    for logits in (found, logits_of(open_in_torch(pair), batch)):
        assert logits.shape == expected.shape
        assert np.abs(logits - expected).max() <= 2e-4


def test_whose_embeddings_the_router_reads(shared: Path, pair: Path, tmp_path: Path):
    """The member's own table is kept with its branch; with the merged one the choice differs."""
    members = {name: shared / "golden" / case for name, case in PAIR.items()}
    params = {"weights": [0.5, 0.5]}
    converters.fuse(members, tmp_path / "merged", method="linear", family=False, params=params)
    kept = load_file(pair / "model.safetensors")["branches.slime.connector.embedding.weight"]
    own = load_file(members["slime"] / "model.safetensors")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(kept, own)
    keeps = []
    for folder in (pair, tmp_path / "merged", members["slime"]):
        model, processor = converters.load(folder, dtype="float32")
        batch = processor(pictures()[:1], input_ids=ROWS[:1])
        _, keep = visual_tokens(model, batch.images)
        keeps.append(np.asarray(keep)[-SLOTS:])
    np.testing.assert_array_equal(keeps[0], keeps[2])
    assert (keeps[0] != keeps[1]).any()


def test_an_unknown_router(shared: Path, tmp_path: Path):
    members = {name: shared / "golden" / case for name, case in PAIR.items()}
    with pytest.raises(InputError, match="router: found 'own', expected 'merged' or 'member'"):
        converters.fuse(
            members, tmp_path / "out", method="linear", params={"weights": [1, 1]}, router="own"
        )
    assert not (tmp_path / "out").exists()


def test_epsilons_and_activations(shared: Path):
    """Of each part as its authors have it; a wrong one moves features only a little."""
    models = {
        case: converters.load(shared / "golden" / case)[0].branches
        for case in ("mgm_plain", "slime_vicuna", "dc_dci_siglip")
    }
    mgm, slime, siglip = (next(iter(branches.values())) for branches in models.values())
    found = {
        "clip": (mgm.encoder.blocks[0].norm1.epsilon, mgm.encoder.config.act),
        "convnext": (mgm.aux.stages[0].blocks[0].norm.epsilon, mgm.aux.config.act),
        "mining": (mgm.connector.query.norm.epsilon, mgm.connector.config.act),
        "resampler": (slime.connector.sampler.norm_q.epsilon, slime.connector.config.act),
        "siglip": (siglip.encoder.blocks[0].norm1.epsilon, siglip.encoder.config.act),
    }
    assert found == {
        "clip": (1e-5, "quick_gelu"),
        "convnext": (1e-6, "gelu"),
        "mining": (1e-5, "gelu"),
        "resampler": (1e-6, "gelu"),
        "siglip": (1e-6, "gelu_pytorch_tanh"),
    }
