"""Do these models share a base? Answered from configs and tensor headers, before any work."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vfjax.errors import InputError, counted
from vfjax.merge.tensors import Header, LazyTensor

REMEDY = "merge only models that were fine-tuned from one base LLM"
ANYWAY = f"{REMEDY}, or set family to False to merge all the same"
VOCABULARY = ("embed_tokens.weight", "lm_head.weight")
"""Ends of the names of tensors with one row a token."""


def check_tensors(sources: Sequence[tuple[str, Mapping[str, Header]]]) -> None:
    """Checks that all sources have the first one's tensor names and shapes.

    Args:
        sources: (label, tensors), the reference first.

    Raises:
        InputError: naming the source and its first tensor that is missing, extra or differs.
    """
    (reference, expected), *others = sources
    for label, tensors in others:
        check_names(label, list(tensors), reference, list(expected))
        for name, tensor in tensors.items():
            check_shape(f"{label}: {name}", tensor.shape, reference, expected[name].shape)


def check_names(label: str, names: list[str], reference: str, expected: list[str]) -> None:
    """Raises InputError if a source has not the tensors of the reference."""
    missing, extra = sorted(set(expected) - set(names)), sorted(set(names) - set(expected))
    if not missing and not extra:
        return
    wrong = [f"{len(missing)} missing, the first {missing[0]!r}"] if missing else []
    wrong += [f"{len(extra)} extra, the first {extra[0]!r}"] if extra else []
    tied = any(name.endswith("lm_head.weight") for name in missing + extra)
    hint = "lm_head is tied to the embedding in one of them (tie_word_embeddings); " if tied else ""
    raise InputError(
        label,
        found=f"{counted(len(names), 'tensor')}: {'; '.join(wrong)}",
        expected=f"the {counted(len(expected), 'tensor')} of {reference}",
        fix=hint + REMEDY,
    )


def check_shape(
    where: str, shape: tuple[int, ...], reference: str, expected: tuple[int, ...]
) -> None:
    """Raises InputError if a tensor has not the shape of the reference's."""
    if shape == expected:
        return
    if where.endswith(VOCABULARY) and shape[1:] == expected[1:]:
        _vocabulary_error(where, shape[0], reference, expected[0])
    raise InputError(
        where, found=f"shape {shape}", expected=f"{expected} as in {reference}", fix=REMEDY
    )


def _vocabulary_error(where: str, rows: int, reference: str, expected: int) -> None:
    raise InputError(
        where,
        found=f"vocabulary of {rows} rows, {reference} has {expected}",
        expected="one vocabulary",
        fix="if they differ at the end only (added tokens, padding), vocab='base' keeps the "
        "base's, vocab='NAME' those of member NAME; otherwise " + REMEDY,
    )


ALIKE = 0.5
"""Least cosine of a member's weights with the base's. Fine-tunes of one base stay above 0.9, models
that were trained apart are near 0; a delta of one and a half times the base's length leaves 0.55.
"""

SAMPLE, PIECES, LAYERS = 64, 8, 3
"""Rows that are read of a matrix, in how many pieces, and of how many layers."""


def check_weights(sources: Mapping[str, Mapping[str, LazyTensor]]) -> None:
    """Checks on a few rows that the weights themselves have one origin.

    Of every kind of matrix (all layers' queries, say) those of a few layers, and of the tables of
    tokens the rows that all have.

    Args:
        sources: label -> tensors of one family by `check_family`, the reference (base) first.

    Raises:
        InputError: naming the member, the tensor and the cosine of the two.
    """
    (reference, first), *others = sources.items()
    kinds: dict[str, list[str]] = {}
    for name, tensor in first.items():
        if len(tensor.shape) == 2:
            kinds.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    for names in kinds.values():
        some = sorted({round(i * (len(names) - 1) / (LAYERS - 1)) for i in range(LAYERS)})
        for label, tensors in others:
            pairs = [
                _rows(first[name], tensors[name])
                for name in (names[i] for i in some)
                if name in tensors and _fits(name, first[name].shape, tensors[name].shape)
            ]
            if not pairs:
                continue
            lengths = [_dot((x, x) for x in side) for side in zip(*pairs, strict=True)]
            if not (scale := math.sqrt(math.prod(lengths))):
                continue
            cosine = _dot(pairs) / scale
            # Of few numbers it is uncertain: by 1 / sqrt(n) where the two have nothing in common.
            if cosine < ALIKE - 4 / math.sqrt(sum(a.size for a, _ in pairs)):
                raise InputError(
                    f"{label}: {names[some[0]]}",
                    found=f"weights with a cosine of {cosine:.2f} to those of {reference}",
                    expected=f"at least {ALIKE}: a fine-tune of that model",
                    fix=ANYWAY,
                )


