"""Branches of a fused folder: as the members have them, under their names."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import converters
from converters.files.reader import read_weights
from converters.formats import comm, internvl, slime
from converters.values import Values
from tests.converters.fusing import assert_merged, llm_of
from vfjax import InputError

PICTURE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def visual_tokens(folder: Path) -> np.ndarray:
    model, processor = converters.load(folder, dtype="float32")
    batch = processor([PICTURE], input_ids=[[1, -200, 5]])
    assert int((batch.visual >= 0).sum()) == sum(b.tokens for b in model.config.branches)
    return np.asarray(model.visual_tokens(batch.images).values)


def test_branches_are_read_in_the_members_order(fused: Path, family: Path):
    assert_merged(fused, family, "hf2 up3")
    own = [visual_tokens(family / name) for name in ("hf2", "up3")]
    np.testing.assert_array_equal(visual_tokens(fused), np.concatenate(own))


def test_branches_are_the_members_bytes(fused: Path, family: Path):
    found, count = read_weights(fused), 0
    for name in ("hf2", "up3"):
        source = converters.open_source(family / name)
        for part, tensors in source.parts.items():
            if part == "llm":
                continue
            for key, theirs in tensors.items():
                ours = found[f"branches.{name}.{part.split('.')[-1]}.{key}"]
                assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
                assert ours[...].tobytes() == theirs[...].tobytes(), key
                count += 1
    assert count == len([name for name in found if name.startswith("branches.")])


def test_a_fused_member_keeps_its_branches(fused: Path, family: Path, tmp_path: Path):
    """Three branches, and an LLM merged twice."""
    members = {"two": fused, "up2": family / "up2"}
    params = {"weights": [1.0, 1.0], "normalize": True}
    converters.fuse(members, tmp_path / "out", method="linear", params=params)
    model, processor = converters.load(tmp_path / "out")
    assert [b.name for b in model.config.branches] == ["two-hf2", "two-up3", "up2"]
    assert processor.template == "chatml_direct"
    own = [visual_tokens(folder) for folder in (fused, family / "up2")]
    np.testing.assert_array_equal(visual_tokens(tmp_path / "out"), np.concatenate(own))


BASE_LISTED = {
    "linear": ("models: [{b}, {{model: {a}, parameters: {{weight: 1}}}}]", "b", "up3 up2"),
    "slerp": ("parameters: {{t: 0.3}}\nmodels: [{{model: {a}}}, {{model: {c}}}]", "a", "up2 up3"),
    "task_arithmetic": ("models: [{b}, {{model: {a}}}]", "a", "up3 up2"),
    "karcher": ("models: [{{model: {c}}}]", "a", "up3 up2"),
    "ties": ("models: [{{model: {a}}}]", "a", "up2"),
    "dare_ties": ("models: [{b}]", "a", "up3"),
}
"""Method -> models, base_model, and the branches: those of all models that are merged.

Karcher reads no base, so one that is not listed is appended, as in mergekit.
"""


@pytest.mark.parametrize("method", BASE_LISTED)
def test_all_listed_models_keep_their_branches(family: Path, tmp_path: Path, method: str):
    """The base of a recipe is a member too where it is listed; alone, it is copied."""
    models, base, branches = BASE_LISTED[method]
    one = f"{{model: {family / 'up3'}, parameters: {{weight: 0.5}}}}"
    paths = {"a": family / "up2", "b": one, "c": family / "up3"}
    recipe = tmp_path / "recipe.yml"
    home = {"a": "up2", "b": "up3"}[base]
    recipe.write_text(
        f"merge_method: {method}\nbase_model: {family / home}\n{models.format(**paths)}\n"
    )
    converters.fuse({}, tmp_path / "out", recipe=recipe)
    model, _ = converters.load(tmp_path / "out")
    assert [branch.name for branch in model.config.branches] == branches.split()
    own = [visual_tokens(family / name) for name in branches.split()]
    np.testing.assert_array_equal(visual_tokens(tmp_path / "out"), np.concatenate(own))
    found = llm_of(tmp_path / "out")["model.embed_tokens.weight"]
    for name in ("up2", "up3"):
        copied = (found == llm_of(family / name)["model.embed_tokens.weight"]).all()
        assert copied == (method == "ties" and name == "up2")


@pytest.mark.parametrize("read", [comm.read, internvl.read, slime.read])
def test_several_groups_for_a_connector_of_one(read: Callable[[Values], object]):
    """Of a config.json written by hand: none is left out."""
    keys = {"din": 16, "dout": 8, "factor": 2, "drop": 1, "merge": "mean"}
    given = Values({**keys, "groups": [[-2], [-1]]}, "connector")
    with pytest.raises(InputError, match=r"groups: found \[\[-2\], \[-1\]\], expected one list"):
        read(given)
