"""Mini-Gemini's branch in torch."""

from pathlib import Path

from converters.hf import VisionFuseForConditionalGeneration, VisionFuseProcessor
from tests.converters.hf.recorded import (
    assert_as_recorded,
    assert_connectors_learn,
    assert_recorded,
    opened,
)
from tests.torch_fused import picture


def test_authors_folder(shared: Path) -> None:
    """Before a Gemma, which scales what it reads."""
    folder = shared / "golden" / "mgm_gemma"
    model = VisionFuseForConditionalGeneration.from_pretrained(folder).eval()
    assert_as_recorded(model, VisionFuseProcessor.from_pretrained(folder).vfjax, folder)


def test_fused_folder(shared: Path, tmp_path: Path) -> None:
    """Four crops and the whole picture."""
    assert_recorded(shared / "golden" / "mgm_hd", tmp_path / "fused")
    model, processor = opened(tmp_path / "fused")
    assert_connectors_learn(model, processor([picture(40, 30)], input_ids=[[1, -200, 7]]))
