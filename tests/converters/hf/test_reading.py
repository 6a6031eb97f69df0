"""Models by their names on the hub, in transformers' classes: from a server, and from its cache."""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import constants

from converters import hf
from converters.hf import written
from tests.adapters import peft_folder
from tests.checkpoints import llama_folder, make_llama, upstream_llava_folder
from tests.hub import Account, Hub, serving
from tests.torch_fused import open_in_torch, toy_folder
from vfjax import InputError

Model = hf.VisionFuseForConditionalGeneration


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fused model, a member in its authors' layout, and an adapter for a base."""
    root = tmp_path_factory.mktemp("models")
    llm = make_llama(0)
    toy_folder(root / "fused", ("clip",))
    upstream_llava_folder(root / "llava")
    llama_folder(root / "base", llm=llm)
    peft_folder(root / "lora", llm, 3, base="org/base", revision=None)
    return root


@pytest.fixture
def server(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """All of them at org/NAME."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with serving(tmp_path / "cache", monkeypatch) as found:
        for folder in models.iterdir():
            found.add(f"org/{folder.name}", folder)
        yield found


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("name", ["fused", "llava", "lora"])
def test_names(server: Hub, monkeypatch: pytest.MonkeyPatch, name: str):
    """As the folder itself, with a revision in the name too; then from the cache."""
    refs = server.repositories[f"org/{name}"].refs
    refs["v1"] = refs.pop("main")
    found = Model.from_pretrained(f"org/{name}@v1")
    assert found.name_or_path == f"org/{name}@v1"
    offline(monkeypatch)
    assert same(Model.from_pretrained(f"org/{name}@v1", local_files_only=True), found)
    assert hf.VisionFuseProcessor.from_pretrained(f"org/{name}", revision="v1").stops == (2,)


def test_auto_classes(server: Hub, models: Path, monkeypatch: pytest.MonkeyPatch):
    """A commit that is older; a processor needs no weights; then from the cache."""
    old = server.repositories["org/fused"].refs["main"]
    server.add("org/fused", models / "llava")
    processor = transformers.AutoProcessor.from_pretrained("org/fused", revision=old)
    assert "model.safetensors" not in server.fetched("org/fused")
    model = open_in_torch("org/fused", revision=old)
    assert isinstance(processor, hf.VisionFuseProcessor) and same(
        model, open_in_torch(models / "fused")
    )
    alone = written.small("org/fused", {"revision": old})
    assert {"config.json", "tokenizer.json"} <= {file.name for file in alone.iterdir()}
    offline(monkeypatch)
    assert same(open_in_torch("org/fused", revision=old), model)
    again = transformers.AutoProcessor.from_pretrained("org/fused", revision=old)
    ids = [x(text=again.vfjax.chat("Why?", images=0))["input_ids"] for x in (processor, again)]
    assert np.array_equal(*ids)


def refused(name: str, **more: object) -> str:
    """The one line of both classes."""
    lines = set()
    for kind in (Model, hf.VisionFuseProcessor):
        with pytest.raises(InputError) as error:
            kind.from_pretrained(name, **more)
        lines.add(str(error.value))
    (line,) = lines
    assert "\n" not in line and line.startswith(name)
    return line


def test_refusals(server: Hub, monkeypatch: pytest.MonkeyPatch):
    assert "no such repository at http://127.0.0.1" in refused("org/none")
    assert "found no revision 'v9', expected one of org/fused" in refused("org/fused@v9")
    assert refused("org/fused@v9", revision="v8").startswith("org/fused@v9: found revision 'v8'")
    server.repositories["org/fused"].gated = True
    assert "found a gated repository, and no login" in refused("org/fused")
    server.accounts["other"] = Account(reads=False)
    assert "which this login may not read" in refused("org/fused", token="other")
    assert "no login, which token=True asks for" in refused("org/fused", token=True)
    server.faults += [("GET /api/models/org/llava", 503)] * 99
    assert "found status 503 after 6 tries" in refused("org/llava")
    offline(monkeypatch)
    assert "with HF_HUB_OFFLINE set" in refused("org/base")


def test_another_cache(server: Hub, tmp_path: Path):
    server.repositories["org/fused"].gated = True
    server.accounts["mine"] = Account()
    given = {"cache_dir": tmp_path / "mine", "token": "mine"}
    model = Model.from_pretrained("org/fused", **given)
    assert list((tmp_path / "mine").glob("models--org--fused/snapshots/*/model.safetensors"))
    assert not list(Path(constants.HF_HUB_CACHE).glob("models--*"))
    before = len(server.fetched())
    assert same(model, Model.from_pretrained("org/fused", **given, local_files_only=True))
    assert len(server.fetched()) == before
    Model.from_pretrained("org/fused", **given, force_download=True)
    assert len(server.fetched()) > before
