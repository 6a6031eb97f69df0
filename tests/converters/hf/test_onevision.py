"""LLaVA-OneVision's branch in torch, beside LLaVA-NeXT's."""

from pathlib import Path

import converters
from tests.checkpoints import llama_folder, llava_next_folder, tuned
from tests.onevision import picture, port_folder
from tests.torch_fused import assert_same, open_in_torch
from vfjax import Video


def test_a_fused_pair_equals_vfjax(tmp_path: Path) -> None:
    """A lone picture that is shrunk, two pictures, a video; weighted sums of tokens."""
    base = llama_folder(tmp_path / "base", 1, model_type="qwen2", tie_word_embeddings=False)
    port_folder(tmp_path / "onevision", tuned(base, 2))
    text = {"model_type": "qwen2", "tie_word_embeddings": False}
    theirs = llava_next_folder(tmp_path / "next", 3, text=text)
    theirs.model.language_model.load_state_dict(tuned(base, 4).model.state_dict())
    theirs.lm_head.load_state_dict(tuned(base, 4).lm_head.state_dict())
    theirs.save_pretrained(tmp_path / "next")
    fused = tmp_path / "fused"
    converters.fuse(
        {"onevision": tmp_path / "onevision", "next": tmp_path / "next"},
        fused,
        base=tmp_path / "base",
        params={"weights": [0.5, 0.5]},
        positions="parallel",
    )
    film = Video(tuple(picture(50 + k, 40) for k in range(3)), pool=2)
    images = [[picture(60, 20), picture(30, 70)], [picture(84, 84)], [film]]
    rows = [[1, -200, 9, -200, 4], [1, -200, 8], [1, 7, -200, 5]]
    assert_same(converters.load(fused), open_in_torch(fused), images, rows, sides=("left",))
