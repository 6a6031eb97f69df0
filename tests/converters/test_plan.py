"""The merged LLM's config: its dtype and layers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import converters
from converters.mergekit import layer_lists
from tests import checkpoints
from tests.checkpoints import (
    llama_folder,
    make_llama,
    tuned,
    upstream_llava_folder,
    write_json,
)
from tests.converters.fusing import PLAIN, llm_of, named
from vfjax import InputError
from vfjax.atomic import read_json


def test_dtype_of_the_merged_llm(family: Path, tmp_path: Path):
    converters.fuse(
        named(family, "up2 hf2"),
        tmp_path / "out",
        base=family / "base",
        params={"weights": [0.5, 0.5]},
        dtype="float32",
        export="llm",
    )
    assert {x.dtype.name for x in llm_of(tmp_path / "out").values()} == {"float32"}
    config = read_json(tmp_path / "out" / "config.json")
    assert {config[key] for key in ("dtype", "torch_dtype") if key in config} == {"float32"}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float32


@pytest.mark.parametrize("more", [{}, {"method": "linear"}, {"rules": (("mlp", {"take": "b"}),)}])
def test_the_dtype_is_the_bases(family: Path, tmp_path: Path, more: dict[str, Any]):
    """Of all tensors, whoever they are from."""
    for seed, name in enumerate("ab", 1):
        llm = tuned(make_llama(0), seed).half()
        upstream_llava_folder(tmp_path / name, seed, llm=llm, weights="safetensors")
    members = named(tmp_path, "a b")
    converters.fuse(members, tmp_path / "out", base=family / "base", **{**PLAIN, **more})
    assert {x.dtype.name for x in llm_of(tmp_path / "out").values()} == {"bfloat16"}
    assert read_json(tmp_path / "out" / "config.json")["dtype"] == "bfloat16"


def test_a_config_that_leaves_the_number_of_layers_to_its_class(tmp_path: Path):
    base = make_llama(0, num_hidden_layers=32)
    llama_folder(tmp_path / "base", llm=base)
    for seed, name in enumerate("ab", 1):
        upstream_llava_folder(tmp_path / name, seed, llm=tuned(base, seed), weights="safetensors")
        config = read_json(tmp_path / name / "config.json")
        write_json(tmp_path / name / "config.json", without(config, "num_hidden_layers"))
    converters.fuse(named(tmp_path, "a b"), tmp_path / "out", base=tmp_path / "base", **PLAIN)
    assert converters.load(tmp_path / "out")[0].config.llm.layers == 32


def without(config: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != key}


def test_layers_from_two_models(family: Path, tmp_path: Path):
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(f"""
merge_method: passthrough
slices:
  - sources: [{{model: {family / "up2"}, layer_range: [0, 2]}}]
  - sources: [{{model: {family / "up3"}, layer_range: [1, 2]}}]
""")
    converters.fuse({}, tmp_path / "out", recipe=recipe, export="llm")
    found, three = llm_of(tmp_path / "out"), llm_of(family / "up3")
    assert read_json(tmp_path / "out/config.json")["num_hidden_layers"] == 3
    name = "model.layers.{}.mlp.up_proj.weight"
    np.testing.assert_array_equal(found[name.format(2)], three[name.format(1)])
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_layer_types_follow_the_layers(tmp_path: Path):
    """Of a folder of transformers 5, which refuses a list of another length."""
    config = transformers.Qwen3Config(
        **{**checkpoints.LLAMA, "num_hidden_layers": 4}, head_dim=8, tie_word_embeddings=False
    )
    for seed, name in enumerate("ab"):
        model = checkpoints.randomize(transformers.Qwen3ForCausalLM(config), seed)
        model.save_pretrained(tmp_path / name)
    recipe = tmp_path / "recipe.yml"
    piece = "  - sources: [{{model: {}, layer_range: {}}}]\n"
    pieces = [(tmp_path / "a", [0, 3]), (tmp_path / "b", [1, 4])]
    recipe.write_text(
        "merge_method: passthrough\nslices:\n" + "".join(piece.format(*x) for x in pieces)
    )
    converters.fuse({}, tmp_path / "out", recipe=recipe, export="llm")
    assert read_json(tmp_path / "out/config.json")["layer_types"] == ["full_attention"] * 6
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report.values()) and len(model.model.layers) == 6
    origins = [{"a": 1}, {"a": 0, "b": 1}, {"b": 1}]
    types = {"a": {"layer_types": ["x", "y"]}, "b": {"layer_types": ["y", "x"]}}
    assert layer_lists(types, origins) == {"layer_types": ["y", "x", "x"]}
    with pytest.raises(InputError, match="recipe: layer 0: layer_types: found x of a, y of b"):
        layer_lists(types, [{"a": 0, "b": 0}])


@pytest.mark.parametrize(
    ("method", "base", "members", "dtype"),
    [
        ("linear", None, "half full", "float32"),
        ("linear", None, "full half", "float32"),
        ("task_arithmetic", "half", "full", "float32"),
        ("task_arithmetic", "full", "half", "float32"),
        ("slerp", "half", "half full", "float32"),
        ("slerp", "half", "half other", "bfloat16"),
    ],
)
def test_dtype_of_a_recipe_without_one(
    family: Path, tmp_path: Path, method: str, base: str | None, members: str, dtype: str
):
    """What holds all, as mergekit 0.1.5 has it, in config.json too."""
    llama_folder(tmp_path / "full", llm=tuned(make_llama(0), 3).float())
    paths = {"half": family / "base", "other": family / "up2", "full": tmp_path / "full"}
    config: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": str(paths[x])} for x in members.split()],
        "parameters": {"weight": 1, "t": 0.5},
    }
    if base:
        config["base_model"] = str(paths[base])
    write_json(tmp_path / "recipe.yml", config)
    with pytest.warns(UserWarning, match="the method does not read parameters"):
        converters.fuse({}, tmp_path / "out", recipe=tmp_path / "recipe.yml", export="llm")
    assert {x.dtype.name for x in llm_of(tmp_path / "out").values()} == {dtype}
    assert read_json(tmp_path / "out" / "config.json")["dtype"] == dtype
    assert '"unread": [' in (tmp_path / "out" / "MERGE.md").read_text()
