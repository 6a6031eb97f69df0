"""Names of files that a checkpoint may hold."""

from fnmatch import fnmatch
from pathlib import Path

import pytest

from converters.files.hub import TEXTS
from tests import checkpoints


@pytest.mark.parametrize("build", ["llama_folder", "hf_llava_folder", "upstream_llava_folder"])
def test_all_that_transformers_writes_is_named(tmp_path: Path, build: str):
    """But for weights, and what is said of them once more."""
    getattr(checkpoints, build)(tmp_path / "model")
    files = [x for x in (tmp_path / "model").rglob("*") if x.is_file()]
    names = {x.relative_to(tmp_path / "model").as_posix() for x in files}
    left = {name for name in names if not any(fnmatch(name, x) for x in TEXTS)}
    assert names - left and all(name.endswith((".safetensors", ".bin")) for name in left)
