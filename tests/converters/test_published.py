"""Every published model of `specs/tensors`: names and shapes at full size; rows of MODELS.md."""

import functools
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from converters import open_source
from converters.branches import joined
from converters.export import targets
from converters.load import Params, abstract, check, model_config
from converters.params.table import restored
from converters.positions import shared_llm
from converters.registry import find
from converters.source import Source
from converters.towers import Tower, read_tower
from tests.checkpoints import header_file, write_json
from vfjax.merge import check_family

LLMS = [
    "Llama-2-13b-hf",
    "Meta-Llama-3-70B",
    "Meta-Llama-3-8B",
    "Mistral-7B-Instruct-v0.2",
    "Qwen2-7B",
    "Qwen2.5-7B",
    "Qwen3-8B",
    "Yi-34B",
    "gemma-2b",
    "phi-2",
    "vicuna-7b-v1.5",
]
MLLMS = [
    "DenseConnector-CLIP-dci-7B",
    "DenseConnector-CLIP-sci-7B",
    "DenseConnector-CLIP-sti-7B",
    "DenseConnector-v1.5-13B",
    "DenseConnector-v1.5-7B",
    "DenseConnector-v1.5-8B",
    "DenseConnector-v1.5-SigLIP-7B-AnyRes",
    "MGM-13B",
    "MGM-13B-HD",
    "MGM-2B",
    "MGM-34B",
    "MGM-34B-HD",
    "MGM-7B",
    "MGM-7B-HD",
    "MGM-8B",
    "MGM-8B-HD",
    "SliME-Llama3-8B",
    "SliME-vicuna-13B",
    "SliME-vicuna-7B",
    "llava-1.5-7b-hf.hub",
    "llava-1.5-7b-hf.tf4-late-memory",
    "llava-1.5-7b-hf.tf5-memory",
    "llava-1.5-7b-hf.tf5-save",
    "llava-v1.5-13b",
    "llava-v1.5-7b",
    "llava-v1.6-34b",
    "llava-v1.6-mistral-7b",
    "llava-v1.6-vicuna-13b",
    "llava-v1.6-vicuna-7b",
]
CONVNEXT = "CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup"
TOWERS = [
    CONVNEXT,
    "clip-vit-large-patch14-336",
    "dino-vitb16",
    "dinov2-large",
    "dinov2-with-registers-large",
    "dinov3-vitl16-pretrain-lvd1689m",
    "siglip-so400m-patch14-384",
    "siglip2-so400m-patch14-384",
]

IGNORABLE = re.compile(
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
    r"|(vision|text)_model\.embeddings\.position_ids|text_model\..*|vision_model\.head\..*"
    r"|(text|visual)_projection\.weight|logit_(scale|bias)"
    r"|(?!visual\.trunk\.)(visual|transformer)\..*|visual\.trunk\.head\..*"
    r"|(token_embedding|ln_final)\..*|positional_embedding|text_projection"
    r"|model\.mm_projector\.(w_noise|mean|std)"
)
"""Buffers, halves of towers that read text, heads, and what only training reads."""

UNREAD = {
    "dense-connector": ("", r"model\.vision_tower\..*"),
    "slime": ("", r"model\.vision_tower\..*"),
    "mgm": ("vision_tower", r"model\.vision_tower_aux\..*"),
}
"""Layout -> a tower's folder and names in the checkpoint, of which its authors read the other copy.
"""

IMAGES = {
    "clip_vision_model": {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 336},
        "crop_size": {"height": 336, "width": 336},
    },
    "siglip_vision_model": {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": 384, "width": 384},
    },
}

MODELS = Path(__file__).resolve().parents[2] / "MODELS.md"

FUSIONS = {
    "MGM-8B + SliME-Llama3-8B": "Meta-Llama-3-8B",
    "MGM-8B-HD + SliME-Llama3-8B": "Meta-Llama-3-8B",
    "MGM-7B + SliME-vicuna-7B + llava-v1.5-7b": "vicuna-7b-v1.5",
}
"""Members -> the LLM that all were fine-tuned from."""

Names = Mapping[str, tuple[str, list[int]]]


@pytest.fixture(scope="module")
def specs(shared: Path) -> dict[str, dict[str, Any]]:
    files = (shared / "specs" / "tensors").glob("*.json")
    return {file.stem: json.loads(file.read_text()) for file in files}


def test_every_published_model_is_listed(specs: Mapping[str, Any]):
    assert sorted(specs) == sorted([*LLMS, *MLLMS, *TOWERS])


def tower_folder(path: Path, spec: Mapping[str, Any]) -> None:
    """A tower's repository."""
    path.mkdir(parents=True)
    if "vision_cfg" in spec["config"]:
        write_json(path / "open_clip_config.json", {"model_cfg": spec["config"]})
        header_file(path / "open_clip_model.safetensors", spec["files"]["model"])
        return
    siglip = spec["config"]["model_type"] == "siglip"
    images = IMAGES["siglip_vision_model" if siglip else "clip_vision_model"]
    write_json(path / "config.json", spec["config"])
    write_json(path / "preprocessor_config.json", images)
    header_file(path / "model.safetensors", spec["files"]["model"])


