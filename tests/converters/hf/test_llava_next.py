"""LLaVA-NeXT's branch in torch."""

from pathlib import Path

from tests.converters.hf.recorded import assert_recorded


def test_authors_recordings(shared: Path, tmp_path: Path) -> None:
    assert_recorded(shared / "golden" / "llava_next_anyres", tmp_path / "fused")
