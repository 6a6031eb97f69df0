"""MODELS.md: what each published model is made of, and what fusions of them are."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from converters.fuse import _describe
from converters.layouts import Source, open_source
from converters.load import model_config
from converters.tables import find
from converters.towers import read_tower
from tests.converters.test_published import (
    CONVNEXT,
    LLMS,
    MLLMS,
    TOWERS,
    component,
    model_folder,
    shapes,
    specs,
    tower_folder,
)
from vfjax.merge import check_family

MODELS = Path(__file__).resolve().parents[2] / "MODELS.md"

FUSIONS = {
    "MGM-8B + SliME-Llama3-8B": "Meta-Llama-3-8B",
    "MGM-8B-HD + SliME-Llama3-8B": "Meta-Llama-3-8B",
    "MGM-7B + SliME-vicuna-7B + llava-v1.5-7b": "vicuna-7b-v1.5",
}
"""Members -> the LLM that all were fine-tuned from."""

__all__ = ["specs"]


def plain(config: Mapping[str, Any]) -> str:
    """`model_type` of a vision tower, the same for a whole CLIP and for its half."""
    return config["model_type"].removesuffix("_vision_model")


def tower_row(name: str, path: Path) -> str:
    """A line of the towers' table."""
    tower = read_tower(path, "open_clip_config.json" if name == CONVNEXT else "config.json")
    params = component(find(tower.config, name).config(tower.config))
    return (
        f"| {name} | {plain(tower.config)} | {sum(math.prod(p.shape) for p in params.values()):,} |"
    )


def row(name: str, source: Source) -> str:
    """A line of the table, from configs and shapes alone."""
    branches = model_config(source).branches
    params = {path: math.prod(p.shape) for path, p in shapes(source).items()}
    total = sum(params.values())
    llm = sum(n for path, n in params.items() if path.startswith("llm/"))
    kinds = " + ".join(
        " and ".join(plain(b[kind]) for kind in ("encoder", "aux") if kind in b)
        for b in source.branches
    )
    tokens = " + ".join(str(b.views.most()) for b in branches)
    if len(branches) > 1:
        tokens += f" = {sum(b.views.most() for b in branches)}"
    cells = [name, kinds or "-", source.llm["model_type"], f"{total:,}", f"{llm:,}"]
    return f"| {' | '.join([*cells, f'{2 * total / 1e9:.1f}', tokens or '-'])} |"


@pytest.fixture(scope="module")
def folder(specs: Mapping[str, Any], tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models")
    for name in (*LLMS, *MLLMS):
        model_folder(path, name, specs)
    return path


def test_members(folder: Path):
    lines = MODELS.read_text().splitlines()
    rows = [row(name, open_source(folder / name)) for name in (*LLMS, *MLLMS)]
    assert [line for line in rows if line not in lines] == []


def test_towers(specs: Mapping[str, Any], tmp_path: Path):
    lines = MODELS.read_text().splitlines()
    for name in TOWERS:
        tower_folder(tmp_path / name, specs[name])
        assert tower_row(name, tmp_path / name) in lines


@pytest.mark.parametrize("name", FUSIONS)
def test_fusions(folder: Path, name: str):
    """Members and base are of one family; branches side by side, one LLM."""
    members = name.split(" + ")
    opened = {member.replace(".", "_"): open_source(folder / member) for member in members}
    base = open_source(folder / FUSIONS[name])
    check_family({"base": base.llm, **{member: s.llm for member, s in opened.items()}})
    result = _describe({"base": base, **opened}, folder / "fused", None)
    assert row(name, result) in MODELS.read_text().splitlines()
    own = [sum(math.prod(p.shape) for p in shapes(s).values()) for s in opened.values()]
    llm = sum(math.prod(p.shape) for p in shapes(base).values())
    fused = sum(math.prod(p.shape) for p in shapes(result).values())
    assert fused == sum(own) - (len(own) - 1) * llm
