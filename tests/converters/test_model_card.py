"""The card of a fused folder."""

import hashlib
from pathlib import Path

import numpy as np

import converters
from tests.converters.fusing import PLAIN, llm_of, named


def test_the_card_says_what_the_members_did(family: Path, tmp_path: Path):
    converters.fuse(named(family, "up2 up3"), tmp_path / "out", base=family / "base", **PLAIN)
    text = (tmp_path / "out" / "MERGE.md").read_text()
    assert text.splitlines()[2] == 'tags: ["vfjax", "merge"]'  # a plain LLM
    digest = hashlib.sha256((family / "base" / "model.safetensors").read_bytes()).hexdigest()
    assert f"| base | model.safetensors | {digest} |" in text
    assert (tmp_path / "out" / "merge.png").read_bytes()[:4] == b"\x89PNG"
    base, two, three = (llm_of(family / name) for name in ("base", "up2", "up3"))
    names = [name for name in base if "layers.1." in name]
    flat = [
        np.concatenate([x[n].astype(np.float64).ravel() for n in names]) for x in (base, two, three)
    ]
    first, second = flat[1] - flat[0], flat[2] - flat[0]
    lengths = [np.linalg.norm(x) / np.linalg.norm(flat[0]) for x in (first, second)]
    cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
    conflicts = np.mean(first * second < 0)
    row = f"{lengths[0]:.4%} | {lengths[1]:.4%} | {cosine:.4f} | {conflicts:.2%}"
    assert f"| layer 1 | {row} |" in text
