"""A family of members to fuse."""

from pathlib import Path

import pytest

from tests.checkpoints import (
    llama_folder,
    make_llama,
    tuned,
    upstream_llava_folder,
)
from tests.converters.fusing import fuse_two, hf_member


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, three upstream members and two of transformers, fine-tuned from it, in bfloat16."""
    root = tmp_path_factory.mktemp("family")
    base = make_llama(0).bfloat16()
    llama_folder(root / "base", llm=base)
    for i, name in enumerate(("up1", "up2", "up3"), 1):
        weights = "bin" if i == 1 else "safetensors"
        upstream_llava_folder(root / name, 10 * i, llm=tuned(base, i).bfloat16(), weights=weights)
    hf_member(root / "hf1", tuned(base, 4), 40)
    hf_member(root / "hf2", tuned(base, 5), 50, kind="dinov2")
    return root


@pytest.fixture(scope="module")
def fused(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf2 and up3, in this order."""
    out = tmp_path_factory.mktemp("fused") / "fused"
    fuse_two(family, out)
    return out
