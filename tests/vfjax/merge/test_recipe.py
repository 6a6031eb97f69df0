"""Recipes against values worked out by hand from mergekit's config.py and plan.py."""

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from vfjax.errors import InputError
from vfjax.merge.mergekit import DEFAULTS, YAML_NAMES, from_mergekit
from vfjax.merge.methods.registry import METHODS
from vfjax.merge.recipe import TensorPlan, from_config

EMBED, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
UP, DOWN, Q = "mlp.up_proj.weight", "mlp.down_proj.weight", "self_attn.q_proj.weight"


def at(layer, part=UP):
    return f"model.layers.{layer}.{part}"


def names(layers):
    inner = [at(i, part) for i in range(layers) for part in (DOWN, UP, Q)]
    return [HEAD, EMBED, *inner, NORM]


def plan(recipe, layers=3, module="", **counts):
    counts = {model: counts.get(model, layers) for model in recipe.models}
    return recipe.plan({m: names(n) for m, n in counts.items()}, counts, module)


def models(method, *entries, **rest):
    listed = [{"model": m} | ({"parameters": p} if p else {}) for m, p in entries]
    return {"merge_method": method, "models": listed} | rest


def source(model, start, stop, **parameters):
    return {"model": model, "layer_range": [start, stop]} | (
        {"parameters": parameters} if parameters else {}
    )


def passthrough(*slices, **rest):
    return {"merge_method": "passthrough", "slices": [{"sources": [s]} for s in slices]} | rest


LINEAR = models("linear", ("a", {"weight": 1}), ("b", {"weight": 3}))


def test_linear():
    plans = plan(from_mergekit(LINEAR | {"dtype": "bfloat16", "out_dtype": "float16"}))
    assert list(plans)[0] == HEAD and list(plans)[-1] == NORM and len(plans) == 12
    for name, got in plans.items():
        want = {"weights": (1, 3), "normalize": True}
        assert got == TensorPlan("linear", None, (("a", name), ("b", name)), want)


def test_what_the_plan_does_not_use():
    more = {"dtype": "bfloat16", "out_dtype": "float16", "chat_template": "llama3"}
    recipe = from_mergekit(LINEAR | more | {"tokenizer_source": "union"})
    assert (recipe.dtype, recipe.out_dtype, recipe.chat_template) == tuple(more.values())
    assert (recipe.tokenizer_source, recipe.tokenizer, recipe.base) == ("union", None, None)
    assert from_mergekit(LINEAR | {"tokenizer": {"source": "a"}}).tokenizer == {"source": "a"}


def test_layers_are_in_natural_order():
    layers = [name for name in plan(from_mergekit(LINEAR), 12) if name.endswith(UP)]
    assert layers == [at(i) for i in range(12)]


def test_models_are_as_written():
    config = models("task_arithmetic", ("org/a+lora", {"weight": 1}), base_model="org/base")
    recipe = from_mergekit(config)
    assert recipe.models == ("org/base", "org/a+lora") and recipe.base == "org/base"


