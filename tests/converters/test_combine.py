"""Fusions that are loaded with nothing written between."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx

import converters
from tests.converters.fusing import WEIGHTS, named
from vfjax import InputError
from vfjax.sharding import make_mesh


@pytest.mark.parametrize(
    ("mode", "more", "line"),
    [
        (
            "tokens",
            {"densty": 0.5},
            "options: found densty, expected mode, base, method, params, rules, recipe, template",
        ),
        ("tokens", {"export": "llm"}, "options: found export, expected mode, base, method"),
        ("tokens", {"account": False}, "options: found account, expected mode, base, method"),
        ("cache", {"positions": "parallel"}, "options of mode 'cache': found positions, expected"),
        ("cache", {"mask": "block"}, "options of mode 'cache': found mask, expected base, method"),
        (
            "logits",
            {"method": "ties"},
            "options of mode 'logits': found method, expected base, dtype",
        ),
        (
            "logits",
            {"positions": "parallel"},
            "options of mode 'logits': found positions, expected",
        ),
        ("logits", {"members": {"a": "A"}}, "members: found one, 'A', expected two or more"),
        ("tokens", {"members": {"a": "A"}}, "members: found one, 'A', expected two or more"),
    ],
)
def test_options_that_a_mode_does_not_use(family: Path, mode: str, more: dict[str, Any], line: str):
    arguments = {"members": named(family, "up2 up3"), "base": family / "base", **more}
    with pytest.raises(InputError) as error:
        converters.load_fused(arguments.pop("members"), mode=mode, **arguments)
    assert str(error.value).startswith(line)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_fusion_loads_without_a_folder_between(family: Path, fused: Path, sharded: bool):
    """Onto 8 devices too: the parameters are those of the folder that `fuse` writes."""
    mesh = make_mesh(data=2, model=4) if sharded else None
    params = {"weights": WEIGHTS["task_arithmetic"]}
    members = named(family, "hf2 up3")
    model, processor = converters.load_fused(
        members, base=family / "base", params=params, mesh=mesh
    )
    expected, _ = converters.load(fused, mesh=mesh)
    found, wanted = (dict(nnx.to_flat_state(nnx.state(x))) for x in (model, expected))
    assert found.keys() == wanted.keys() and len(found) > 20
    for name, value in wanted.items():
        assert found[name].sharding == value.sharding
        np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(value))
    assert processor.tokenizer is None or processor.chat("What?")
