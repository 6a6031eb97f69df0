"""Every kind of published MLLM: recordings of the authors' code, and several kinds fused."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

import converters
import vfjax
from converters.verify import verify

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
    converters.fuse(members, out, method="linear", params={"weights": [1.0, 1.0, 1.0]})
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
    tokens, keep = (np.asarray(x) for x in model.visual_tokens(batch.images))
    start = 0
    for name, case in KINDS.items():
        alone, own = converters.load(shared / "golden" / case, dtype="float32")
        alone.llm = model.llm  # the router reads the fused model's embeddings
        expected, kept = alone.visual_tokens(own(picture, input_ids=ROWS[:1]).images)
        part = slice(start, start + len(expected))
        np.testing.assert_allclose(tokens[part], expected, rtol=0, atol=1e-5, err_msg=name)
        np.testing.assert_array_equal(keep[part], kept, err_msg=name)
        start += len(expected)
    assert start == len(tokens)


def test_a_batch_of_kinds_equals_its_rows(fused: Path):
    model, processor = converters.load(fused, dtype="float32")
    together = vfjax.generate_ids(model, processor(pictures(), input_ids=ROWS), max_new_tokens=6)
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
