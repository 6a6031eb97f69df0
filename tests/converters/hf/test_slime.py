"""SliME's branch in torch."""

from pathlib import Path

import pytest

from tests.converters.hf.recorded import assert_recorded


@pytest.mark.parametrize("case", ["slime_vicuna", "slime_llama3"])
def test_authors_recordings(shared: Path, tmp_path: Path, case: str) -> None:
    assert_recorded(shared / "golden" / case, tmp_path / "fused")
