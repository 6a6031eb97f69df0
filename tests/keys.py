"""Other values for the keys of transformers' configs, and what becomes of each key."""

import dataclasses
import typing
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest

HIDDEN: dict[str, tuple[Any, ...]] = {
    "is_causal": (False,),
    "layer_types": (["sliding_attention"], ["full_attention"]),
    "sliding_window": (3,),
    "use_bidirectional_attention": (True,),
    "use_sliding_window": (True,),
    "attention_bias": (True,),
    "mlp_bias": (True,),
    "head_dim": (4,),
    "partial_rotary_factor": (0.5,),
    "original_max_position_embeddings": (8,),
    "rope_theta": (50.0,),
    "rope_scaling": (
        {"rope_type": "linear", "factor": 2.0},
        {"type": "dynamic", "factor": 2.0},
        {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ),
    "hidden_activation": ("relu",),
    "num_experts": (2,),
    "per_layer_config": ({"0": {"rms_norm_eps": 0.5}},),
    "tie_last_hidden_states": (True,),
    "return_class_token": (True,),
    "qkv_bias": (False,),
    "quantization_config": ({"quant_method": "fp8"},),
}
"""Keys that are in no class, or another's: transformers obeys some of them all the same."""

UNTRIED = {"return_dict": "on its other value, the classes fail themselves"}
"""Keys without a fate -> why."""

WIDEST = 2e-4
"""Largest difference, as a share of the reference's largest value."""


def values_of(key: str, value: Any, kind: Any) -> Iterator[Any]:
    """Values of a key other than its own, by its type."""
    options = typing.get_args(kind) or (kind,)
    if value is not None and type(None) in options:
        yield None
    if isinstance(value, bool) or (value is None and bool in options):
        yield not value
    elif isinstance(value, int) or (value is None and int in options):
        size = value or 4
        yield from (2 * size, size // 2, size + 1, max(size - 1, 0), 3 * size)
    elif isinstance(value, float) or (value is None and float in options):
        yield from ((value or 0.1) * 3, 0.5)
    elif isinstance(value, str):
        literals = [x for x in options if isinstance(x, str)]
        activations = ["relu", "gelu", "silu", "gelu_new", "quick_gelu"] if "act" in key else []
        yield from (x for x in (*literals, *activations, "other") if x != value)
    elif isinstance(value, list):
        yield from (value[::-1], value[:1], [*value, *value])
        if value and isinstance(value[0], str):
            yield ["sliding_attention" if "attention" in value[0] else "other"] * len(value)
    elif isinstance(value, dict):
        for name, old in value.items():
            yield from ({**value, name: new} for new in values_of(name, old, type(old)))
        if "rope" in key:
            yield {**value, "partial_rotary_factor": 0.5}
            yield from ({**value, **scaling} for scaling in HIDDEN["rope_scaling"])
            yield {**value, "rope_type": "yarn", "factor": 2.0}
            yield {
                **value,
                "rope_type": "longrope",
                "factor": 2.0,
                "short_factor": [1.5, 1.25, 1.0, 2.0],
                "long_factor": [3.0] * 4,
            }
    else:
        yield from (["other"], {"other": 1}, "float16", "float32")


def mutations(config_class: Any, base: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """All keys of a config class, and those of others, with other values."""
    kinds = {field.name: field.type for field in dataclasses.fields(config_class)}
    for key in sorted({*base, *kinds} - {"model_type", "transformers_version"}):
        for value in values_of(key, base.get(key), kinds.get(key)):
            yield key, value
    for key in sorted(HIDDEN.keys() - base.keys()):
        yield from ((key, value) for value in HIDDEN[key])


def same(found: list[np.ndarray], expected: list[np.ndarray], limit: float) -> bool:
    if [x.shape for x in found] != [x.shape for x in expected]:
        return False
    return all(
        np.abs(a - b).max() <= limit * np.abs(b).max() for a, b in zip(found, expected, strict=True)
    )


def show(kind: str, fates: Mapping[str, str], capsys: pytest.CaptureFixture[str]) -> Counter[str]:
    """Counts the keys of each fate, and prints the counts."""
    counts = Counter(fates.values())
    with capsys.disabled():
        print(
            f"\n{kind}: " + ", ".join(f"{n} {fate}" for fate, n in sorted(counts.items())), end=""
        )
    return counts
