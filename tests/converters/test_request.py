"""What may be asked of a fusion."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import converters
from tests.converters.fusing import assert_merged, llm_of, named, refused
from vfjax import InputError


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"base": None}, "model.embed_tokens.weight: found no base, expected one"),
        ({"method": "tise"}, "method: found 'tise', expected "),
        ({"params": {"weights": [1.0]}}, "params.weights: found [1.0], expected 2 values"),
        ({"params": {"wieghts": [1.0]}}, "params: found 'wieghts', expected parameters of"),
        (
            {"export": "gguf"},
            "export: found 'gguf', expected 'model' or 'whole' or 'llm'; choose one",
        ),
        ({"template": "vicuna"}, "template: found 'vicuna', expected one of "),
        ({"dtype": "int8"}, "dtype: found int8, expected bfloat16, float16, float32; choose one"),
        ({"members": {}}, "members: found none, expected names of letters"),
        ({"members": {"base": Path()}}, "members: found the name 'base', expected names of"),
        (
            {"members": {"a": "A"}},
            "members: found one, 'A', expected two or more to fuse; name the others behind a "
            "comma, ('A', 'path/to/another');",
        ),
        ({"members": ["A", "B"]}, "members: found list, expected names -> folders; write {'a'"),
        ({"densty": 0.5}, "options: found densty, expected base, method, params, rules, recipe, "),
        ({"members": {"a.b": Path()}}, "members: found the name 'a.b', expected names of letters"),
    ],
)
def test_wrong_arguments(family: Path, tmp_path: Path, more: dict[str, Any], line: str):
    arguments = {"members": named(family, "up2 up3"), "base": family / "base", **more}
    assert refused(tmp_path, arguments.pop("members"), **arguments).startswith(line)


def test_weights_are_even_by_default(family: Path, tmp_path: Path):
    """In files, and for a fusion of which none are written."""
    members, base = named(family, "up1 up2"), family / "base"
    converters.fuse(members, tmp_path / "out", base=base, export="llm")
    assert_merged(tmp_path / "out", family, "up1 up2")
    model, _ = converters.load_fused(members, base=base)
    found = llm_of(tmp_path / "out")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(model.llm.embedding[...], found)


def test_a_misspelt_option_of_a_dry_run(family: Path, tmp_path: Path):
    with pytest.raises(InputError, match="^options: found densty, expected base, method"):
        converters.dry_run(named(family, "up2 up3"), tmp_path / "out", densty=0.5)
