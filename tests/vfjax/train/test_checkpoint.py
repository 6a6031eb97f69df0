"""What a working folder keeps of a run, damaged or of another run."""

from pathlib import Path

import pytest

from vfjax import InputError
from vfjax.train import same_config


def test_same_config(tmp_path: Path):
    same_config(tmp_path / "run", {"steps": 3, "train": ("a", 1.0)})
    same_config(tmp_path / "run", {"steps": 3, "train": ("a", 1.0)})
    for other, words in (
        ({"steps": 4, "train": ("a", 1.0)}, "config.json: steps: found 3, expected 4, as in this"),
        ({"steps": 3}, "config.json: train: found .*, expected null"),
        ({"steps": 3, "train": ("a", 1.0), "new": 1}, "of a version of vfjax without this key"),
    ):
        with pytest.raises(InputError, match=words):
            same_config(tmp_path / "run", other)


@pytest.mark.parametrize("data", [b"{", b"[]", b"\xff", b"", b"[" * 100_000])
def test_a_damaged_config(tmp_path: Path, data: bytes):
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(InputError, match="config.json: found .*; pass another --workdir"):
        same_config(tmp_path, {"steps": 3})
