"""The plug-in of vLLM, by its documented interface; vLLM itself has no build without a GPU here."""

import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType

import pytest
from transformers import AutoConfig

from converters.vllm import ARCHITECTURES, BACKEND

ROOT = Path(__file__).resolve().parents[2]


class Registry:
    """What vLLM's documentation says of `ModelRegistry`."""

    def __init__(self) -> None:
        self.models: dict[str, str] = {}

    def get_supported_archs(self) -> set[str]:
        return set(self.models)

    def register_model(self, model_arch: str, model_cls: str) -> None:
        assert model_arch not in self.models
        self.models[model_arch] = model_cls


def test_the_plugin_registers_once(monkeypatch: pytest.MonkeyPatch):
    """Loaded as vLLM loads it, and called twice, as vLLM may."""
    module, registry = ModuleType("vllm"), Registry()
    module.ModelRegistry = registry  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    group = "vllm.general_plugins"
    (given,) = project["entry-points"][group].items()
    register = EntryPoint(*given, group).load()
    register()
    register()
    assert registry.models == dict.fromkeys(ARCHITECTURES, BACKEND)
    assert AutoConfig.for_model("visionfuse").model_type == "visionfuse"
