"""Recipes against values worked out by hand from mergekit's config.py and plan.py."""

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from tests.vfjax.merge.recipes import (
    DOWN,
    EMBED,
    HEAD,
    LINEAR,
    NORM,
    SLERP,
    UP,
    Q,
    at,
    models,
    names,
    numbers,
    passthrough,
    plan,
    source,
)
from vfjax.errors import InputError
from vfjax.merge.mergekit import from_mergekit
from vfjax.merge.recipe import LAYER, TensorPlan, from_config


def test_linear():
    plans = plan(from_mergekit(LINEAR | {"dtype": "bfloat16", "out_dtype": "float16"}))
    assert list(plans)[0] == HEAD and list(plans)[-1] == NORM and len(plans) == 12
    for name, got in plans.items():
        want = {"weights": (1, 3), "normalize": True}
        assert got == TensorPlan("linear", None, (("a", name), ("b", name)), want)


def test_layers_are_in_natural_order():
    layers = [name for name in plan(from_mergekit(LINEAR), 12) if name.endswith(UP)]
    assert layers == [at(i) for i in range(12)]


def test_gradients_with_filters():
    plans = plan(from_mergekit(SLERP), 5)
    assert [plans[at(i, Q)].params["t"] for i in range(5)] == [0, 0.5, 0.3, 0.7, 1]
    assert [plans[at(i)].params["t"] for i in range(5)] == [1, 0.875, 0.75, 0.625, 0.5]
    assert [plans[name].params["t"] for name in (EMBED, NORM, HEAD)] == [0.25] * 3


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


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([f"visual.blocks.{i}.norm1.weight" for i in range(3)], [0, 0.5, 1]),
        ([f"vision_tower/vision_model.encoder.layers.{i}.x" for i in range(3)], [0, 0.5, 1]),
        ([f"vision_tower/layers.{i}.x" for i in range(2)], [0, 1]),
        ([f"trunk.stages.{i}.blocks.1.x" for i in range(2)], [0, 1]),
        ([f"model.visual.deepstack_merger_list.{i}.norm.bias" for i in range(3)], [0, 0.5, 1]),
        (["visual.merger.ln_q.weight", "visual.merger.mlp.2.bias"], [0, 1]),
        (["multi_modal_projector.linear_1.weight", "mm_projector.2.bias"], [0, 0]),
        (["vision_sampler_0.layers.1.x", "model.vision_sampler_layers.3.layers.0.x"], [0, 0]),
    ],
)
def test_gradients_run_over_the_layers_of_a_module(found: list[str], expected: list[float]):
    """As mergekit's qwen2_5_vl.json and qwen3_vl_dense.json count them."""
    recipe = from_config(NATIVE | {"params": {"weights": ([0, 1], 0.5)}})
    depth = sum(LAYER.fullmatch(name) is not None for name in found)
    held = dict.fromkeys("ab", found)
    plans = recipe.plan_module(held, dict.fromkeys("ab", depth), "vision_tower")
    assert [plans[name].params["weights"] for name in found] == [(x, 0.5) for x in expected]


def test_a_rule_may_be_for_another_module():
    recipe = from_config(NATIVE | {"rules": [("visual", {"take": "a"})]})
    held, depth = {"a": names(2), "b": names(2)}, {"a": 2, "b": 2}
    plans = recipe.plan_module(held, depth, "text_decoder")
    recipe.check_rules([*plans, "visual.merger.ln_q.weight"])
    with pytest.raises(InputError, match="rules: found 'visual'"):
        recipe.plan(held, depth)


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