def _fits(name: str, shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return shape == other or (name.endswith(VOCABULARY) and shape[1:] == other[1:])


def _dot(pairs: Iterable[Sequence[np.ndarray]]) -> float:
    return sum(float((a * b).sum()) for a, b in pairs)


def _rows(*tensors: LazyTensor) -> list[np.ndarray]:
    """Float64 rows of tensors, the same of each: the first ones, of many rows some in all parts."""
    height, size = min(tensor.shape[0] for tensor in tensors), SAMPLE // PIECES
    spans = [slice(0, height)]
    if height > SAMPLE:
        starts = [i * (height - size) // (PIECES - 1) for i in range(PIECES)]
        spans = [slice(i, i + size) for i in starts]
    return [
        np.concatenate([np.asarray(tensor[rows]).astype(np.float64) for rows in spans])
        for tensor in tensors
    ]


def check_family(configs: Mapping[str, Mapping[str, Any]], *, theta: bool = True) -> None:
    """Checks that LLM configs describe one architecture, so that merging their weights has a sense.

    Sizes, rotary embedding and norm epsilon; tied and untied models may be merged. A size that a
    config leaves to its class's default is left to `check_tensors`; rope_theta and rms_norm_eps,
    which no tensor shows, default to 10000 and 1e-6, as in all of Llama, Mistral, Qwen2 and Gemma.

    Args:
        configs: label -> LLM part of a Hugging Face config.json (of transformers 4 or 5), the
            reference (base) first.
        theta: refuse other values of rope_theta, too. (Qwen3-VL was trained on from Qwen3 with five
            times its.)

    Raises:
        InputError: naming the member and the key.
    """
    (reference, first), *others = configs.items()
    expected = _facts(first)
    for label, config in others:
        for key, value in _facts(config).items():
            if value == expected[key] or value is None or expected[key] is None:
                continue
            if key == "rope_theta" and not theta:
                continue
            if key == "vocab_size":
                _vocabulary_error(f"{label}: vocab_size", value, reference, expected[key])
            raise InputError(
                f"{label}: {key}",
                found=value,
                expected=f"{expected[key]} as in {reference}",
                fix=ANYWAY if key == "rope_theta" else REMEDY,
            )


MROPE = ("mrope_section", "mrope_interleaved")
"""Keys of rope_parameters or rope_scaling that say which position turns which frequency."""


def _facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values to compare, None where the config does not say.

    Not among them is which position turns which frequency (M-RoPE): text has three equal ones, so
    the weights of a Qwen2-VL's LLM are those of a Qwen2.
    """
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    facts = {key: config.get(key) for key in (*sizes, "vocab_size")}
    heads, hidden = facts["num_attention_heads"], facts["hidden_size"]
    facts["num_key_value_heads"] = config.get("num_key_value_heads") or heads
    facts["head_dim"] = config.get("head_dim") or (hidden // heads if heads and hidden else None)
    facts["rms_norm_eps"] = config.get("rms_norm_eps", 1e-6)
    # transformers 5 holds both in rope_parameters, transformers 4 in rope_theta and rope_scaling.
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    facts["rope_theta"] = rope.pop("rope_theta", None) or config.get("rope_theta", 10000.0)
    kind = rope.pop("rope_type", None) or rope.get("type") or "default"
    rope.pop("type", None)
    if kind in ("mrope", "dynamic"):  # the latter changes nothing within the context
        kind = "default"
        rope.pop("factor", None)
    for key in MROPE:
        rope.pop(key, None)
    settings = {key: value for key, value in rope.items() if value is not None}
    facts["rope_scaling"] = {"rope_type": kind} | settings
    return facts
