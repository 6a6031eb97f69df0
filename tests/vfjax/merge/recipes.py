"""Recipes in mergekit's form, small ones, and the names of the tensors that they plan."""

import copy

from hypothesis import strategies as st

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

numbers = st.lists(st.floats(-10, 10), min_size=1, max_size=6)
