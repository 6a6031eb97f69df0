"""mergekit's YAML against values worked out by hand from its config.py and plan.py."""

import copy

import pytest

from tests.vfjax.merge.recipes import (
    EMBED,
    FIRST,
    LINEAR,
    NORM,
    SLERP,
    SOURCE,
    at,
    change,
    models,
    plan,
    source,
)
from vfjax.errors import InputError
from vfjax.merge.mergekit import DEFAULTS, YAML_NAMES, from_mergekit
from vfjax.merge.methods.registry import METHODS
from vfjax.merge.recipe import TensorPlan


def test_what_the_plan_does_not_use():
    more = {"dtype": "bfloat16", "out_dtype": "float16", "chat_template": "llama3"}
    recipe = from_mergekit(LINEAR | more | {"tokenizer_source": "union"})
    assert (recipe.dtype, recipe.out_dtype, recipe.chat_template) == tuple(more.values())
    assert (recipe.tokenizer_source, recipe.tokenizer, recipe.base) == ("union", None, None)
    assert from_mergekit(LINEAR | {"tokenizer": {"source": "a"}}).tokenizer == {"source": "a"}


def test_models_are_as_written():
    config = models("task_arithmetic", ("org/a+lora", {"weight": 1}), base_model="org/base")
    recipe = from_mergekit(config)
    assert recipe.models == ("org/base", "org/a+lora") and recipe.base == "org/base"


def test_slerp_starts_at_the_base():
    assert plan(from_mergekit(SLERP), 5)[NORM].members == (("b", NORM), ("a", NORM))
    assert plan(from_mergekit(SLERP), 5)[NORM].base is None


MEANT = {"trim": "tensor", "vote": "weighted"}

TIES = models(
    "ties",
    ("base", {}),
    ("a", {"weight": 0.5, "density": 0.4}),
    ("b", {"weight": 0.3}),
    base_model="base",
)


def test_ties():
    got = plan(from_mergekit(TIES))[at(1)]
    assert (got.base, got.members) == (("base", at(1)), (("a", at(1)), ("b", at(1))))
    want = {"weights": (0.5, 0.3), "density": (0.4, 1.0), "scale": 1.0}
    assert got.params == want | MEANT | {"normalize": True, "rescale": "none"}


def test_ties_with_the_base_unlisted_and_all_set():
    shared = {"lambda": "1e-1", "rescale": True, "normalize": 0, "int8_mask": True, "density": 0.5}
    config = TIES | {"models": TIES["models"][1:], "parameters": shared}
    got = plan(from_mergekit(config))[NORM]
    want = {"weights": (0.5, 0.3), "density": (0.4, 0.5), "scale": 0.1}
    assert got.params == want | MEANT | {"normalize": False, "rescale": "norm"}
    assert got.base == ("base", NORM) and len(got.members) == 2


@pytest.mark.parametrize(
    ("method", "normalize", "rescale"),
    [
        ("ties", True, "none"),
        ("dare_linear", False, "norm"),
        ("dare_ties", False, "norm"),
        ("breadcrumbs", False, "none"),
        ("breadcrumbs_ties", False, "none"),
        ("della", True, "norm"),
        ("della_linear", False, "norm"),
    ],
)
def test_defaults_of_the_family(method, normalize, rescale):
    params = plan(from_mergekit(TIES | {"merge_method": method}))[at(0)].params
    assert (params["normalize"], params["rescale"], params["scale"]) == (normalize, rescale, 1.0)
    assert params.get("gamma", (0.01, 0.01)) == (0.01, 0.01)
    assert params.get("epsilon", (0.15, 0.15)) == (0.15, 0.15)


def test_tables_name_what_the_methods_have():
    for table in (DEFAULTS, {m: names for m, names in YAML_NAMES.items() if m}):
        for method, values in table.items():
            assert set(values) <= set(METHODS[method].params), method


