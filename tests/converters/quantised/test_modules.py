import numpy as np
import pytest

from converters.quantised.modules import Module, aliases, grouped, named, refuse_left_out
from vfjax import InputError

FP = np.zeros((2, 2), np.float32)


def test_grouped():
    """A weight alone is a module's only if its dtype is none of a plain one."""
    tensors = {
        "a.weight": FP,
        "b.weight": FP.astype(np.int8),
        "c.weight": FP,
        "c.scale": FP,
        "d": FP,
    }
    modules, rest = grouped(tensors, ("weight", "scale"))
    assert {x.name: set(x.tensors) for x in modules} == {"b": {"weight"}, "c": {"weight", "scale"}}
    assert set(rest) == {"a.weight", "d"}


@pytest.mark.parametrize(
    ("pattern", "fits"),
    [
        ("model.layers.1", "model.layers.1.mlp"),
        ("mlp", "model.layers.11.mlp"),
        (r"model.layers.\d+", "model.layers.1.mlp model.layers.11.mlp model.layers.1.mlp_x"),
        ("layers", ""),
    ],
)
def test_named(pattern: str, fits: str):
    names = ["model.layers.1.mlp", "model.layers.11.mlp", "model.layers.1.mlp_x"]
    if pattern == "model.layers.1":
        fits += " model.layers.1.mlp_x"
    if pattern == "mlp":
        fits += " model.layers.1.mlp"
    assert [x for x in names if named(x, pattern)] == [x for x in names if x in fits.split()]


def test_modules_that_should_be_plain():
    """By the name in the file and that in memory, where a module has two: else nothing is known."""
    assert aliases("vision_tower.a") == ("vision_tower.a", "model.vision_tower.a")
    tower, layer = (
        Module("vision_tower.a", {"weight": FP}),
        Module("model.layers.0", {"weight": FP}),
    )
    refuse_left_out(tower, "skip", ["vision_tower"], named)
    with pytest.raises(InputError, match=r"vision_tower.a: found a quantised .* skip has '\.\*vis"):
        refuse_left_out(tower, "skip", ["x", ".*vision_tower"], named)
    with pytest.raises(InputError, match="model.layers.0: found a quantised"):
        refuse_left_out(layer, "skip", ["model.layers.0"], named)


def test_what_is_not_as_it_should_be():
    module = Module("a", {"weight": FP, "scale": FP[0], "more": FP})
    assert module.take("weight", (None, 2)) is FP
    with pytest.raises(InputError, match=r"a.none: found no tensor, expected it"):
        module.take("none")
    with pytest.raises(InputError, match=r"a.scale: found shape \(2,\), expected \(2, any\)"):
        module.take("scale", (2, None))
    with pytest.raises(InputError, match="a.weight: found dtype float32, expected int8"):
        module.take("weight", None, (np.dtype(np.int8),))
    with pytest.raises(InputError, match="a.more: found a tensor, expected no such one"):
        module.done()
    module.done(["more"])
