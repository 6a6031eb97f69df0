"""Which models are merged whole, and which are not: what differs is named."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import converters
from converters.alike import LLM, PROJECTOR, TOWER, module
from tests.checkpoints import hf_llava_folder, write_json
from vfjax import InputError
from vfjax.atomic import read_json


@pytest.fixture(scope="module")
def member(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("member") / "a"
    hf_llava_folder(path, 1)
    return path


def edited(file: str, change: Mapping[str, Any]) -> Callable[[Path], None]:
    """What changes keys of a JSON file in a folder."""

    def edit(folder: Path) -> None:
        write_json(folder / file, read_json(folder / file) | change)

    return edit


def vision(**change: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = read_json(folder / "config.json")
        write_json(
            folder / "config.json", config | {"vision_config": config["vision_config"] | change}
        )

    return edit


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (
            edited("config.json", {"vision_feature_layer": -1}),
            {},
            "member 'b': branches[0].architecture.",
        ),
        (vision(layer_norm_eps=0.1), {}, "eps: found 0.1"),
        (
            edited("preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5]}),
            {},
            "images.mean",
        ),
        (
            lambda path: (path / "chat_template.jinja").write_text("{{ 1 }}"),
            {},
            "member 'b': template",
        ),
        (None, {"positions": "parallel"}, "positions: found 'parallel'"),
        (None, {"rules": (("visual", {"take": "a"}),)}, "rules: found 'visual'"),
        (
            None,
            {"rules": (("mlp", {"take": "nobody"}),)},
            "rules[0].take",
        ),
    ],
)
def test_refused(member: Path, tmp_path: Path, change: Any, options: dict, message: str):
    """What is ill-defined is named in one line."""
    shutil.copytree(member, tmp_path / "b")
    if change is not None:
        change(tmp_path / "b")
    members = {"a": member, "b": tmp_path / "b"}
    given: dict[str, Any] = {"method": "linear", "export": "whole"} | options
    with pytest.raises(InputError) as error:
        converters.dry_run(members, tmp_path / "out", **given)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("file", ["preprocessor_config.json", "chat_template.jinja"])
def test_the_base_may_be_asked_otherwise(member: Path, tmp_path: Path, file: str):
    """Its pictures and prompts are none of the result's; a named template settles members'."""
    for name in ("base", "b"):
        shutil.copytree(member, tmp_path / name)
    if file.endswith(".json"):
        edited(file, {"image_mean": [0.5, 0.5, 0.5]})(tmp_path / "base")
    else:
        (tmp_path / "base" / file).write_text("{{ 1 }}")
    members = {"a": member, "b": tmp_path / "b"}
    options: dict[str, Any] = {"base": tmp_path / "base", "export": "whole"}
    found = converters.dry_run(members, tmp_path / "out", **options)
    assert found["methods"] == {"task_arithmetic": found["tensors"]}
    (tmp_path / "b" / "chat_template.jinja").write_text("{{ 2 }}")
    with pytest.raises(InputError, match="set template to 'vicuna_v1'"):
        converters.dry_run(members, tmp_path / "out", **options)
    converters.dry_run(members, tmp_path / "out", template="vicuna_v1", **options)


def test_modules_have_the_names_of_mergekit():
    """Of Qwen's towers the merger is in the projector."""
    block, merger = "visual.blocks.0.attn.qkv.weight", "model.visual.merger.mlp.0.weight"
    deep = "model.visual.deepstack_merger_list.0.norm.weight"
    parts = [f"branches.x.{kind}" for kind in ("encoder", "aux", "connector")]
    assert [module(part) for part in parts] == [TOWER, TOWER, PROJECTOR]
    assert module("llm") == LLM and module(parts[0], block) == TOWER
    assert module(parts[0], merger) == module(parts[0], deep) == PROJECTOR
