"""The card of a fused folder."""

import ast
import hashlib
import re
from pathlib import Path

import numpy as np
import pytest

import converters
from converters.model_card import readme
from tests import checkpoints
from tests.converters.fusing import PLAIN, llm_of, named
from tests.torch_fused import picture, toy_folder


def test_the_card_says_what_the_members_did(family: Path, tmp_path: Path):
    converters.fuse(named(family, "up2 up3"), tmp_path / "out", base=family / "base", **PLAIN)
    text = (tmp_path / "out" / "MERGE.md").read_text()
    assert text.splitlines()[2] == 'tags: ["vfjax", "merge"]'  # a plain LLM
    digest = hashlib.sha256((family / "base" / "model.safetensors").read_bytes()).hexdigest()
    assert f"| base | model.safetensors | {digest} |" in text
    assert (tmp_path / "out" / "merge.png").read_bytes()[:4] == b"\x89PNG"
    base, two, three = (llm_of(family / name) for name in ("base", "up2", "up3"))
    names = [name for name in base if "layers.1." in name]
    flat = [
        np.concatenate([x[n].astype(np.float64).ravel() for n in names]) for x in (base, two, three)
    ]
    first, second = flat[1] - flat[0], flat[2] - flat[0]
    lengths = [np.linalg.norm(x) / np.linalg.norm(flat[0]) for x in (first, second)]
    cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
    conflicts = np.mean(first * second < 0)
    row = f"{lengths[0]:.4%} | {lengths[1]:.4%} | {cosine:.4f} | {conflicts:.2%}"
    assert f"| layer 1 | {row} |" in text


def printed(kind: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What the programs of a card of me/KIND print, those in JAX first; answers of 8 tokens."""
    card, answers = readme(f"me/{kind}", kind, [], None, False).decode(), []
    for program in re.findall(r"```python\n(.*?)```", card, re.S):
        if "import vfjax" in program and kind in ("authors", "transformers"):
            continue  # the same as of a fused one
        exec(program.replace("max_new_tokens=64", "max_new_tokens=8"), {})
        answers += ast.literal_eval(capsys.readouterr().out)
    return answers


def test_programs_of_cards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """They run, and answer in torch as in JAX, in another layout as in their own."""
    picture(60, 40).save(tmp_path / "cat.jpg")
    monkeypatch.chdir(tmp_path)
    toy_folder(tmp_path / "me/fused", ("clip",))
    checkpoints.llama_folder(tmp_path / "me/llm")
    checkpoints.upstream_llava_folder(tmp_path / "me/authors")
    converters.export("me/authors", "me/transformers", layout="hf")
    for kind in ("fused", "llm"):
        ours, theirs = printed(kind, capsys)
        assert ours and theirs.endswith(ours)
    (one,), (other,) = (printed(kind, capsys) for kind in ("authors", "transformers"))
    assert one.rpartition("ASSISTANT:")[2] == other.rpartition("ASSISTANT:")[2] != ""