def test_a_base_that_linear_does_not_read_is_a_member():
    config = LINEAR | {"base_model": "a"}
    assert plan(from_mergekit(config)) == plan(from_mergekit(LINEAR))
    unlisted = models("linear", ("a", {}), base_model="b", parameters={"weight": 2})
    got = plan(from_mergekit(unlisted))[NORM]
    assert got.members == (("a", NORM), ("b", NORM)) and got.params["weights"] == (2, 2)


def test_optional_base():
    config = models("nuslerp", ("a", {"weight": 1}), ("b", {"weight": 2}))
    got = plan(from_mergekit(config | {"parameters": {"nuslerp_flatten": False}}))[NORM]
    assert (got.base, got.members) == (None, (("a", NORM), ("b", NORM)))
    assert got.params == {"weights": (1, 2), "flatten": False, "row_wise": False}
    got = plan(from_mergekit(config | {"base_model": "c"}))[NORM]
    assert (got.base, got.members) == (("c", NORM), (("a", NORM), ("b", NORM)))
    multi = config | {"merge_method": "multislerp", "parameters": {"normalize_weights": False}}
    assert plan(from_mergekit(multi))[NORM].params["normalize"] is False


def test_a_slice_has_its_own_base():
    slices = [
        {"sources": [source("a", 0, 2), source("b", 0, 2)], "base_model": "a"},
        {"sources": [source("a", 2, 3), source("b", 2, 3)]},
    ]
    config = {"merge_method": "task_arithmetic", "slices": slices, "base_model": "b"}
    plans = plan(from_mergekit(config | {"parameters": {"weight": 1}}))
    assert [plans[x].base[0] for x in (EMBED, at(1), at(2), NORM)] == ["a", "a", "b", "b"]
    assert [plans[x].members[0][0] for x in (EMBED, at(1), at(2), NORM)] == ["b", "b", "a", "a"]


