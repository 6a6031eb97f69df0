"""Fused folders with code of their own: in transformers without vfjax they compute the same."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import converters
import vfjax
from converters.__main__ import main
from converters.hf import VisionFuseConfig, remote, written
from converters.hf.plain import classes_of
from vfjax import InputError
from vfjax.atomic import read_json

FAMILY = Path(__file__).resolve().parents[3] / "experiments" / "family" / "models"
QUESTIONS = ["where is the 3 ?", "how many digits ?"]

ELSEWHERE = """
import sys
sys.modules |= dict.fromkeys(("jax", "flax", "vfjax", "converters"))
import numpy as np
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, picture, out, *prompts = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
batch = processor(images=[[picture, picture], []], text=prompts)
logits = model(**batch).logits.detach().numpy()
model.save_pretrained(out + ".saved")
np.save(out, logits[batch["attention_mask"].bool().numpy()])
"""


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped pair, with code."""
    folder = tmp_path_factory.mktemp("fused") / "fused"
    members = {name: FAMILY / name for name in ("clip", "dino")}
    how = {"positions": "parallel", "mask": "block"}
    converters.fuse(members, folder, base=FAMILY / "base", remote_code=True, **how)
    return folder


def test_without_vfjax(fused: Path, tmp_path: Path):
    picture = str(tmp_path / "picture.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)).save(picture)
    model, processor = converters.load(fused, dtype="float32")
    prompts = [processor.chat(QUESTIONS[0], images=2), processor.chat(QUESTIONS[1], images=0)]
    batch = processor([[picture, picture], []], prompts, padding="left")
    command = [sys.executable, "-c", ELSEWHERE, fused, picture, tmp_path / "out.npy", *prompts]
    given = {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=given)
    expected = np.asarray(vfjax.forward(model, batch))[np.asarray(batch.mask)]
    found = np.load(tmp_path / "out.npy")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    saved = tmp_path / "out.npy.saved"
    assert (saved / remote.FILE).read_bytes() == (fused / remote.FILE).read_bytes()
    assert read_json(saved / "config.json")["plain"] == read_json(fused / "config.json")["plain"]
    VisionFuseConfig.from_pretrained(fused).save_pretrained(tmp_path / "own")  # without the code
    assert {"auto_map", "plain"}.isdisjoint(read_json(tmp_path / "own" / "config.json"))


def test_what_is_written_is_what_vfjax_reads(fused: Path, monkeypatch: pytest.MonkeyPatch):
    """Configs and processor; and the folder without what is written for others."""
    config = VisionFuseConfig.from_pretrained(fused)
    model, processor = converters.load(fused)
    classes = classes_of(model.config) | classes_of(processor.settings)
    monkeypatch.setattr(written, "CLASSES", classes)
    assert written.model_config(config) == model.config
    again = written.processor_of(config, fused)
    own, found = (
        {key: value for key, value in vars(each).items() if key != "tokenizer"}
        for each in (processor, again)
    )
    assert own == found
    config.plain["branches"][0]["architecture"]["encoder"]["layers"] = "4"
    with pytest.raises(InputError, match=r"encoder.layers: found '4', expected .*int"):
        written.model_config(config)
    texts = ["where is the 3 ?", "<image>\nred", ""]
    assert list(map(processor.tokenize, texts)) == list(map(again.tokenize, texts))


def test_export_writes_code_too(fused: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    words = ["converters", "export", str(fused), str(tmp_path / "out"), "--remote_code"]
    monkeypatch.setattr(sys, "argv", words)
    assert main() == 0
    for name in (remote.FILE, "processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (fused / name).read_bytes(), name
    first, second = (read_json(each / "config.json") for each in (fused, tmp_path / "out"))
    assert second == {**first, "torch_dtype": "float32"}


def test_what_cannot_have_code_is_refused(fused: Path, tmp_path: Path):
    member, _ = converters.load(FAMILY / "clip")
    with pytest.raises(InputError, match="found a folder of layout 'llava', expected a fused one"):
        converters.export(member, tmp_path / "out", remote_code=True)
    with pytest.raises(InputError, match="remote_code: found export='llm'"):
        converters.fuse({"a": fused, "b": fused}, tmp_path / "x", export="llm", remote_code=True)
    assert list(tmp_path.iterdir()) == []
