"""Tables: one rule a parameter, one tensor a rule, both ways."""

from collections import Counter

import numpy as np
import pytest

from converters.params.table import CONV, TRANSPOSE, Rule, Table, dense, rename
from converters.registry import TABLES, find
from converters.source import LAYOUTS
from vfjax import InputError

TABLE = Table(
    types=("toy",),
    read=dict,
    rules=(
        Rule("embed", "embedding"),
        *dense("layers.{}.out", "blocks/{}/out"),
        *(Rule("qkv", f"{name}/kernel", TRANSPOSE, part=(i, 3)) for i, name in enumerate("qkv")),
        Rule("head", "head/kernel", TRANSPOSE, optional=True),
    ),
    unused={},
    ignore=(r"layers\.\d+\.inv_freq",),
)
SHAPES = {
    "embedding": (8, 4),
    "blocks/0/out/kernel": (4, 6),
    "blocks/0/out/bias": (6,),
    "blocks/11/out/kernel": (4, 6),
    "blocks/11/out/bias": (6,),
    **{f"{name}/kernel": (4, 2) for name in "qkv"},
}


def tensors(**more: tuple[int, ...]) -> dict[str, np.ndarray]:
    shapes = {"embed": (8, 4), "qkv": (6, 4)}
    for i in (0, 11):
        shapes |= {f"layers.{i}.out.weight": (6, 4), f"layers.{i}.out.bias": (6,)}
    return {name: np.zeros(shape, np.float32) for name, shape in (shapes | more).items()}


@pytest.mark.parametrize(
    ("perm", "shape"), [(None, (3, 5)), (TRANSPOSE, (3, 5)), (CONV, (2, 3, 5, 7))]
)
def test_a_parameter_in_the_checkpoint(perm: tuple[int, ...] | None, shape: tuple[int, ...]):
    rule, array = Rule("a", "b", perm), np.arange(np.prod(shape)).reshape(shape)
    param = array.transpose(perm) if perm else array
    assert rule.source_shape(param.shape) == shape
    np.testing.assert_array_equal(rule.to_source(param), array)


def test_layouts_of_torch():
    assert Rule("a", "b", TRANSPOSE).source_shape((4, 6)) == (6, 4)
    assert Rule("a", "b", CONV).source_shape((7, 8, 3, 32)) == (32, 3, 7, 8)


def test_parts_of_one_tensor():
    rules = TABLE.check(SHAPES, tensors(), "x")
    for i, name in enumerate("qkv"):
        assert rules[f"{name}/kernel"].part == (i, 3)
        assert rules[f"{name}/kernel"].source_shape((4, 2)) == (6, 4)


def test_a_stack_of_tensors():
    rule = Rule("layers.{}.experts.{}", "blocks/{}/w", TRANSPOSE, stack=True)
    shape = (12, 4, 6)
    (rule,) = (
        Table(types=("x",), read=dict, rules=(rule,), unused={})
        .match({"blocks/7/w": shape})
        .values()
    )
    rows = rule.each(shape)
    assert [row.source for row in rows] == [f"layers.7.experts.{i}" for i in range(12)]
    assert [row.row for row in rows] == list(range(12))
    assert all(row.source_shape(shape) == (6, 4) for row in rows)


def test_numbers_of_layers_are_filled_in():
    rules = TABLE.match(SHAPES)
    assert rules.keys() == SHAPES.keys()
    assert rules["blocks/11/out/kernel"].source == "layers.11.out.weight"


@pytest.mark.parametrize("more", [{}, {"layers.0.inv_freq": (2,)}, {"head": (9, 9)}])
def test_tensors_that_fit(more: dict[str, tuple[int, ...]]):
    assert TABLE.check(SHAPES, tensors(**more), "x").keys() == SHAPES.keys()


@pytest.mark.parametrize(
    ("edit", "line"),
    [
        (
            lambda t: t.pop("layers.11.out.bias"),
            "x: layers.11.out.bias: found 1 tensor missing, 0 unknown, expected each parameter's "
            "tensor and no other; check that config.json belongs to these weights",
        ),
        (
            lambda t: t.update({"layers.2.out.bias": t["embed"], "b": t["embed"]}),
            "x: b: found 0 tensors missing, 2 unknown, expected each",
        ),
        (
            lambda t: t.update(embed=np.zeros((8, 5), np.float32)),
            "x: embed: found shape (8, 5), expected (8, 4) by the config; check",
        ),
        (
            lambda t: t.update(qkv=np.zeros((4, 2), np.float32)),
            "x: qkv: found shape (4, 2), expected (6, 4) by the config; check",
        ),
        (
            lambda t: t.update(embed=t["embed"].astype(np.int8)),
            "x: embed: found dtype int8, expected bfloat16, float16, float32; convert",
        ),
        (lambda t: t.update(embed=t["embed"].astype(np.float64)), "x: embed: found dtype float64"),
    ],
)
def test_tensors_that_do_not_fit(edit, line: str):
    edit(found := tensors())
    with pytest.raises(InputError) as error:
        TABLE.check(SHAPES, found, "x")
    assert str(error.value).startswith(line)


def test_the_first_prefix_that_fits():
    pairs = (("vision_model.", ""), ("v", "w"))
    assert rename(["vision_model.a", "vb", "c"], pairs) == {
        "vision_model.a": ("a", pairs[0]),
        "vb": ("wb", pairs[1]),
    }


@pytest.mark.parametrize("kind", TABLES)
def test_no_table_names_anything_twice(kind: str):
    rules = TABLES[kind].rules
    assert max(Counter(rule.path for rule in rules).values()) == 1
    assert max(Counter((rule.source, rule.part) for rule in rules).values()) == 1
    for rule in rules:
        assert rule.source.count("{}") == rule.path.count("{}") + rule.stack
        assert not TABLES[kind].ignores(rule.source) or rule.optional


def test_an_unknown_component():
    with pytest.raises(InputError, match=r"^x: found model_type 'beit', expected .*clip, "):
        find({"model_type": "beit"}, "x")


def test_layouts_have_names_of_their_own():
    assert max(Counter(layout.name for layout in LAYOUTS).values()) == 1
    for kind in ("llava", "llava_llama", "mgm", "llama", "gemma"):
        config = {"model_type": kind}
        assert sum(layout.matches(config) for layout in LAYOUTS) == 1
