"""Mini-Gemini's branch in torch."""

from pathlib import Path

import pytest

from tests.converters.hf.recorded import assert_recorded


@pytest.mark.parametrize("case", ["mgm_hd", "mgm_gemma"])
def test_authors_recordings(shared: Path, tmp_path: Path, case: str) -> None:
    assert_recorded(shared / "golden" / case, tmp_path / "fused")