SLERP = {
    "merge_method": "slerp",
    "slices": [{"sources": [source("a", 0, 5), source("b", 0, 5)]}],
    "base_model": "b",
    "parameters": {
        "t": [
            {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
            {"filter": "mlp", "value": [1, 0.5]},
            {"value": 0.25},
        ]
    },
}


def test_gradients_with_filters():
    plans = plan(from_mergekit(SLERP), 5)
    assert [plans[at(i, Q)].params["t"] for i in range(5)] == [0, 0.5, 0.3, 0.7, 1]
    assert [plans[at(i)].params["t"] for i in range(5)] == [1, 0.875, 0.75, 0.625, 0.5]
    assert [plans[name].params["t"] for name in (EMBED, NORM, HEAD)] == [0.25] * 3


def test_slerp_starts_at_the_base():
    assert plan(from_mergekit(SLERP), 5)[NORM].members == (("b", NORM), ("a", NORM))
    assert plan(from_mergekit(SLERP), 5)[NORM].base is None


def test_gradient_between_its_values():
    config = copy.deepcopy(LINEAR)
    config["models"][0]["parameters"]["weight"] = [0, 1, 5]
    plans = plan(from_mergekit(config), 4)
    # t = 0, 1/3, 2/3, 1 at places 0, 2/3, 4/3, 2 of the list.
    want = [0, 2 / 3, 1 + 4 / 3, 5]
    assert [plans[at(i)].params["weights"][0] for i in range(4)] == pytest.approx(want)
    assert plans[EMBED].params["weights"] == plans[HEAD].params["weights"] == (0, 3)


def test_a_lone_layer_is_at_the_end_of_a_gradient():
    config = copy.deepcopy(LINEAR)
    config["models"][0]["parameters"]["weight"] = [0, 1]
    plans = plan(from_mergekit(config), 1)
    assert plans[at(0)].params["weights"] == (1, 3)
    assert plans[EMBED].params["weights"] == (0, 3)


def test_switches_go_in_steps():
    plans = plan(from_mergekit(LINEAR | {"parameters": {"normalize": [True, False]}}), 3)
    assert [plans[at(i)].params["normalize"] for i in range(3)] == [True, True, False]


numbers = st.lists(st.floats(-10, 10), min_size=1, max_size=6)


@given(numbers, st.integers(2, 9))
def test_gradients_run_from_end_to_end(values, layers):
    config = models("linear", ("a", {"weight": values}))
    plans = plan(from_mergekit(config), layers)
    found = [plans[at(i)].params["weights"][0] for i in range(layers)]
    assert (found[0], found[-1]) == (values[0], values[-1])
    assert min(values) - 1e-9 <= min(found) and max(found) <= max(values) + 1e-9


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 7), st.integers(1, 8)), min_size=1))
def test_frankenmerge_renumbers_the_layers(spans):
    spans = [(model, min(x, y - 1), max(x + 1, y)) for model, x, y in spans]
    plans = plan(from_mergekit(passthrough(*(source(*span) for span in spans))), 8)
    taken = [(model, at(i)) for model, start, stop in spans for i in range(start, stop)]
    assert [p.members for name, p in plans.items() if name.endswith(UP)] == [(x,) for x in taken]
    assert [name for name in plans if name.endswith(UP)] == [at(i) for i in range(len(taken))]
    first, last = spans[0][0], spans[-1][0]
    assert plans[EMBED] == TensorPlan("passthrough", None, ((first, EMBED),), {})
    assert plans[NORM].members == ((last, NORM),) and plans[HEAD].members == ((last, HEAD),)


def test_a_model_scales_what_passes_through():
    cases = [{"filter": "down_proj", "value": 0}, {"filter": "layers.2", "value": 7}]
    config = passthrough(source("a", 0, 2), source("a", 2, 4, scale=[*cases, {"value": 1}]))
    plans = plan(from_mergekit(config), 4)
    assert plans[at(1, DOWN)].params == {} and plans[at(3, DOWN)].params == {"scale": 0}
    assert plans[at(2, Q)].params == {"scale": 7}  # a's own name, though here it is the output's
    shifted = passthrough(source("a", 2, 4, scale=[*cases, {"value": 1}]))
    assert plan(from_mergekit(shifted), 4)[at(0, Q)].params == {"scale": 7}


def test_a_shared_filter_sees_the_output_name():
    slerp = copy.deepcopy(SLERP) | {
        "parameters": {"t": [{"filter": "layers.0", "value": 1}, {"value": 0}]}
    }
    slerp["slices"][0]["sources"] = [source("a", 2, 4), source("b", 2, 4)]
    plans = plan(from_mergekit(slerp), 4)
    assert (plans[at(0)].params["t"], plans[at(1)].params["t"]) == (1, 0)
    assert plans[at(0)].members == (("b", at(2)), ("a", at(2)))


def test_gradients_are_over_a_slice():
    config = {
        "merge_method": "linear",
        "slices": [
            {"sources": [source("a", 0, 3, weight=[0, 1])]},
            {"sources": [source("a", 3, 5, weight=[4, 5])]},
        ],
    }
    plans = plan(from_mergekit(config), 5)
    assert [plans[at(i)].params["weights"] for i in range(5)] == [(0,), (0.5,), (1,), (4,), (5,)]
    assert plans[EMBED].params["weights"] == (0,) and plans[NORM].params["weights"] == (4,)


def test_the_nearest_parameter_counts():
    config = {
        "merge_method": "linear",
        "parameters": {"weight": 1, "normalize": False},
        "modules": {
            "text": {
                "parameters": {"weight": [{"filter": "down", "value": 2}]},
                "slices": [
                    {
                        "sources": [
                            source("a", 0, 1, weight=[{"filter": "q_proj", "value": 4}]),
                            source("b", 0, 1),
                        ],
                        "parameters": {"weight": [{"filter": "_proj", "value": 3}]},
                    },
                    {"sources": [source("a", 0, 1), source("b", 1, 2)]},
                ],
            },
            "other": {"models": [{"model": "c"}]},
        },
    }
    recipe = from_mergekit(config)
    plans = plan(recipe, 2, "text")
    assert plans[at(0, Q)].params == {"weights": (4, 3), "normalize": False}
    assert plans[at(0, DOWN)].params["weights"] == (3, 3)
    assert plans[at(1, DOWN)].params["weights"] == (2, 2)
    assert plans[at(1)].params["weights"] == plans[EMBED].params["weights"] == (1, 1)
    assert plan(recipe, 2, "other")[NORM].members == (("c", NORM),)
    assert recipe.models == ("a", "b", "c")