def model_folder(path: Path, name: str, specs: Mapping[str, Any]) -> dict[str, Names]:
    """A model's repository with its towers; folder -> the tensors in there."""
    spec, path = specs[name], path / name
    files = {"": {**spec["files"]["model"], **spec.get("optional_tensors", {}).get("model", {})}}
    path.mkdir()
    write_json(path / "config.json", spec["config"])
    header_file(path / "model.safetensors", files[""])
    if "vision_config" in spec["config"]:
        write_json(path / "preprocessor_config.json", IMAGES["clip_vision_model"])
    for slot in ("vision_tower", "vision_tower_aux"):
        if slot in spec["files"]:
            named = spec["config"][f"mm_{slot}"].split("/")[-1]
            tower = specs[CONVNEXT if slot == "vision_tower_aux" else named]
            assert tower["files"]["model"] == spec["files"][slot]
            tower_folder(path / slot, tower)
            files[slot] = spec["files"][slot]
    return files


@functools.cache
def component(config: Any) -> Params:
    return abstract(config.build)[1]


def shapes(source: Source) -> Params:
    """Parameters of a model, put together from its components, most of which are shared."""
    config = model_config(source)
    parts = {"llm": config.llm}
    for branch in config.branches:
        own = {**branch.architecture.encoders, "connector": branch.architecture.connector}
        parts |= {f"branches/{branch.name}/{kind}": part for kind, part in own.items()}
    return {f"{part}/{n}": p for part, own in parts.items() for n, p in component(own).items()}


def count(names: Mapping[str, tuple[str, list[int]]]) -> int:
    return sum(math.prod(shape) for _, shape in names.values())


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
        " and ".join(plain(part) for part in b.encoders.values()) for b in source.branches
    )
    tokens = " + ".join(str(b.tokens) for b in branches)
    if len(branches) > 1:
        tokens += f" = {sum(b.tokens for b in branches)}"
    cells = [name, kinds or "-", source.llm["model_type"], f"{total:,}", f"{llm:,}"]
    return f"| {' | '.join([*cells, f'{2 * total / 1e9:.1f}', tokens or '-'])} |"


@pytest.mark.parametrize("name", [*LLMS, *MLLMS])
def test_model(specs: Mapping[str, Any], tmp_path: Path, name: str):
    files = model_folder(tmp_path, name, specs)
    assert {folder or "model": count(names) for folder, names in files.items()} == {
        **specs[name]["params"],
        "model": specs[name]["params"]["model"]
        + count(specs[name].get("optional_tensors", {}).get("model", {})),
    }
    source = open_source(tmp_path / name)
    params = shapes(source)
    check(source, params)  # every parameter has its tensor, every tensor is known

    expected = {
        folder: {n: shape for n, (_, shape) in names.items() if not IGNORABLE.fullmatch(n)}
        for folder, names in files.items()
    }
    unread, pattern = UNREAD.get(source.layout, ("", ""))
    expected[""] = {n: s for n, s in expected[""].items() if not re.fullmatch(pattern, n)}
    if unread or source.tuned:
        expected.pop(unread or "vision_tower")
    if name.startswith("MGM") and "vision_tower_aux" in expected:
        trunk = {n: s for n, s in expected["vision_tower_aux"].items() if "trunk" in n}
        expected["vision_tower_aux"] = trunk
    written: dict[str, dict[str, list[int]]] = {folder: {} for folder in expected}
    for path, (rule, prefixes, folder) in targets(source, params).items():
        for one in rule.each(params[path].shape):
            name_there = restored(one.source, prefixes)
            written[folder][name_there] = list(one.source_shape(params[path].shape))
    assert written == expected
    assert sum(math.prod(p.shape) for p in params.values()) == sum(
        math.prod(shape) for names in expected.values() for shape in names.values()
    )
    assert row(name, source) in MODELS.read_text().splitlines()


@pytest.mark.parametrize("name", TOWERS)
def test_tower(specs: Mapping[str, Any], tmp_path: Path, name: str):
    tower_folder(tmp_path / "tower", specs[name])
    file = "open_clip_config.json" if name == CONVNEXT else "config.json"
    tower: Tower = read_tower(tmp_path / "tower", file)
    table = find(tower.config, name)
    params = component(table.config(tower.config))
    table.check({n: p.shape for n, p in params.items()}, tower.tensors, name)
    names = specs[name]["files"]["model"]
    kept = {n: x for n, x in names.items() if not IGNORABLE.fullmatch(n)}
    assert count(names) == specs[name]["params"]["model"]
    assert sum(math.prod(p.shape) for p in params.values()) == count(kept)
    assert tower_row(name, tmp_path / "tower") in MODELS.read_text().splitlines()


@pytest.mark.parametrize("name", FUSIONS)
def test_fusion(specs: Mapping[str, Any], tmp_path: Path, name: str):
    """Members and base are of one family; branches side by side, one LLM."""
    for model in (*name.split(" + "), FUSIONS[name]):
        model_folder(tmp_path, model, specs)
    members = name.split(" + ")
    opened = {member.replace(".", "_"): open_source(tmp_path / member) for member in members}
    base = open_source(tmp_path / FUSIONS[name])
    check_family({"base": base.llm, **{member: s.llm for member, s in opened.items()}})
    everyone = {"base": base, **opened}
    llm = shared_llm(everyone, list(opened))
    result = joined(everyone, list(opened), tmp_path / "fused", None, llm)
    assert row(name, result) in MODELS.read_text().splitlines()
    own = [sum(math.prod(p.shape) for p in shapes(s).values()) for s in opened.values()]
    shared = sum(math.prod(p.shape) for p in shapes(base).values())
    fused = sum(math.prod(p.shape) for p in shapes(result).values())
    assert fused == sum(own) - (len(own) - 1) * shared