@pytest.mark.parametrize(
    ("method", "entry"),
    [("slerp", "a"), ("karcher", "a"), ("multislerp", "a"), ("task_arithmetic", "base")],
)
def test_a_lone_source_is_as_it_is(method, entry):
    config = {"merge_method": method, "slices": [{"sources": [source(entry, 0, 3)]}]}
    got = plan(from_mergekit(config | {"base_model": "base"}))[NORM]
    assert got == TensorPlan("passthrough", None, ((entry, NORM),), {})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LINEAR | {"sharding": 1}, "recipe: found key 'sharding'"),
        (LINEAR | {"merge_method": "lnear"}, "merge_method: found 'lnear'"),
        (LINEAR | {"merge_method": None}, "merge_method: found None"),
        (LINEAR | {"models": []}, "found none, expected exactly one of models, slices, modules"),
        (LINEAR | {"slices": SLERP["slices"]}, "found models and slices"),
        (LINEAR | {"models": "a"}, "models: found 'a'"),
        (LINEAR | {"dtype": 16}, "dtype: found 16"),
        (LINEAR | {"parameters": [1]}, "parameters: found [1], expected a mapping"),
        (LINEAR | {"parameters": {"weights": 1}}, "parameters: found 'weights'"),
        (LINEAR | {"tokenizer": {"source": "a"}, "tokenizer_source": "a"}, "tokenizer_source too"),
        (change(LINEAR, FIRST, {"weigth": 1}), "models[0].parameters: found 'weigth'"),
        (
            {"merge_method": "multislerp", "models": [{"model": "a", "parameters": {"eps": 1e-3}}]},
            "models[0].parameters: found 'eps'",
        ),
        (change(LINEAR, FIRST, {"weight": None}), "models[0].parameters.weight: found None"),
        (change(LINEAR, FIRST, {"weight": []}), "models[0].parameters.weight: found []"),
        (change(LINEAR, FIRST, {"weight": {"val": 1}}), "weight: found key 'val'"),
        (change(LINEAR, FIRST, {"weight": [{"values": 1}]}), "weight: found key 'values'"),
        (change(LINEAR, FIRST, {"weight": [{"value": 1}, 2]}), "weight: found 2"),
        (change(LINEAR, FIRST, {"weight": [{"filter": 3, "value": 1}]}), "weight.filter: found 3"),
        (
            change(LINEAR, ("models", 0, "layer_range"), [0, 3]),
            "models[0]: found key 'layer_range'",
        ),
        (change(LINEAR, ("models", 0, "model"), None), "models[0]: found no 'model'"),
        (change(LINEAR, ("models", 0, "model"), {"path": "a"}), "models[0].model: found {"),
        (change(LINEAR, ("models", 0, "model"), "b"), "models: found b twice"),
        (change(SLERP, (*SOURCE, "layer_range"), [3, 3]), "sources[0].layer_range: found [3, 3]"),
        (change(SLERP, (*SOURCE, "layer_range"), [0, True]), "layer_range: found [0, True]"),
        (change(SLERP, (*SOURCE, "layer_range"), None), "sources[0].layer_range: found None"),
        (SLERP | {"base_model": "c"}, "slices[0]: found base_model 'c' not among"),
        (SLERP | {"base_model": None}, "slices[0]: found no base_model"),
        (TIES | {"base_model": None}, "models: found no base_model"),
        ({"merge_method": "linear", "modules": {"text": {}}}, "modules.text: found none"),
        ("linear", "recipe: found 'linear', expected a mapping"),
    ],
)
def test_wrong_yaml(config, message):
    with pytest.raises(InputError) as error:
        from_mergekit(config)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "path", "key", "value"),
    [
        (LINEAR, ("parameters",), "density", 1),
        (LINEAR, ("parameters",), "int8_mask", True),
        (LINEAR, (*FIRST,), "normalize", 3),
        (SLERP, ("parameters",), "weight", "x"),
        (SLERP, (*SOURCE, "parameters"), "t", 0),
        (SLERP, ("slices", 0), "residual_weight", 0.5),
        (TIES, ("models", 1, "parameters"), "gamma", [{"value": 1}]),
    ],
)
def test_keys_that_a_method_does_not_read_are_skipped_and_named(config, path, key, value):
    """As mergekit skips them: the merge is that without them."""
    more = copy.deepcopy(config)
    at = more
    for step in path:
        at = at[step] if isinstance(at, list) else at.setdefault(step, {})
    at[key] = value
    found = from_mergekit(more)
    (unread,) = found.unread
    assert unread.endswith(f".{key}") and not from_mergekit(config).unread
    assert found.modules == from_mergekit(config).modules


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (change(LINEAR, FIRST, {}), "no 'weight' for a"),
        (change(LINEAR, FIRST, {"weight": [{"filter": "mlp", "value": 1}]}), "no 'weight' for a"),
        (change(LINEAR, FIRST, {"weight": "much"}), "linear.weight: found ('much', 3)"),
        (change(LINEAR, FIRST, {"weight": True}), "linear.weight: found (True, 3)"),
        (LINEAR | {"parameters": {"normalize": 0.5}}, "linear.normalize: found 0.5"),
        (LINEAR | {"base_model": "c"}, "no 'weight' for c"),
        (TIES | {"parameters": {"lambda": "x", "weight": 1}}, "ties.lambda: found 'x'"),
        (
            models("multislerp", ("a", {"weight": 1}), ("b", {"weight": 1}))
            | {"parameters": {"normalize_weights": "x"}},
            "multislerp.normalize_weights: found 'x'",
        ),
        (SLERP | {"parameters": {}}, "no 't', expected a value, for slerp"),
        (LINEAR | {"merge_method": "passthrough", "models": [{"model": "a"}, {"model": "b"}]}, "2"),
        (change(SLERP, (*SOURCE, "layer_range"), [1, 6]), "slices[0]: a: found layer_range [1, 6]"),
        (
            change(SLERP, (*SOURCE, "layer_range"), [1, 5]),
            "slices[0]: found layers: 5 of b, 4 of a",
        ),
    ],
)
def test_wrong_once_planned(config, message):
    recipe = from_mergekit(config)
    with pytest.raises(InputError) as error:
        plan(recipe, 5)
    assert message in str(error.value) and "\n" not in str(error.value)