def test_the_last_slice_makes_the_head_with_all_its_sources():
    one, two = {"sources": [source("a", 0, 1)]}, {"sources": [source("a", 1, 2), source("b", 1, 2)]}
    config = {"merge_method": "linear", "slices": [one, two], "parameters": {"weight": 1}}
    plans = plan(from_mergekit(config), 2)
    assert plans[EMBED].members == (("a", EMBED),)
    assert plans[HEAD].members == (("a", HEAD), ("b", HEAD))


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


def change(config, path, value):
    config = copy.deepcopy(config)
    *keys, last = path
    at = config
    for key in keys:
        at = at[key]
    at[last] = value
    return config


FIRST = ("models", 0, "parameters")
SOURCE = ("slices", 0, "sources", 0)


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


def test_models_that_differ():
    recipe = from_mergekit(LINEAR)
    with pytest.raises(InputError, match=r"models: found layers: 3 of a, 4 of b"):
        plan(recipe, b=4)
    both, counts = {"a": names(3), "b": names(3)}, {"a": 3, "b": 3}
    for missing in (HEAD, EMBED, at(2), at(0, Q)):
        short = [name for name in both["b"] if name != missing]
        with pytest.raises(InputError, match=f"b: found no tensor for '{missing}'.*as in a"):
            recipe.plan(both | {"b": short}, counts)
        with pytest.raises(InputError, match=f"a: found no tensor for '{missing}'.*as in b"):
            recipe.plan(both | {"a": short}, counts)
    with pytest.raises(InputError, match="b: model.layers.3.*found layer 3, expected 3 layers"):
        recipe.plan(both | {"b": names(4)}, counts)
    with pytest.raises(InputError, match="b: found no tensors of layer 2"):
        recipe.plan(both | {"b": names(2)}, counts)


def test_a_rule_that_fits_nothing():
    recipe = from_config(NATIVE | {"rules": [("embed_tokenz", {"take": "a"})]})
    with pytest.raises(InputError, match="rules: found 'embed_tokenz', expected a part of some te"):
        plan(recipe)


def test_wrong_module():
    modules = {name: {"models": [{"model": "a"}]} for name in ("text", "vision")}
    recipe = from_mergekit({"merge_method": "passthrough", "modules": modules})
    with pytest.raises(
        InputError, match=r"modules: found \['text', 'vision'\], expected one module"
    ):
        plan(recipe)
    assert plan(recipe, module="text")[NORM].members == (("a", NORM),)
    del modules["vision"]
    alone = from_mergekit({"merge_method": "passthrough", "modules": modules})
    assert plan(alone)[NORM].members == (("a", NORM),)


NATIVE = {"method": "linear", "members": ["a", "b"], "params": {"weights": (0.5, [0.2, 0.8])}}


@given(st.lists(st.one_of(st.floats(-2, 2), numbers), min_size=2, max_size=2), st.booleans())
def test_both_forms_agree(weights, normalize):
    params = {"weights": tuple(weights), "normalize": normalize}
    mergekit = models("linear", *(("ab"[i], {"weight": w}) for i, w in enumerate(weights)))
    theirs = from_mergekit(mergekit | {"parameters": {"normalize": normalize}})
    assert plan(from_config(NATIVE | {"params": params})) == plan(theirs)


def test_config():
    plans = plan(from_config(NATIVE))
    assert [plans[at(i)].params for i in range(3)] == [
        {"weights": (0.5, 0.2)},
        {"weights": (0.5, 0.5)},
        {"weights": (0.5, 0.8)},
    ]
    assert plans[at(1)].members == (("a", at(1)), ("b", at(1)))
    cases = [{"filter": "mlp", "value": [0, 1]}, {"filter": "*", "value": 9}]
    plans = plan(from_config(NATIVE | {"params": {"weights": [1, cases]}}))
    assert plans[at(1)].params["weights"] == (1, 0.5) and plans[NORM].params["weights"] == (1, 9)


def test_one_number_for_all_or_one_a_member():
    config = {"method": "ties", "base": "base", "members": ["a", "b"]}
    found = {}
    for density in (0.5, [0, 1], (0.5, [0.4, 0.8])):
        params = {"weights": (1, 1), "density": density, "scale": [2, 4]}
        got = plan(from_config(config | {"params": params}))[at(1)]
        assert got.params["scale"] == 3 and got.base == ("base", at(1))
        found[str(density)] = got.params["density"]
    assert list(found.values()) == [(0.5, 0.5), (0.5, 0.5), (0.5, pytest.approx(0.6))]


def test_rules():
    rules = [
        (r"norm", {"take": "base"}),
        (r"^lm_head|embed", {"take": "b"}),
        (r"layers\.[02]\.mlp\.up", {"method": "linear", "params": {"weights": (1, [3, 5])}}),
        (r"mlp", {"params": {"scale": 0.5}}),
    ]
    params = {"weights": (1, 2), "scale": 0.1}
    config = {"method": "task_arithmetic", "base": "base", "members": ["a", "b"], "params": params}
    recipe = from_config(config | {"rules": rules})
    assert recipe.models == ("base", "a", "b")
    plans = plan(recipe)
    assert plans[NORM] == TensorPlan("passthrough", None, (("base", NORM),), {})
    assert plans[EMBED].members == (("b", EMBED),) and plans[HEAD].members == (("b", HEAD),)
    both = (("a", at(2)), ("b", at(2)))
    assert plans[at(2)] == TensorPlan("linear", None, both, {"weights": (1, 5)})
    assert plans[at(1)].params == {"weights": (1, 2), "scale": 0.5}
    assert plans[at(1, Q)].params == params
    assert plan(from_config(ConfigDict(config | {"rules": rules}))) == plans


def test_a_taken_tensor_is_needed_of_its_source_only():
    recipe = from_config(NATIVE | {"rules": [("lm_head", {"take": "a"})]})
    held = {"a": names(2), "b": [name for name in names(2) if name != HEAD]}
    assert recipe.plan(held, {"a": 2, "b": 2})[HEAD].members == (("a", HEAD),)
    held = {"a": held["b"], "b": held["a"]}
    with pytest.raises(InputError, match="a: found no tensor for 'lm_head.weight'"):
        recipe.plan(held, {"a": 2, "b": 2})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "lnear"}, "method: found 'lnear'"),
        ({"seed": 1}, "recipe: found key 'seed'"),
        ({"base": 1}, "base: found 1"),
        ({"members": []}, "members: found []"),
        ({"members": ["a", 1]}, "members: found 1"),
        ({"members": ["a", "a"]}, "members: found a twice"),
        ({"params": {"weight": (1, 1)}}, "params: found 'weight'"),
        ({"params": {"weights": (1, 1, 1)}}, "params.weights: found (1, 1, 1), expected 2 values"),
        ({"params": {"weights": 1}}, "params.weights: found 1"),
        ({"params": {"weights": (1, {"value": 1})}}, "params.weights: found {"),
        ({"method": ["linear"]}, "method: found ['linear']"),
        ({"rules": "norm"}, "rules: found 'norm'"),
        ({"rules": ["norm"]}, "rules[0]: found 'norm'"),
        ({"rules": [("(", {"take": "a"})]}, "rules[0]: found '('"),
        ({"rules": [("x", {"take": "c"})]}, "rules[0].take: found 'c', expected a, b"),
        ({"rules": [("x", {"take": "a", "method": "linear"})]}, "rules[0]: found take, method"),
        ({"rules": [("x", {"keep": "a"})]}, "rules[0]: found key 'keep'"),
        ({"rules": [("x", {"method": "y"})]}, "rules[0].method: found 'y'"),
        ({"rules": [("x", {"params": {"y": 1}})]}, "rules[0].params: found 'y'"),
    ],
)
def test_wrong_config(change, message):
    with pytest.raises(InputError) as error:
        from_config(NATIVE | change)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"params": {}}, "found no 'weights' for a"),
        ({"params": {"weights": ("1", 2)}}, "linear.weights: found ('1', 2)"),
        ({"method": "task_arithmetic"}, "found no base, expected one, for task_arithmetic"),
        ({"method": "task_arithmetic", "base": "a"}, "found the base a among the members"),
        ({"members": ["a", "b", "c"], "method": "slerp", "params": {"t": 0.5}}, "found 3 members"),
    ],
)
def test_wrong_config_once_planned(change, message):
    recipe = from_config(NATIVE | change)
    with pytest.raises(InputError) as error:
        plan(recipe)
    assert message in str(error.value) and "\n" not in str(error.value)
